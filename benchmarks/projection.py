"""Cost of the exact projection UᵀHU of the Hessian onto every layer, by the sweep and by other roads.

The directions U are the layers' displacements from one residual network with batch normalisation to another; times are
of one k × k matrix. Our products are looped, taken together and vectorised by `torch.func.vmap`; curvlinops, PyHessian
and BackPACK multiply in their own ways, curvlinops' product also under `torch.compile`. Further tables: the cost of the
first call (checks, capture, self-check), the distance of the sweep from products in either precision and, with
`--profile`, the sweep's time by operation.

    python -m benchmarks.projection [--network resnet18] [--batch 512] [--device cuda] [--profile] [--quick]
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from benchmarks.support import compilation, memory, options, peers, profiling, timing
from benchmarks.support.charts import draw_roads
from benchmarks.support.problems import Problem, image_problem
from benchmarks.support.report import Bar, Report, new_report, publish
from benchmarks.support.roads import eager_forward, fastest, relative_error, road_rows
from lmc_curvature import HessianOperator, project_hessian

SWEEP = "sweep"
LOOPS = ("loop of products on a kept graph, sparse directions (method='hvp')", "HessianOperator @ V, all at once")
ONE_BY_ONE = "loop of HessianOperator @ v"
OURS = (SWEEP, *LOOPS, ONE_BY_ONE)

SIZES = {
    "full": {"network": "resnet20", "batch": 128, "width": 16, "pixels": 32},
    "quick": {"network": "resnet20", "batch": 16, "width": 16, "pixels": 32},
    "smoke": {"network": "resnet8", "batch": 4, "width": 4, "pixels": 8},
}
# Bars by type of device.
BOUNDS = {"cpu": {"F": 14, "peer": 12, "own": 8}, "cuda": {"F": 18, "peer": 8}}
NOTES = (
    "Peers differentiate parameters only, with the running statistics fixed; ours also differentiate those.",
    "Errors are max |M − M₆₄| / max |M₆₄|, against looped products in float64 for the same directions, on examples "
    "that are away from the kinks of ReLUs, where derivatives jump.",
    "Peaks are over what was allocated before the call; the unit is the peak of one gradient by plain autograd.",
)


def main(argv: Sequence[str] | None = None) -> Report:
    """Parse, measure, print and write."""
    chosen = options.parse_options(__file__, __doc__, argv, options.add_network, profiling.add_profile)
    size = options.chosen_size(chosen, SIZES)
    problem = image_problem(**size, device=chosen.device, away_from_kinks=True)
    setting = {**size, "layers": len(problem.directions), "dtype": "float32"}
    report = new_report(chosen, "What does UᵀHU for every layer cost?", **setting)
    both, compiles = chosen.size == "full", chosen.size == "full"
    found = add_projection(report, problem, chosen.pace, both_layouts=both, compiles=compiles)
    if chosen.profile:
        report.tables.append(profiling.profile_table("the sweep", lambda: project(problem, "sweep"), chosen.device))
    return publish(report, chosen, draw_roads(found, OURS, "forward passes for the whole matrix"))


def add_projection(
    report: Report,
    problem: Problem,
    pace: timing.Pace,
    *,
    both_layouts: bool = False,
    compiles: bool = False,
    elsewhere: Mapping[str, timing.Measurement] | None = None,
    exact: bool = True,
) -> dict[str, timing.Measurement]:
    """Measure every road to the matrix, and add their tables, bars and notes to a report.

    Args:
        report: The report.
        problem: The problem.
        pace: Number and length of samples.
        both_layouts: Time peers with channels-last images, too.
        compiles: Compile peers here.
        elsewhere: Peers that another process has measured, by name.
        exact: Compare in float64, too; else with our products in float32 alone, for a GPU that is slow in float64.

    Returns:
        Measurements by name.
    """
    report.notes += [*peers.missing_peers(), *NOTES]
    first = _first_call(problem)
    report.add("first", "The first call of a sweep, measured once", first)
    if problem.device.type == "cuda":
        report.bars.append(Bar("the first call, seconds", first[-1]["ms"] / 1000, "at most", 3))
    own, others = own_roads(problem), peer_roads(problem, both_layouts=both_layouts)
    compiled, notes = compilation.compiled_roads(compilation.matrix_makers(problem), left_out=not compiles)
    others += compiled
    if elsewhere is None:
        report.notes += notes
    measured = timing.measure([*eager_forward(problem), *own, *others], pace, problem.device)
    found = {**measured, **(elsewhere or {})}
    # Bars without exact errors are better than none.
    exact = exact and not pace.is_over
    rivals = [*(road.name for road in others), *(elsewhere or {})]
    errors = _errors(problem, found, rivals, torch.float64 if exact else torch.float32)
    rows = road_rows([measurement.road for measurement in found.values()], found, problem, errors)
    report.add("roads", "The k × k matrix by every road", rows)
    if not exact:
        report.notes.append("Here errors are against looped products of ours in float32.")
    dtypes = () if pace.is_over else (torch.float32, torch.float64) if exact else (torch.float32,)
    agreement = _agreement(problem, dtypes)
    title = "Distance of the sweep from products, max |M_sweep − M_hvp| / max |M_hvp|"
    report.add("agreement", title, agreement)
    report.bars += _bars(problem, found, errors, [road.name for road in own], rivals, agreement)
    return found


def project(problem: Problem, method: str) -> Tensor:
    """UᵀHU by one of this library's methods."""
    found = project_hessian(problem.objective, problem.state, problem.directions, method=method)
    return torch.from_numpy(found.curvature)


