"""Cost of the projection UᵀHU of a language model, GPT-2 of 124 million parameters, onto every layer.

What a large vocabulary costs: the sweep of all fused layers at one state, in its default memory, on one batch of random
tokens, beside loops of Hessian-vector products, ours and those of curvlinops. A loop makes three products, from which
its time for all layers is extrapolated; the rows and columns of its directions are compared with the sweep's.

    python -m benchmarks.language [--device cuda] [--quick]
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.support import options, peers, timing
from benchmarks.support.charts import draw_roads
from benchmarks.support.problems import Problem, language_problem
from benchmarks.support.report import Bar, Report, new_report, publish
from benchmarks.support.roads import eager_forward, fastest, relative_error, road_rows
from lmc_curvature import project_hessian

SWEEP, OWN_LOOP = "sweep", "loop of products on a kept graph, sparse directions (method='hvp')"
PEER_LOOP = "curvlinops, loop of products"
SIZES = {
    "full": {"layers": 12, "width": 768, "heads": 12, "vocabulary": 50257, "tokens": 128, "batch": 2},
    "quick": {"layers": 4, "width": 128, "heads": 4, "vocabulary": 4096, "tokens": 64, "batch": 2},
    "smoke": {"layers": 1, "width": 8, "heads": 2, "vocabulary": 40, "tokens": 6, "batch": 2},
}
# A sample may take minutes: it is the first after the call that captures, and there are few.
PACES = {"full": timing.Pace(3, 0.0, 60.0), "quick": timing.Pace(3, 0.0, 10.0), "smoke": timing.PACES["smoke"]}
PRODUCTS = 3
NOTES = (
    f"Loops make {PRODUCTS} products with whole vectors or sparse directions, and their times are extrapolated to as "
    "many as there are layers; errors are of the entries of the matrix that they give, against the sweep's.",
    "Peaks are over what was allocated before the call, so networks and directions are not among it; on a CPU they are "
    "what `torch.profiler` saw the allocator give and take. The unit is the peak of one gradient by plain autograd.",
    "curvlinops computes attention by plain matrix products: fused kernels have no forward derivative.",
)


def main(argv: Sequence[str] | None = None) -> Report:
    """Parse, measure, print and write."""
    chosen = options.parse_options(__file__, __doc__, argv)
    size = SIZES[chosen.size]
    problem = language_problem(**size, device=chosen.device)
    setting = {"parameters": f"{problem.parameter_count:,}", **size, "matrix": len(problem.directions)}
    report = new_report(chosen, "What does UᵀHU of a language model cost?", **setting, dtype="float32")
    found = add_language(report, problem, PACES[chosen.size])
    return publish(report, chosen, draw_roads(found, [SWEEP, OWN_LOOP], "forward passes for the whole matrix"))


def add_language(report: Report, problem: Problem, pace: timing.Pace) -> dict[str, timing.Measurement]:
    """Measure the sweep and loops of products, and add their table, bars and notes to a report.

    Args:
        report: The report.
        problem: A language model's.
        pace: Number and length of samples.

    Returns:
        Measurements by name.
    """
    report.notes += [*peers.missing_peers(["curvlinops"]), *NOTES]
    found = timing.measure([*eager_forward(problem), *roads_of(problem)], pace, problem.device)
    errors = _errors(found)
    rows = road_rows([measurement.road for measurement in found.values()], found, problem, errors)
    report.add("roads", "The k × k matrix by every road", rows)
    report.bars += _bars(problem, found)
    return found


def roads_of(problem: Problem) -> list[timing.Road]:
    """The sweep, and loops that make some of the products and stand for all of them."""
    directions = problem.directions
    few = dict(list(directions.items())[:PRODUCTS])
    share = len(few) / len(directions)

    def project(chosen: dict[str, dict[str, Tensor]], method: str) -> Tensor:
        found = project_hessian(problem.objective, problem.state, chosen, method=method)
        return torch.from_numpy(found.curvature)

    roads = [
        timing.Road(SWEEP, lambda: project(directions, "sweep"), problem.forward, warms_up=True),
        timing.Road(OWN_LOOP, lambda: project(few, "hvp"), problem.forward, vectors=share, warms_up=True),
    ]
    if peers.installed("curvlinops"):
        # A loop is at its peak within every turn.
        run, briefly = (_peer_loop(problem, list(few.values())[:count]) for count in (PRODUCTS, 1))
        roads.append(timing.Road(PEER_LOOP, run, problem.forward, vectors=share, memory_run=briefly))
    return roads


def _peer_loop(problem: Problem, directions: Sequence[dict[str, Tensor]]) -> Callable[[], Tensor]:
    """The entries of UᵀHU for some directions, by products of curvlinops."""
    hessian = peers.curvlinops_hessian(problem.for_peers)

    def run() -> Tensor:
        vectors = torch.stack([problem.vector(direction) for direction in directions])
        with plain_attention():
            return vectors @ torch.stack([hessian @ vector for vector in vectors]).T

    return run


def plain_attention() -> AbstractContextManager[Any]:
    """Within it, attention is computed by operators that can be differentiated in forward mode."""
    return sdpa_kernel(SDPBackend.MATH)


def _errors(found: dict[str, timing.Measurement]) -> dict[str, float]:
    sweep = found[SWEEP].result
    if not isinstance(sweep, Tensor):
        return {}
    matrices = {
        name: measurement.result for name, measurement in found.items() if isinstance(measurement.result, Tensor)
    }
    return {
        name: relative_error(matrix, sweep[: len(matrix), : len(matrix)])
        for name, matrix in matrices.items()
        if name != SWEEP
    }


def _bars(problem: Problem, found: dict[str, timing.Measurement]) -> list[Bar]:
    sweep, cuda = found[SWEEP], problem.device.type == "cuda"
    bars = [] if cuda else [Bar("sweep, in F", sweep.in_forwards, "at most", 60)]
    if not cuda and sweep.peak is not None:
        bars.append(Bar("peak of the sweep, GiB", sweep.peak / 2**30, "at most", 4))
    rival = fastest(measurement for name, measurement in found.items() if name.startswith("curvlinops"))
    if rival is not None:
        ratio = rival.in_forwards.over(sweep.in_forwards)
        bars.append(Bar(f"{rival.road.name} / sweep", ratio, "at least", 8 if cuda else 5))
    return bars


if __name__ == "__main__":
    main()
