"""Cost of a dense Hessian in Hessian-vector products, for growing numbers of parameters.

Perceptrons of growing width: one product, the whole Hessian dense, and all layers' own blocks dense, each by ours,
`torch.func.hessian` and curvlinops, whose product is also compiled. A matrix that would not fit into two thirds of the
free memory is made in chunks.

    python -m benchmarks.hvp_vs_exact [--device cuda] [--quick]
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp, vmap

from benchmarks.support import compilation, growth, options, peers, timing
from benchmarks.support.charts import Panel, draw_panels
from benchmarks.support.memory import columns_that_fit
from benchmarks.support.problems import Problem, mlp_problem
from benchmarks.support.report import Report, new_report, publish
from benchmarks.support.roads import eager_forward, relative_error, road_row
from lmc_curvature import HessianOperator, layer_hessian

# Hidden widths, for 114, 330, 1,045, 3,138 and 10,090 parameters.
WIDTHS = {"full": (4, 10, 23, 46, 90), "quick": (4, 10, 23), "smoke": (2, 4)}
EXAMPLES = {"full": 100, "quick": 50, "smoke": 10}

PRODUCT = "HessianOperator @ v"
# Kind of road, the title of its table and of its panel.
KINDS = {
    "product": ("One product", "one product"),
    "whole": ("The whole Hessian, dense", "whole Hessian"),
    "layers": ("All layers' own blocks, dense", "all layers' blocks"),
}
# Kind of road, to the kind and the name of what curvlinops computes when it is compiled.
COMPILED = {
    "product": ("product", "curvlinops' product, compiled"),
    "whole": ("whole", "curvlinops' H @ identity, compiled"),
    "layers": ("layers", "curvlinops' H @ identity, compiled"),
}
NOTES = (
    "F of networks this small is mostly overhead, so times in milliseconds say more here.",
    "In products: the time over that of one HessianOperator @ v on the same network.",
    "Errors are max |H − H₆₄| / max |H₆₄|, against torch.func.hessian in float64.",
    "Peaks are over what was allocated before the call; the unit is the peak of one gradient by plain autograd.",
)


def main(argv: Sequence[str] | None = None) -> Report:
    """Parse, measure, print and write."""
    chosen = options.parse_options(__file__, __doc__, argv)
    setting = {"network": "perceptron of three linear layers", "examples": EXAMPLES[chosen.size], "dtype": "float32"}
    report = new_report(chosen, "What does a dense Hessian cost, in Hessian-vector products?", **setting)
    problems = [mlp_problem(width, setting["examples"], device=chosen.device) for width in WIDTHS[chosen.size]]
    panels = add_growth(report, problems, chosen.pace, compiles=chosen.size == "full")
    return publish(report, chosen, draw_panels(panels))


def add_growth(
    report: Report, problems: Sequence[Problem], pace: timing.Pace, *, compiles: bool = False
) -> list[Panel]:
    """Measure products and dense Hessians of growing networks, and add their tables and notes to a report.

    Args:
        report: The report.
        problems: From few parameters to many.
        pace: Number and length of samples.
        compiles: Compile curvlinops' product.

    Returns:
        Curves of time over the number of parameters.
    """
    report.notes += [*peers.missing_peers(), *NOTES]
    roads: dict[Problem, dict[tuple[str, str], timing.Road]] = {}
    for problem in problems:
        compiled, notes = compiled_roads_of(problem, left_out=not compiles)
        report.notes += [note for note in notes if note not in report.notes]
        roads[problem] = roads_of(problem) | compiled
    device = problems[0].device
    found = timing.measure([road for kinds in roads.values() for road in kinds.values()], pace, device)
    rows = [row for problem in problems for row in _rows(problem, roads[problem], found)]
    panels = []
    for kind, (title, panel) in KINDS.items():
        of_kind = [row for row in rows if row["kind"] == kind]
        report.add(kind, title, of_kind)
        panels.append(growth.growth_panel(panel, "parameters", of_kind))
    report.add(
        "exponents", "Exponents of time in parameters, by least squares on logarithms", growth.exponent_rows(panels)
    )
    return panels


def roads_of(problem: Problem) -> dict[tuple[str, str], timing.Road]:
    """Kind and name, to the roads for one network; road names also hold the number of parameters."""
    count = problem.parameter_count
    runs = {
        **{("product", name): run for name, run in _product_roads(problem, count).items()},
        **{("whole", name): run for name, run in _whole_roads(problem, count).items()},
        **{("layers", name): run for name, run in _layer_roads(problem).items()},
    }
    ours = ("HessianOperator", "layer_hessian")
    return {
        # The first call of ours may capture a graph.
        key: timing.Road(_named(problem, key), run, problem.forward, warms_up=key[1].startswith(ours))
        for key, run in runs.items()
    }


def _named(problem: Problem, key: tuple[str, str]) -> str:
    kind, name = key
    return f"{kind}: {name} ({problem.parameter_count})"


def compiled_roads_of(problem: Problem, *, left_out: bool) -> tuple[dict[tuple[str, str], timing.Road], list[str]]:
    """The roads of curvlinops' product, compiled, by kind and name, and notes."""

    def road(key: tuple[str, str], run: Callable[[], Any], seconds: float) -> timing.Road:
        return timing.Road(_named(problem, key), run, problem.forward, note=f"compiled in {seconds:.0f} s")

    def product() -> timing.Road:
        vector = torch.randn(problem.parameter_count, device=problem.device)
        found = compilation.compiled_product(problem, vector)
        return road(COMPILED["product"], lambda: found.run(vector), found.seconds)

    def whole() -> timing.Road:
        unit = torch.eye(problem.parameter_count, device=problem.device)
        found = compilation.compiled_in_chunks(problem, unit, probe=8)[1]
        return road(COMPILED["whole"], lambda: found.run(unit), found.seconds)

    def layers() -> timing.Road:
        found = []
        for direction in problem.directions.values():
            unit = torch.eye(sum(tensor.numel() for tensor in direction.values()), device=problem.device)
            found.append((unit, compilation.compiled_in_chunks(problem, unit, list(direction), probe=8)[1]))
        seconds = sum(compiled.seconds for _, compiled in found)
        return road(COMPILED["layers"], lambda: [compiled.run(unit) for unit, compiled in found], seconds)

    made = {}
    notes: list[str] = []
    for key, make in zip(COMPILED.values(), (product, whole, layers), strict=True):
        roads, said = compilation.compiled_roads({_named(problem, key): make}, left_out=left_out)
        made |= dict.fromkeys([key] if roads else [], *roads)
        notes += said
    return made, notes