def own_roads(problem: Problem) -> list[timing.Road]:
    """This library's roads to the matrix."""
    vectors = problem.dense(problem.directions)
    operator = HessianOperator(problem.objective)
    at_once = memory.columns_that_fit(
        lambda count: _vmapped(problem, vectors[:count], count), len(vectors), problem.device
    )
    roads: dict[str, Callable[[], Any]] = {
        SWEEP: lambda: project(problem, "sweep"),
        LOOPS[0]: lambda: project(problem, "hvp"),
        LOOPS[1]: lambda: vectors @ (operator @ vectors.T),
        ONE_BY_ONE: lambda: torch.stack([vectors @ (operator @ vector) for vector in vectors]),
        f"vmap of jvp(grad(loss)), {at_once} at once": lambda: _vmapped(problem, vectors, at_once),
    }
    # A loop is at its peak within every turn.
    briefly: dict[str, Callable[[], Any]] = {ONE_BY_ONE: lambda: operator @ vectors[0]}
    return [
        timing.Road(name, run, problem.forward, warms_up=name in OURS, memory_run=briefly.get(name))
        for name, run in roads.items()
    ]


def _vmapped(problem: Problem, vectors: Tensor, at_once: int) -> Tensor:
    """UᵀHU by torch.func's vectorised forward over reverse."""
    state = problem.state
    sizes = [tensor.numel() for tensor in state.values()]
    stacked = {
        name: part.view(len(vectors), *state[name].shape)
        for name, part in zip(state, vectors.split(sizes, dim=1), strict=True)
    }
    gradient = grad(lambda point: problem.objective.batch_loss(point, problem.batch))

    def product(vector: dict[str, Tensor]) -> dict[str, Tensor]:
        return jvp(gradient, (state,), (vector,))[1]

    with problem.objective.numerics.differentiating():
        products = vmap(product, chunk_size=at_once)(stacked)
        return vectors @ torch.cat([products[name].flatten(1) for name in state], dim=1).T


def peer_roads(problem: Problem, *, both_layouts: bool) -> list[timing.Road]:
    """The roads through other libraries."""
    roads = []
    for layout, laid_out in peers.layouts(problem, both=both_layouts).items():
        vectors = laid_out.dense(laid_out.parameter_directions)
        for peer in filter(peers.installed, ("PyHessian", "BackPACK", "curvlinops")):
            run, briefly = (_looped(peer, laid_out, part) for part in (vectors, vectors[:2]))
            roads.append(timing.Road(f"{peer}, loop of products{layout}", run, problem.forward, memory_run=briefly))
        if peers.installed("curvlinops"):
            roads.append(_curvlinops_matrix(laid_out, layout))
    return roads


