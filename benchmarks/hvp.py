"""How fast is one exact Hessian-vector product, and how fast are many with the same data?

Ours and every peer's, on one residual network and batch. For many products, what a library can share between the
vectors of a batch it shares, and times are of one vector.

    python -m benchmarks.hvp [--network resnet18] [--batch 512] [--device cuda] [--quick]
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp

from benchmarks.support.charts import draw_roads
from benchmarks.support.harness import (
    ROAD_COLUMNS,
    Bar,
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
from benchmarks.support.problems import Problem, image_problem, parameters_only
from benchmarks.support.timing import Measurement, Road, measure
from lmc_curvature import HessianOperator

OURS = "HessianOperator @ v"
OURS_OF_PARAMETERS = "the same, parameters alone"
PEERS = ("PyHessian", "BackPACK", "curvlinops")

SIZES = {
    "full": {"network": "resnet20", "batch": 128, "width": 16, "pixels": 32},
    "quick": {"network": "resnet20", "batch": 32, "width": 16, "pixels": 32},
    "smoke": {"network": "resnet8", "batch": 4, "width": 4, "pixels": 8},
}
COUNTS = {"full": (8,), "quick": (8,), "smoke": (2,)}


def main(argv: Sequence[str] | None = None) -> Report:
    """Parse, measure, print and write."""
    options = parse_options(__file__, __doc__, argv, add_network)
    size = chosen_size(options, SIZES)
    problem = image_problem(**size, device=options.device, away_from_kinks=True)
    name = "hvp" if size["network"] == "resnet20" else f"hvp-{size['network']}"
    report = Report(name, "What does a Hessian-vector product cost?", setting(options, **size, dtype="float32"))
    report.notes += [*missing_peers(), *_notes()]
    counts = COUNTS[options.size]
    vectors = torch.randn(max(counts), problem.dense(problem.directions).shape[1], device=options.device)

    both = options.size == "full"
    one = one_product_roads(problem, vectors[0], both_layouts=both)
    many = [road for count in counts for road in many_products_roads(problem, vectors[:count], both_layouts=both)]
    found = measure([*one, *many], options.pace, options.device)
    gradient_peak = peak_bytes(problem.forward_backward, options.device)
    errors = _errors(problem, vectors, found)
    for name, title, roads in (
        ("one", "One product", one),
        ("many", "Several products with the same data, a vector", many),
    ):
        rows = [road_row(found[road.name], gradient_peak=gradient_peak, error=errors.get(road.name)) for road in roads]
        report.tables.append(Table(name, title, ROAD_COLUMNS, rows))
    report.bars += _bars(found, counts)
    ours = [name for name in found if name.startswith(("HessianOperator", OURS_OF_PARAMETERS))]
    return publish(report, options, draw_roads(found, ours, "forward passes a vector"))


def _notes() -> list[str]:
    return [
        "Peers differentiate parameters only, with the running statistics fixed; ours also differentiate those, unless "
        "a row says otherwise.",
        "Errors are max |p − p₆₄| / max |p₆₄|, against the same product in float64, on examples that are away from the "
        "kinks of ReLUs, where derivatives jump.",
        "Peaks are over what was allocated before the call; the unit is the peak of one gradient by plain autograd.",
    ]


def one_product_roads(problem: Problem, vector: Tensor, *, both_layouts: bool) -> list[Road]:
    """Roads to one product, from the network and the data."""
    operator = HessianOperator(problem.objective)
    restricted = HessianOperator(problem.objective, layers="parameters", partition=parameters_only)
    direction, parts = operator.unflatten(vector), _parameter_part(problem, vector)
    roads: dict[str, Callable[[], Any]] = {
        "gradient by plain autograd": problem.forward_backward,
        OURS: lambda: operator @ vector,
        OURS_OF_PARAMETERS: lambda: restricted @ parts,
        "torch.func, forward over reverse": lambda: _flat(_by_torch(problem, direction, forward=True)),
        "torch.func, reverse over reverse": lambda: _flat(_by_torch(problem, direction, forward=False)),
    }
    for layout, chosen in layouts(problem, both=both_layouts).items():
        roads |= {f"{peer}{layout}": _peer_road(peer, chosen, parts.unsqueeze(0)) for peer in PEERS if installed(peer)}
    return [Road(name, run, problem.forward) for name, run in roads.items()]


def many_products_roads(problem: Problem, vectors: Tensor, *, both_layouts: bool) -> list[Road]:
    """Roads to the products with several vectors."""
    count = len(vectors)
    operator = HessianOperator(problem.objective)
    columns = vectors.T.contiguous()
    parts = torch.stack([_parameter_part(problem, vector) for vector in vectors])
    roads: dict[str, Callable[[], Any]] = {_many(count, "HessianOperator @ V"): lambda: (operator @ columns).T}
    for layout, chosen in layouts(problem, both=both_layouts).items():
        for peer in ("PyHessian", "BackPACK"):
            if installed(peer):
                roads[_many(count, f"{peer}, kept graph{layout}")] = _peer_road(peer, chosen, parts)
        if installed("curvlinops"):
            peer = curvlinops_hessian(chosen)
            at_once = columns_that_fit(functools.partial(_first_columns, peer, parts), count, problem.device)
            name = f"curvlinops, H @ V, {at_once} at once{layout}"
            roads[_many(count, name)] = functools.partial(curvlinops_columns, peer, parts, at_once)
    return [Road(name, run, problem.forward, vectors=count) for name, run in roads.items()]


def _first_columns(peer: Any, vectors: Tensor, count: int) -> Tensor:
    return curvlinops_columns(peer, vectors[:count], count)


def _many(count: int, road: str) -> str:
    return f"{road} ({count} vectors)"


def _peer_road(peer: str, problem: Problem, vectors: Tensor) -> Callable[[], Tensor]:
    multiply = peer_products(peer)
    return lambda: multiply(problem, vectors)


def _by_torch(problem: Problem, direction: dict[str, Tensor], *, forward: bool) -> dict[str, Tensor]:
    gradient = grad(lambda point: problem.objective.batch_loss(point, problem.batch))
    with problem.objective.differentiating():
        if forward:
            return jvp(gradient, (problem.state,), (direction,))[1]
        return vjp(gradient, problem.state)[1](direction)[0]


def _flat(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in state.values()])


def _parameter_part(problem: Problem, vector: Tensor) -> Tensor:
    """What of a vector over the state belongs to parameters."""
    sizes = [tensor.numel() for tensor in problem.state.values()]
    parts = zip(problem.state, vector.split(sizes), strict=True)
    return torch.cat([part for name, part in parts if parameters_only(name) == "parameters"])


def _errors(problem: Problem, vectors: Tensor, found: dict[str, Measurement]) -> dict[str, float]:
    """Relative error of every road that gives products, against ours in float64."""
    exact = problem.to(torch.float64)
    operator = HessianOperator(exact.objective)
    restricted = HessianOperator(exact.objective, layers="parameters", partition=parameters_only)
    parts = torch.stack([_parameter_part(problem, vector) for vector in vectors])
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


def _bars(found: dict[str, Measurement], counts: Sequence[int]) -> list[Bar]:
    bars = []
    one = [name for name in found if name.startswith(PEERS) and "vectors)" not in name]
    if one:
        bars.append(_against_fastest("one product", found[OURS], [found[name] for name in one]))
    for count in counts:
        ours = found[_many(count, "HessianOperator @ V")]
        bars.append(Bar(f"{count} products, in F a vector", ours.in_forwards, "at most", 6.5))
        many = [name for name in found if name.startswith(PEERS) and name.endswith(f"({count} vectors)")]
        if many:
            bars.append(_against_fastest(f"{count} products", ours, [found[name] for name in many]))
    return bars


def _against_fastest(what: str, ours: Measurement, peers: Sequence[Measurement]) -> Bar:
    fastest = min((peer for peer in peers if peer.multiples), key=lambda peer: peer.in_forwards.median)
    return Bar(
        f"{what}: ours / the fastest peer ({fastest.road.name})",
        ours.in_forwards.over(fastest.in_forwards),
        "at most",
        1.0,
    )


if __name__ == "__main__":
    main()
