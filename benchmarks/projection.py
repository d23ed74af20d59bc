"""What does the exact projection of the Hessian onto every layer cost, and what do other roads to it?

The network is a residual one with batch normalisation; the directions are its layers' displacements towards a second
network. Times are of one k × k matrix.

    python -m benchmarks.projection [--network resnet18] [--batch 512] [--device cuda] [--profile] [--quick]
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from benchmarks.support.charts import draw_roads
from benchmarks.support.harness import (
    ROAD_COLUMNS,
    Bar,
    Column,
    Report,
    Table,
    add_network,
    chosen_size,
    parse_options,
    publish,
    relative_error,
    road_row,
    setting,
)
from benchmarks.support.memory import columns_that_fit, peak_bytes
from benchmarks.support.peers import (
    curvlinops_columns,
    curvlinops_hessian,
    installed,
    layouts,
    missing_peers,
    peer_products,
)
from benchmarks.support.problems import Problem, image_problem
from benchmarks.support.profiling import add_profile, profile_table
from benchmarks.support.timing import Measurement, Road, Spread, measure, seconds_once
from lmc_curvature import HessianOperator, Objective, project_hessian
from lmc_curvature.curvature.sweep.sweep import Sweep

SWEEP = "sweep"
LOOPS = ("loop of products on a kept graph, sparse directions (method='hvp')", "HessianOperator @ V, all at once")
ONE_BY_ONE = "loop of HessianOperator @ v"

SIZES = {
    "full": {"network": "resnet20", "batch": 128, "width": 16, "pixels": 32},
    "quick": {"network": "resnet20", "batch": 16, "width": 16, "pixels": 32},
    "smoke": {"network": "resnet8", "batch": 4, "width": 4, "pixels": 8},
}


def main(argv: Sequence[str] | None = None) -> Report:
    """Parse, measure, print and write."""
    options = parse_options(__file__, __doc__, argv, _add_options)
    size = chosen_size(options, SIZES)
    problem = image_problem(**size, device=options.device, away_from_kinks=True)
    name = "projection" if size["network"] == "resnet20" else f"projection-{size['network']}"
    report = Report(name, "What does UᵀHU for every layer cost?", setting(options, **size, dtype="float32"))
    report.setting["layers"] = len(problem.directions)
    report.notes += [*missing_peers(), *_notes()]

    report.tables.append(_first_call(problem))
    own, peers = own_roads(problem), peer_roads(problem, both_layouts=options.size == "full")
    found = measure([*own, *peers], options.pace, options.device)
    gradient_peak = peak_bytes(problem.forward_backward, options.device)
    references = _references(problem)
    rows, errors = [], {}
    for name, measurement in found.items():
        reference = references["parameters" if name in [road.name for road in peers] else "all"]
        if measurement.result is not None:
            errors[name] = relative_error(measurement.result, reference)
        rows.append(road_row(measurement, gradient_peak=gradient_peak, error=errors.get(name)))
    report.tables.append(Table("roads", "The k × k matrix by every road", ROAD_COLUMNS, rows))
    agreement = _agreement(problem)
    report.tables.append(agreement)
    report.bars += _bars(found, errors, [road.name for road in peers], gradient_peak, agreement)
    if options.profile:
        report.tables.append(profile_table("the sweep", lambda: _project(problem, "sweep"), options.device))
    # One of the roads from the network alone is torch's.
    ours = [road.name for road in own if not road.name.startswith("vmap")]
    figure = draw_roads(found, ours, "forward passes for the whole matrix")
    return publish(report, options, figure)


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_network(parser)
    add_profile(parser)


def _notes() -> list[str]:
    return [
        "Peers differentiate parameters only, with the running statistics fixed; ours also differentiate those.",
        "Errors are max |M − M₆₄| / max |M₆₄|, against looped products in float64 for the same directions, on examples "
        "that are away from the kinks of ReLUs, where derivatives jump.",
        "Peaks are over what was allocated before the call; the unit is the peak of one gradient by plain autograd.",
    ]


def _project(problem: Problem, method: str) -> Tensor:
    found = project_hessian(problem.objective, problem.state, problem.directions, method=method)
    return torch.from_numpy(found.curvature)


def own_roads(problem: Problem) -> list[Road]:
    """This library's roads to the matrix."""
    vectors = problem.dense(problem.directions)
    operator = HessianOperator(problem.objective)
    at_once = columns_that_fit(lambda count: _vmapped(problem, vectors[:count], count), len(vectors), problem.device)
    roads: dict[str, Callable[[], Any]] = {
        SWEEP: lambda: _project(problem, "sweep"),
        LOOPS[0]: lambda: _project(problem, "hvp"),
        LOOPS[1]: lambda: vectors @ (operator @ vectors.T),
        ONE_BY_ONE: lambda: torch.stack([vectors @ (operator @ vector) for vector in vectors]),
        f"vmap of jvp(grad(loss)), {at_once} at once": lambda: _vmapped(problem, vectors, at_once),
    }
    # A loop is at its peak within every turn.
    briefly: dict[str, Callable[[], Any]] = {ONE_BY_ONE: lambda: operator @ vectors[0]}
    return [
        Road(name, run, problem.forward, warms_up=name == SWEEP, memory_run=briefly.get(name))
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

    with problem.objective.differentiating():
        products = vmap(product, chunk_size=at_once)(stacked)
        return vectors @ torch.cat([products[name].flatten(1) for name in state], dim=1).T


def peer_roads(problem: Problem, *, both_layouts: bool) -> list[Road]:
    """The roads through other libraries."""
    roads = []
    for layout, chosen in layouts(problem, both=both_layouts).items():
        vectors = chosen.dense(chosen.parameter_directions)
        for peer in ("PyHessian", "BackPACK", "curvlinops"):
            if installed(peer):
                run, briefly = (_looped(peer, chosen, part) for part in (vectors, vectors[:2]))
                roads.append(Road(f"{peer}, loop of products{layout}", run, problem.forward, memory_run=briefly))
        if installed("curvlinops"):
            roads.append(_curvlinops_matrix(chosen, layout))
    return roads


def _looped(peer: str, problem: Problem, vectors: Tensor) -> Callable[[], Tensor]:
    multiply = peer_products(peer)
    return lambda: vectors @ multiply(problem, vectors).T


def _curvlinops_matrix(problem: Problem, layout: str) -> Road:
    operator, vectors = curvlinops_hessian(problem), problem.dense(problem.parameter_directions)
    at_once = columns_that_fit(
        lambda count: curvlinops_columns(operator, vectors[:count], count), len(vectors), problem.device
    )
    name = f"curvlinops, H @ V, {at_once} at once{layout}"
    return Road(name, lambda: vectors @ curvlinops_columns(operator, vectors, at_once).T, problem.forward)


def _first_call(problem: Problem) -> Table:
    """What the first sweep over a shape of batch costs, step by step."""
    forward = min(seconds_once(problem.forward)[0] for _ in range(3))
    objective = Objective(problem.model, list(problem.batches))
    steps = {"checks of the network (any first evaluation)": seconds_once(objective.loss)[0]}
    sweep = Sweep(objective, [problem.state], list(problem.directions.values()))
    steps["capture of the graph"] = seconds_once(lambda: sweep.captures.of(problem.batch))[0]

    def project() -> object:
        return project_hessian(objective, problem.state, problem.directions, method="sweep")

    checked, warm = seconds_once(project)[0], min(seconds_once(project)[0] for _ in range(3))
    steps["self-check, once a graph"] = max(checked - warm, 0.0)
    steps["the sweep, as ever after"] = warm
    steps["together"] = sum(steps.values())
    columns = (Column("step", "step"), Column("ms", "ms"), Column("F", "F"))
    rows = [{"step": step, "ms": 1000 * seconds, "F": seconds / forward} for step, seconds in steps.items()]
    return Table("first", "The first call of a sweep, measured once", columns, rows)


def _references(problem: Problem) -> dict[str, Tensor]:
    """The matrix in float64 by products: along all entries, and along parameters alone."""
    exact = problem.to(torch.float64)
    return {
        kind: torch.from_numpy(project_hessian(exact.objective, exact.state, directions, method="hvp").curvature)
        for kind, directions in (("all", exact.directions), ("parameters", exact.parameter_directions))
    }


def _agreement(problem: Problem) -> Table:
    """How far the sweep is from looped products, in each precision."""
    rows = []
    for dtype in (torch.float32, torch.float64):
        chosen = problem if dtype == torch.float32 else problem.to(dtype)
        error = relative_error(_project(chosen, "sweep"), _project(chosen, "hvp"))
        rows.append({"dtype": str(dtype).removeprefix("torch."), "error": error})
    columns = (Column("dtype", "precision"), Column("error", "max |M_sweep − M_hvp| / max |M_hvp|", 2))
    return Table("agreement", "Agreement of the sweep with products", columns, rows)


def _bars(
    found: dict[str, Measurement],
    errors: dict[str, float],
    peers: Sequence[str],
    gradient_peak: float,
    agreement: Table,
) -> list[Bar]:
    sweep = found[SWEEP]
    own = [name for name in found if name not in peers and name != SWEEP]
    bars = [Bar("sweep, in F", sweep.in_forwards, "at most", 14)]
    for what, names, bound in (("fastest peer", peers, 12), ("best own loop of products", own, 8)):
        # A road that is wrong is no road.
        right = [found[name] for name in names if errors.get(name, np.inf) < 1e-3]
        if right:
            fastest = min(right, key=lambda measurement: measurement.in_forwards.median)
            ratio = fastest.in_forwards.over(sweep.in_forwards)
            bars.append(Bar(f"{what} ({fastest.road.name}) / sweep", ratio, "at least", bound))
    bars.append(Bar("peak of the sweep / of a gradient", _exactly((sweep.peak or 0) / gradient_peak), "at most", 3))
    for row, bound in zip(agreement.rows, (1e-5, 1e-9), strict=True):
        bars.append(Bar(f"agreement in {row['dtype']}", _exactly(row["error"]), "at most", bound))
    return bars


def _exactly(value: Any) -> Spread:
    return Spread(float(value), float(value), float(value))


if __name__ == "__main__":
    main()
