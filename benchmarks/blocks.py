"""What does the dense Hessian of a network's last linear layer cost, over some batches of data?

python -m benchmarks.blocks [--network resnet18] [--device cuda] [--profile] [--quick]
"""

import argparse
import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian

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
from benchmarks.support.peers import curvlinops_columns, curvlinops_hessian, installed, layouts, missing_peers
from benchmarks.support.problems import Problem, image_problem
from benchmarks.support.profiling import add_profile, profile_table
from benchmarks.support.timing import Measurement, Road, Run, measure
from lmc_curvature import HessianOperator
from lmc_curvature.curvature.blocks import layer_hessian

OURS = "layer_hessian"
TORCH = "torch.func.hessian"
ALONE = ", from the layer's inputs"

SIZES = {
    "full": {"network": "resnet20", "batch": 250, "batches": 4, "width": 16, "pixels": 32},
    "quick": {"network": "resnet20", "batch": 50, "batches": 2, "width": 16, "pixels": 32},
    "smoke": {"network": "resnet8", "batch": 5, "batches": 2, "width": 4, "pixels": 8},
}


def main(argv: Sequence[str] | None = None) -> Report:
    """Parse, measure, print and write."""
    options = parse_options(__file__, __doc__, argv, _add_options)
    size = chosen_size(options, SIZES)
    problem = image_problem(**size, device=options.device)
    layer, linear = _last_linear(problem.model)
    name = "blocks" if size["network"] == "resnet20" else f"blocks-{size['network']}"
    report = Report(name, "What does a layer's dense Hessian cost?", setting(options, **size, dtype="float32"))
    report.setting["parameters"] = sum(parameter.numel() for parameter in linear.parameters())
    report.notes += [*missing_peers(), *_notes()]

    alone = _layer_alone(problem, layer, linear)
    roads = [
        *block_roads(problem, layer, problem.forward, both_layouts=options.size == "full"),
        *block_roads(alone, "linear", problem.forward, ALONE),
    ]
    found = measure(roads, options.pace, options.device)
    gradient_peak = peak_bytes(problem.forward_backward, options.device)
    reference = HessianOperator(problem.to(torch.float64).objective).block(layer).to_dense()
    for name, title, chosen in (
        ("roads", "The dense Hessian of the last linear layer", [name for name in found if ALONE not in name]),
        ("alone", "The same from the layer's inputs, computed before", [name for name in found if ALONE in name]),
    ):
        rows = [_row(found[road], gradient_peak, reference) for road in chosen]
        report.tables.append(Table(name, title, ROAD_COLUMNS, rows))
    report.bars += [*_bars(found, ""), *_bars(found, ALONE)]
    if options.profile:
        report.tables.append(profile_table(OURS, lambda: layer_hessian(problem.objective, None, layer), options.device))
    ours = [name for name in found if not name.startswith((TORCH, "curvlinops"))]
    return publish(report, options, draw_roads(found, ours, "forward passes of the network over all examples"))


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_network(parser)
    add_profile(parser)


def _notes() -> list[str]:
    return [
        "F is one forward pass over all batches; peaks have one gradient on one batch as their unit.",
        "Errors are max |H − H₆₄| / max |H₆₄|, against products with unit vectors in float64.",
        "torch.func.hessian differentiates the loss in that layer's parameters, batch by batch; so does curvlinops.",
        "Every road to the first table's Hessian needs the layer's inputs, which are a forward pass, 1 F.",
    ]


def _last_linear(model: nn.Module) -> tuple[str, nn.Linear]:
    """Name of the last linear layer, and the module."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]


def _layer_alone(problem: Problem, layer: str, linear: nn.Linear) -> Problem:
    """The layer as a network of its own, on the inputs that it has in the network."""
    inputs: list[Tensor] = []
    handle = linear.register_forward_hook(lambda module, args, output: inputs.append(args[0].detach()))
    problem.forward()
    handle.remove()
    batches = [(x, y) for x, (_, y) in zip(inputs, problem.batches, strict=True)]
    model, other = (
        nn.Sequential(OrderedDict(linear=module)) for module in (linear, problem.other.get_submodule(layer))
    )
    return Problem(model, other, batches)


def block_roads(
    problem: Problem, layer: str, forward: Run, suffix: str = "", *, both_layouts: bool = False
) -> list[Road]:
    """Roads to the dense block of a linear layer, rows and columns in the order weight, bias."""
    block = HessianOperator(problem.objective).block(layer)
    roads: dict[str, Callable[[], Any]] = {
        OURS: lambda: layer_hessian(problem.objective, None, layer),
        "the same, method='products'": lambda: layer_hessian(problem.objective, None, layer, method="products"),
        "HessianOperator.block(layer).to_dense()": block.to_dense,
    }
    for layout, chosen in layouts(problem, both=both_layouts).items():
        roads[f"{TORCH}{layout}"] = functools.partial(_by_torch, chosen, layer)
        if installed("curvlinops"):
            name, run = _curvlinops_road(chosen, layer)
            roads[f"{name}{layout}"] = run
    return [Road(name + suffix, run, forward) for name, run in roads.items()]


def _curvlinops_road(problem: Problem, layer: str) -> tuple[str, Callable[[], Tensor]]:
    parameters = list(problem.model.get_submodule(layer).parameters())
    operator = curvlinops_hessian(problem, parameters)
    unit = torch.eye(sum(parameter.numel() for parameter in parameters), device=problem.device)
    at_once = columns_that_fit(
        lambda count: curvlinops_columns(operator, unit[:count], count), len(unit), problem.device, probe=16
    )
    return f"curvlinops, H @ identity, {at_once} columns at once", lambda: curvlinops_columns(operator, unit, at_once)


def _by_torch(problem: Problem, layer: str) -> Tensor:
    names = [f"{layer}.{name}" for name, _ in problem.model.get_submodule(layer).named_parameters()]
    parameters = {name: problem.model.get_parameter(name).detach() for name in names}
    total = None
    for x, y in problem.batches:
        blocks: Any = hessian(lambda point, x=x, y=y: F.cross_entropy(functional_call(problem.model, point, (x,)), y))(
            parameters
        )
        sizes = [parameters[name].numel() for name in names]
        rows = [
            torch.cat([blocks[a][b].reshape(size, -1) for b in names], dim=1)
            for a, size in zip(names, sizes, strict=True)
        ]
        found = torch.cat(rows) * (len(x) / problem.examples)
        total = found if total is None else total + found
    if total is None:
        raise ValueError("There is no batch.")
    return total


def _row(measurement: Measurement, gradient_peak: float, reference: Tensor) -> dict[str, Any]:
    error = None if measurement.failure else relative_error(measurement.result, reference)
    return road_row(measurement, gradient_peak=gradient_peak, error=error)


def _bars(found: dict[str, Measurement], suffix: str) -> list[Bar]:
    ours = found[OURS + suffix].in_forwards
    return [
        Bar(f"{name} / ours", measurement.in_forwards.over(ours), "at least", 5)
        for name, measurement in found.items()
        if name.startswith((TORCH, "curvlinops")) and measurement.multiples and (ALONE in name) == bool(suffix)
    ]


if __name__ == "__main__":
    main()