def _looped(peer: str, problem: Problem, vectors: Tensor) -> Callable[[], Tensor]:
    multiply = peers.peer_products(peer)
    return lambda: vectors @ multiply(problem, vectors).T


def _curvlinops_matrix(problem: Problem, layout: str) -> timing.Road:
    vectors = problem.dense(problem.parameter_directions)
    at_once, run = peers.curvlinops_at_once(peers.curvlinops_hessian(problem), vectors)
    return timing.Road(f"curvlinops, H @ V, {at_once} at once{layout}", lambda: vectors @ run().T, problem.forward)


def _first_call(problem: Problem) -> list[dict[str, Any]]:
    """Rows with the cost of the first sweep over a shape of batch, step by step."""
    forward = min(timing.seconds_once(problem.forward)[0] for _ in range(3))
    objective = problem.new_objective()

    def sweep() -> object:
        return project_hessian(objective, problem.state, problem.directions, method="sweep")

    checks, first = timing.seconds_once(objective.loss)[0], timing.seconds_once(sweep)[0]
    warm = min(timing.seconds_once(sweep)[0] for _ in range(3))
    steps = {
        "checks of the network (any first evaluation)": checks,
        "capture of the graph and self-check, once a graph": max(first - warm, 0.0),
        "the sweep, as ever after": warm,
    }
    steps["together"] = sum(steps.values())
    return [{"step": step, "ms": 1000 * seconds, "F": seconds / forward} for step, seconds in steps.items()]


def _errors(
    problem: Problem,
    found: Mapping[str, timing.Measurement],
    parameters_alone: Sequence[str],
    dtype: torch.dtype,
) -> dict[str, float]:
    """Relative errors of roads, against products in some precision along all entries or along parameters alone."""
    exact = problem.to(dtype)
    references = {
        alone: torch.from_numpy(project_hessian(exact.objective, exact.state, directions, method="hvp").curvature)
        for alone, directions in ((False, exact.directions), (True, exact.parameter_directions))
    }
    return {
        name: relative_error(measurement.result, references[name in parameters_alone])
        for name, measurement in found.items()
        if isinstance(measurement.result, Tensor)
    }


def _agreement(problem: Problem, dtypes: Sequence[torch.dtype]) -> list[dict[str, Any]]:
    """Rows with the distance of the sweep from looped products, in each precision."""
    rows = []
    for dtype in dtypes:
        typed = problem if dtype == torch.float32 else problem.to(dtype)
        error = relative_error(project(typed, "sweep"), project(typed, "hvp"))
        rows.append({"dtype": str(dtype).removeprefix("torch."), "error": error})
    return rows


def _bars(
    problem: Problem,
    found: Mapping[str, timing.Measurement],
    errors: Mapping[str, float],
    own: Sequence[str],
    others: Sequence[str],
    agreement: Sequence[Mapping[str, Any]],
) -> list[Bar]:
    sweep, bounds = found[SWEEP], BOUNDS[problem.device.type]
    bars = [Bar("sweep, in F", sweep.in_forwards, "at most", bounds["F"])]
    loops = [name for name in own if name != SWEEP]
    for what, names, key in (("fastest peer", others, "peer"), ("best own loop of products", loops, "own")):
        # A road that is wrong is no road.
        rival = fastest(found[name] for name in names if errors.get(name, np.inf) < 1e-3)
        if rival is not None and key in bounds:
            ratio = rival.in_forwards.over(sweep.in_forwards)
            bars.append(Bar(f"{what} ({rival.road.name}) / sweep", ratio, "at least", bounds[key]))
    if sweep.peak is not None:
        bars.append(Bar("peak of the sweep / of a gradient", sweep.peak / problem.gradient_peak, "at most", 3))
    for row in agreement:
        bound = {"float32": 1e-5, "float64": 1e-9}[row["dtype"]]
        bars.append(Bar(f"agreement in {row['dtype']}", row["error"], "at most", bound))
    return bars


if __name__ == "__main__":
    main()
