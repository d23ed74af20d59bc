"""From how many parameters on are Hessian-vector products the better bargain, and what does the dense Hessian cost?

Perceptrons of growing width. The whole Hessian and the layers' own blocks, by products and dense.

    python -m benchmarks.hvp_vs_exact [--device cuda] [--quick]
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp, vmap

from benchmarks.support.charts import Line, Panel, draw_panels, fitted_exponent
from benchmarks.support.harness import Column, Report, Table, parse_options, publish, relative_error, road_row, setting
from benchmarks.support.memory import columns_that_fit, peak_bytes
from benchmarks.support.peers import curvlinops_columns, curvlinops_hessian, installed, missing_peers
from benchmarks.support.problems import Problem, mlp_problem
from benchmarks.support.timing import Measurement, Road, measure
from lmc_curvature import HessianOperator
from lmc_curvature.curvature.blocks import layer_hessian

# Hidden widths, for 114, 330, 1,045, 3,138 and 10,090 parameters.
WIDTHS = {"full": (4, 10, 23, 46, 90), "quick": (4, 10, 23), "smoke": (2, 4)}
EXAMPLES = {"full": 100, "quick": 50, "smoke": 10}

COLUMNS = (
    Column("parameters", "parameters"),
    Column("road", "road"),
    Column("ms", "ms [quartiles]"),
    Column("F", "F [quartiles]"),
    Column("products", "in products"),
    Column("peak_mib", "peak, MiB"),
    Column("peak_gradients", "peak / gradient's", 2),
    Column("error", "error", 2),
    Column("samples", "samples"),
    Column("note", "note"),
)

PRODUCT = "HessianOperator @ v"
KINDS = ("product", "whole", "layers")


def main(argv: Sequence[str] | None = None) -> Report:
    """Parse, measure, print and write."""
    options = parse_options(__file__, __doc__, argv)
    examples = EXAMPLES[options.size]
    problems = [mlp_problem(width, examples, device=options.device) for width in WIDTHS[options.size]]
    report = Report(
        "hvp_vs_exact",
        "What does a dense Hessian cost, in Hessian-vector products?",
        setting(options, network="perceptron of three linear layers", examples=examples, dtype="float32"),
    )
    report.notes += [*missing_peers(), *_notes()]
    roads = {problem: roads_of(problem) for problem in problems}
    found = measure([road for kinds in roads.values() for road in kinds.values()], options.pace, options.device)
    rows = [row for problem in problems for row in _rows(problem, roads[problem], found)]
    for kind, title in zip(
        KINDS, ("One product", "The whole Hessian, dense", "All layers' own blocks, dense"), strict=True
    ):
        report.tables.append(Table(kind, title, COLUMNS, [row for row in rows if row["kind"] == kind]))
    curves = _curves(rows)
    report.tables.append(_exponents(curves))
    return publish(report, options, draw_panels(curves))


def _notes() -> list[str]:
    return [
        "F of networks this small is mostly overhead, so times in milliseconds say more here.",
        "In products: the time over that of one HessianOperator @ v on the same network.",
        "Errors are max |H − H₆₄| / max |H₆₄|, against torch.func.hessian in float64.",
        "Peaks are over what was allocated before the call; the unit is the peak of one gradient by plain autograd.",
    ]


def roads_of(problem: Problem) -> dict[tuple[str, str], Road]:
    """Kind and name, to the roads for one network; road names also hold the number of parameters."""
    count = sum(parameter.numel() for parameter in problem.parameters)
    runs = {
        **{("product", name): run for name, run in _product_roads(problem, count).items()},
        **{("whole", name): run for name, run in _whole_roads(problem, count).items()},
        **{("layers", name): run for name, run in _layer_roads(problem).items()},
    }
    return {key: Road(f"{key[0]}: {key[1]} ({count})", run, problem.forward) for key, run in runs.items()}


def _product_roads(problem: Problem, count: int) -> dict[str, Callable[[], Any]]:
    operator, vector = HessianOperator(problem.objective), torch.randn(count, device=problem.device)
    diagonal = operator.block_diagonal()
    roads: dict[str, Callable[[], Any]] = {
        "gradient by plain autograd": problem.forward_backward,
        PRODUCT: lambda: operator @ vector,
        "HessianOperator.block_diagonal() @ v": lambda: diagonal @ vector,
    }
    if installed("curvlinops"):
        peer = curvlinops_hessian(problem)
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
    if installed("curvlinops"):
        roads["curvlinops, H @ identity"] = _curvlinops_dense(problem, problem.parameters)
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
    if installed("curvlinops"):
        dense = [
            _curvlinops_dense(problem, [problem.model.get_parameter(name) for name in names])
            for names in entries.values()
        ]
        roads["curvlinops, H @ identity"] = lambda: [run() for run in dense]
    return roads


def _curvlinops_dense(problem: Problem, parameters: Sequence[nn.Parameter]) -> Callable[[], Tensor]:
    peer = curvlinops_hessian(problem, parameters)
    unit = torch.eye(sum(parameter.numel() for parameter in parameters), device=problem.device)
    at_once = columns_that_fit(
        lambda columns: curvlinops_columns(peer, unit[:columns], columns), len(unit), problem.device, probe=8
    )
    return lambda: curvlinops_columns(peer, unit, at_once)


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
    """As many columns of the Hessian, as `torch.func.hessian` makes them."""
    loss, values = _loss_in(problem, names)

    def moved(part: Tensor) -> Tensor:
        return jacrev(loss)(torch.cat([part, values[columns:]]))

    return jacfwd(moved)(values[:columns])


def _rows(problem: Problem, roads: dict[tuple[str, str], Road], found: dict[str, Measurement]) -> list[dict[str, Any]]:
    """A row a road of one network."""
    exact = problem.to(torch.float64)
    reference = _by_torch(exact, list(exact.state))
    gradient_peak = peak_bytes(problem.forward_backward, problem.device)
    product = found[roads["product", PRODUCT].name].time
    rows = []
    for (kind, name), road in roads.items():
        measurement = found[road.name]
        error = None if kind == "product" or measurement.failure else _error(problem, measurement.result, reference)
        rows.append(
            {
                **road_row(measurement, gradient_peak=gradient_peak, error=error),
                "parameters": len(reference),
                "kind": kind,
                "road": name,
                "products": measurement.time.over(product).median,
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


def _curves(rows: Sequence[dict[str, Any]]) -> list[Panel]:
    """A panel a kind, a curve a road, over the number of parameters."""
    panels = []
    for kind, title in zip(KINDS, ("one product", "whole Hessian", "all layers' blocks"), strict=True):
        names = dict.fromkeys(row["road"] for row in rows if row["kind"] == kind)
        lines = []
        for name in names:
            chosen = [row for row in rows if (row["kind"], row["road"]) == (kind, name) and row["samples"]]
            xs, ys = [row["parameters"] for row in chosen], [row["ms"] for row in chosen]
            exponent = fitted_exponent(xs, [y.median for y in ys]) if len(xs) > 1 else None
            lines.append(Line(name, xs, ys, exponent))
        panels.append(Panel(title, "parameters", "milliseconds", lines))
    return panels


def _exponents(panels: Sequence[Panel]) -> Table:
    """The fitted growth of every road's time with the number of parameters."""
    rows = [
        {"kind": panel.title, "road": line.label, "exponent": line.exponent}
        for panel in panels
        for line in panel.lines
        if line.exponent is not None
    ]
    columns = (Column("kind", "what"), Column("road", "road"), Column("exponent", "exponent of time in parameters"))
    return Table("exponents", "Growth, by least squares on logarithms", columns, rows)


if __name__ == "__main__":
    main()
