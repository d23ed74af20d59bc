"""Cost of one exact Hessian-vector product, and of several with the same data.

Ours and every peer's, on one residual network and batch. A library shares between several vectors whatever it can, and
their times are of one vector. curvlinops' product is also timed under `torch.compile`.

    python -m benchmarks.hvp [--network resnet18] [--batch 512] [--device cuda] [--quick]
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp

from benchmarks.support import compilation, options, peers, timing
from benchmarks.support.charts import draw_roads
from benchmarks.support.problems import Problem, image_problem
from benchmarks.support.report import Bar, Report, new_report, publish
from benchmarks.support.roads import bar_against_fastest, eager_forward, relative_error, road_rows
from lmc_curvature import HessianOperator

OURS = "HessianOperator @ v"
OURS_OF_PARAMETERS = "the same, parameters alone"
# Of all our roads; their first call may capture a graph.
OURS_BEGIN = ("HessianOperator", OURS_OF_PARAMETERS)
PEERS = ("PyHessian", "BackPACK", "curvlinops")

SIZES = {
    "full": {"network": "resnet20", "batch": 128, "width": 16, "pixels": 32},
    "quick": {"network": "resnet20", "batch": 32, "width": 16, "pixels": 32},
    "smoke": {"network": "resnet8", "batch": 4, "width": 4, "pixels": 8},
}
COUNTS = {"full": 8, "quick": 8, "smoke": 2}
NOTES = (
    "Peers differentiate parameters only, with the running statistics fixed; ours also differentiate those, unless "
    "a row says otherwise.",
    "Errors are max |p − p₆₄| / max |p₆₄|, against the same product in float64, on examples that are away from the "
    "kinks of ReLUs, where derivatives jump.",
    "Peaks are over what was allocated before the call; the unit is the peak of one gradient by plain autograd.",
)


def main(argv: Sequence[str] | None = None) -> Report:
    """Parse, measure, print and write."""
    chosen = options.parse_options(__file__, __doc__, argv, options.add_network)
    size = options.chosen_size(chosen, SIZES)
    problem = image_problem(**size, device=chosen.device, away_from_kinks=True)
    report = new_report(chosen, "What does a Hessian-vector product cost?", **size, dtype="float32")
    both, compiles = chosen.size == "full", chosen.size == "full"
    found = add_products(report, problem, chosen.pace, count=COUNTS[chosen.size], both_layouts=both, compiles=compiles)
    ours = [name for name in found if name.startswith(OURS_BEGIN)]
    return publish(report, chosen, draw_roads(found, ours, "forward passes a vector"))


def add_products(
    report: Report,
    problem: Problem,
    pace: timing.Pace,
    *,
    count: int,
    both_layouts: bool = False,
    compiles: bool = False,
    elsewhere: Mapping[str, timing.Measurement] | None = None,
) -> dict[str, timing.Measurement]:
    """Measure one product and several by every road, and add their tables, bars and notes to a report.

    Args:
        report: The report.
        problem: The problem.
        pace: Number and length of samples.
        count: The number of several vectors.
        both_layouts: Time peers with channels-last images, too.
        compiles: Compile peers here.
        elsewhere: Compiled peers that another process has measured, by name; of one vector and of several.

    Returns:
        Measurements by name.
    """
    vectors = drawn_vectors(problem, count)
    report.notes += [*peers.missing_peers(), *NOTES]
    one = one_product_roads(problem, vectors[0], both_layouts=both_layouts)
    many = many_products_roads(problem, vectors, both_layouts=both_layouts)
    parts = parameter_parts(problem, vectors)
    compiled_one, notes = compilation.compiled_roads(
        compilation.product_maker(problem, parts[0]), left_out=not compiles
    )
    compiled_many, more = compilation.compiled_roads(compilation.products_maker(problem, parts), left_out=not compiles)
    if elsewhere is None:
        report.notes += dict.fromkeys([*notes, *more])
    one, many = [*eager_forward(problem), *one, *compiled_one], [*many, *compiled_many]
    found = {**timing.measure([*one, *many], pace, problem.device), **(elsewhere or {})}
    errors = _errors(problem, vectors, found)
    several = {name for name, measurement in found.items() if measurement.road.vectors > 1}
    of_one, of_many = ([name for name in found if (name in several) == (kind == "many")] for kind in ("one", "many"))
    for key, title, names in (
        ("one", "One product", of_one),
        ("many", "Several products with the same data, a vector", of_many),
    ):
        report.add(key, title, road_rows([found[name].road for name in names], found, problem, errors))
    report.bars += _bars(found, of_one, of_many, count, problem.device)
    return found


def drawn_vectors(problem: Problem, count: int) -> Tensor:
    """Random vectors over the state, (count, entries)."""
    generator = torch.Generator().manual_seed(0)
    entries = sum(tensor.numel() for tensor in problem.state.values())
    return torch.randn(count, entries, generator=generator).to(problem.device)


def one_product_roads(problem: Problem, vector: Tensor, *, both_layouts: bool) -> list[timing.Road]:
    """Roads to one product, from the network and the data."""
    operator, restricted = HessianOperator(problem.objective), problem.parameter_hessian
    direction, parts = operator.unflatten(vector), _parameter_part(problem, vector)
    roads: dict[str, Callable[[], Any]] = {
        "gradient by plain autograd": problem.forward_backward,
        OURS: lambda: operator @ vector,
        OURS_OF_PARAMETERS: lambda: restricted @ parts,
        "torch.func, forward over reverse": lambda: _flat(_by_torch(problem, direction, forward=True)),
        "torch.func, reverse over reverse": lambda: _flat(_by_torch(problem, direction, forward=False)),
    }
    for layout, laid_out in peers.layouts(problem, both=both_layouts).items():
        for peer in filter(peers.installed, PEERS):
            roads[f"{peer}{layout}"] = _peer_road(peer, laid_out, parts.unsqueeze(0))
    return [
        timing.Road(name, run, problem.forward, warms_up=name.startswith(OURS_BEGIN)) for name, run in roads.items()
    ]


def many_products_roads(problem: Problem, vectors: Tensor, *, both_layouts: bool) -> list[timing.Road]:
    """Roads to the products with several vectors."""
    count = len(vectors)
    operator = HessianOperator(problem.objective)
    columns = vectors.T.contiguous()
    parts = parameter_parts(problem, vectors)
    roads: dict[str, Callable[[], Any]] = {_many(count, "HessianOperator @ V"): lambda: (operator @ columns).T}
    for layout, laid_out in peers.layouts(problem, both=both_layouts).items():
        for peer in filter(peers.installed, ("PyHessian", "BackPACK")):
            roads[_many(count, f"{peer}, kept graph{layout}")] = _peer_road(peer, laid_out, parts)
        if peers.installed("curvlinops"):
            at_once, run = peers.curvlinops_at_once(peers.curvlinops_hessian(laid_out), parts)
            roads[_many(count, f"curvlinops, H @ V, {at_once} at once{layout}")] = run
    return [
        timing.Road(name, run, problem.forward, vectors=count, warms_up=name.startswith(OURS_BEGIN))
        for name, run in roads.items()
    ]


def _many(count: int, road: str) -> str:
    return f"{road} ({count} vectors)"


def _peer_road(peer: str, problem: Problem, vectors: Tensor) -> Callable[[], Tensor]:
    multiply = peers.peer_products(peer)
    return lambda: multiply(problem, vectors)


def _by_torch(problem: Problem, direction: dict[str, Tensor], *, forward: bool) -> dict[str, Tensor]:
    gradient = grad(lambda point: problem.objective.batch_loss(point, problem.batch))
    with problem.objective.numerics.differentiating():
        if forward:
            return jvp(gradient, (problem.state,), (direction,))[1]
        return vjp(gradient, problem.state)[1](direction)[0]


def _flat(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in state.values()])


def _parameter_part(problem: Problem, vector: Tensor) -> Tensor:
    """The part of a vector over the state that belongs to parameters."""
    sizes = [tensor.numel() for tensor in problem.state.values()]
    parts = zip(problem.state, vector.split(sizes), strict=True)
    return torch.cat([part for name, part in parts if name in problem.parameter_hessian.rows])


def parameter_parts(problem: Problem, vectors: Tensor) -> Tensor:
    """The parts of vectors over the state, the rows of a matrix, that belong to parameters."""
    return torch.stack([_parameter_part(problem, vector) for vector in vectors])


def _errors(problem: Problem, vectors: Tensor, found: Mapping[str, timing.Measurement]) -> dict[str, float]:
    """Relative error of every road that gives products, against ours in float64."""
    exact = problem.to(torch.float64)
    operator, restricted = HessianOperator(exact.objective), exact.parameter_hessian
    parts = parameter_parts(problem, vectors)
    references = {
        operator.shape[0]: (operator @ vectors.double().T).T,
        restricted.shape[0]: (restricted @ parts.double().T).T,
    }
    errors = {}
    for name, measurement in found.items():
        if isinstance(measurement.result, Tensor):
            products = measurement.result.reshape(-1, measurement.result.shape[-1])
            errors[name] = relative_error(products, references[products.shape[1]][: len(products)])
    return errors


def _bars(
    found: Mapping[str, timing.Measurement], one: Sequence[str], many: Sequence[str], count: int, device: torch.device
) -> list[Bar]:
    (ours,) = (name for name in many if name.startswith("HessianOperator"))
    several, what = found[ours], f"{count} products"
    alone = [Bar(f"{what}, in F a vector", several.in_forwards, "at most", 6.5)] if device.type == "cpu" else []
    return [
        *bar_against_fastest("one product", found[OURS], [found[name] for name in one if name.startswith(PEERS)]),
        *alone,
        *bar_against_fastest(what, several, [found[name] for name in many if name.startswith(PEERS)]),
    ]


if __name__ == "__main__":
    main()