def _product_roads(problem: Problem, count: int) -> dict[str, Callable[[], Any]]:
    operator, vector = HessianOperator(problem.objective), torch.randn(count, device=problem.device)
    diagonal = operator.block_diagonal()
    roads: dict[str, Callable[[], Any]] = {
        **{road.name: road.run for road in eager_forward(problem)},
        "gradient by plain autograd": problem.forward_backward,
        PRODUCT: lambda: operator @ vector,
        "HessianOperator.block_diagonal() @ v": lambda: diagonal @ vector,
    }
    if peers.installed("curvlinops"):
        peer = peers.curvlinops_hessian(problem)
        roads["curvlinops, H @ v"] = lambda: peer @ vector
    return roads


def _whole_roads(problem: Problem, count: int) -> dict[str, Callable[[], Any]]:
    roads: dict[str, Callable[[], Any]] = {"HessianOperator.to_dense()": HessianOperator(problem.objective).to_dense}
    at_once = columns_that_fit(
        lambda columns: _jacobian_columns(problem, list(problem.state), columns), count, problem.device, probe=8
    )
    if at_once == count:
        roads["torch.func.hessian"] = lambda: _by_torch(problem, list(problem.state))
    else:
        roads["torch.func, vmap of jvp(jacrev) in chunks that fit"] = lambda: _by_torch(
            problem, list(problem.state), chunk_size=at_once
        )
    if peers.installed("curvlinops"):
        roads["curvlinops, H @ identity"] = peers.curvlinops_dense(problem, problem.parameters, probe=8)[1]
    return roads


def _layer_roads(problem: Problem) -> dict[str, Callable[[], Any]]:
    layers = list(problem.directions)
    entries = {layer: list(direction) for layer, direction in problem.directions.items()}
    operator = HessianOperator(problem.objective)
    blocks = [operator.block(layer) for layer in layers]
    roads: dict[str, Callable[[], Any]] = {
        "layer_hessian": lambda: [layer_hessian(problem.objective, None, layer) for layer in layers],
        "HessianOperator.block(layer).to_dense()": lambda: [block.to_dense() for block in blocks],
        "torch.func.hessian": lambda: [_by_torch(problem, names) for names in entries.values()],
    }
    if peers.installed("curvlinops"):
        dense = [
            peers.curvlinops_dense(problem, map(problem.model.get_parameter, names), probe=8)[1]
            for names in entries.values()
        ]
        roads["curvlinops, H @ identity"] = lambda: [run() for run in dense]
    return roads


def _loss_in(problem: Problem, names: Sequence[str]) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The loss as a function of some entries as one vector, and their values."""
    tensors = {name: problem.state[name] for name in names}
    sizes = [tensor.numel() for tensor in tensors.values()]
    x, y = problem.data

    def loss(vector: Tensor) -> Tensor:
        parts = zip(tensors.items(), vector.split(sizes), strict=True)
        point = {name: part.view(tensor.shape) for (name, tensor), part in parts}
        return F.cross_entropy(functional_call(problem.model, point, (x,)), y)

    return loss, torch.cat([tensor.flatten() for tensor in tensors.values()])


def _by_torch(problem: Problem, names: Sequence[str], chunk_size: int | None = None) -> Tensor:
    loss, values = _loss_in(problem, names)
    if chunk_size is None:
        return hessian(loss)(values)
    gradient, units = jacrev(loss), torch.eye(len(values), device=values.device, dtype=values.dtype)
    return vmap(lambda unit: jvp(gradient, (values,), (unit,))[1], chunk_size=chunk_size)(units)


def _jacobian_columns(problem: Problem, names: Sequence[str], columns: int) -> Tensor:
    """The first columns of the Hessian, as `torch.func.hessian` makes them."""
    loss, values = _loss_in(problem, names)

    def moved(part: Tensor) -> Tensor:
        return jacrev(loss)(torch.cat([part, values[columns:]]))

    return jacfwd(moved)(values[:columns])


def _rows(
    problem: Problem, roads: dict[tuple[str, str], timing.Road], found: Mapping[str, timing.Measurement]
) -> list[dict[str, Any]]:
    """The row of each road of one network."""
    exact = problem.to(torch.float64)
    reference = _by_torch(exact, list(exact.state))
    product = found[roads["product", PRODUCT].name].time
    rows = []
    for (kind, name), road in roads.items():
        measurement = found[road.name]
        failed = kind == "product" or measurement.result is None
        error = None if failed else _error(problem, measurement.result, reference)
        rows.append(
            {
                **road_row(measurement, problem, error=error),
                "parameters": len(reference),
                "kind": kind,
                "road": name,
                "in_products": measurement.time.over(product).median,
            }
        )
    return rows


def _error(problem: Problem, result: Tensor | list[Tensor], reference: Tensor) -> float:
    """The largest relative error, of the matrix or of any layer's block."""
    if isinstance(result, Tensor):
        return relative_error(result, reference)
    sizes = [sum(tensor.numel() for tensor in direction.values()) for direction in problem.directions.values()]
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    return max(
        relative_error(block, reference[start:stop, start:stop])
        for block, start, stop in zip(result, ends[:-1], ends[1:], strict=True)
    )


if __name__ == "__main__":
    main()
