"""Cost of the dense Hessian of a network's last linear layer, over some batches of data.

`layer_hessian` by structure and by products, `torch.func.hessian` of the loss in that layer's parameters, and
curvlinops' operator for those parameters times the identity.

    python -m benchmarks.blocks [--network resnet18] [--device cuda] [--profile] [--quick]
"""

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian

from benchmarks.support import options, peers, profiling, timing
from benchmarks.support.charts import draw_roads
from benchmarks.support.problems import Problem, image_problem
from benchmarks.support.report import Bar, Report, new_report, publish
from benchmarks.support.roads import eager_forward, relative_error, road_rows
from lmc_curvature import HessianOperator, layer_hessian

OURS = "layer_hessian"
TORCH = "torch.func.hessian"
ALONE = ", from the layer's inputs"

SIZES = {
    "full": {"network": "resnet20", "batch": 250, "batches": 4, "width": 16, "pixels": 32},
    "quick": {"network": "resnet20", "batch": 50, "batches": 2, "width": 16, "pixels": 32},
    "smoke": {"network": "resnet8", "batch": 5, "batches": 2, "width": 4, "pixels": 8},
}
NOTES = (
    "F is one forward pass over all batches; peaks have one gradient on one batch as their unit.",
    "Errors are max |H − H₆₄| / max |H₆₄|, against products with unit vectors in float64.",
    "torch.func.hessian differentiates the loss in that layer's parameters, batch by batch; so does curvlinops.",
    "Every road to the first table's Hessian needs the layer's inputs, which are a forward pass, 1 F.",
)


def main(argv: Sequence[str] | None = None) -> Report:
    """Parse, measure, print and write."""
    chosen = options.parse_options(__file__, __doc__, argv, options.add_network, profiling.add_profile)
    size = options.chosen_size(chosen, SIZES)
    problem = image_problem(**size, device=chosen.device)
    layer, linear = _last_linear(problem.model)
    parameters = sum(parameter.numel() for parameter in linear.parameters())
    report = new_report(
        chosen,
        "What does a layer's dense Hessian cost?",
        [*peers.missing_peers(), *NOTES],
        **size,
        parameters=parameters,
        dtype="float32",
    )
    alone = _layer_alone(problem, layer, linear)
    whole_roads = [*block_roads(problem, layer, problem, both_layouts=chosen.size == "full"), *eager_forward(problem)]
    alone_roads = block_roads(alone, "linear", problem, ALONE)
    found = timing.measure([*whole_roads, *alone_roads], chosen.pace, chosen.device)
    reference = HessianOperator(problem.to(torch.float64).objective).block(layer).to_dense()
    errors = {
        name: relative_error(measurement.result, reference)
        for name, measurement in found.items()
        if isinstance(measurement.result, Tensor)
    }
    report.add("roads", "The dense Hessian of the last linear layer", road_rows(whole_roads, found, problem, errors))
    title = "The same from the layer's inputs, computed before"
    report.add("alone", title, road_rows(alone_roads, found, problem, errors))
    report.bars += [*_bars(found, ""), *_bars(found, ALONE)]
    if chosen.profile:
        report.tables.append(
            profiling.profile_table(OURS, lambda: layer_hessian(problem.objective, None, layer), chosen.device)
        )
    ours = [name for name in found if not name.startswith((TORCH, "curvlinops"))]
    return publish(report, chosen, draw_roads(found, ours, "forward passes of the network over all examples"))


def _last_linear(model: nn.Module) -> tuple[str, nn.Linear]:
    """Name of the last linear layer, and the module."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]


def _layer_alone(problem: Problem, layer: str, linear: nn.Linear) -> Problem:
    """The layer as a network of its own, on the inputs that it has in the network."""
    inputs: list[Tensor] = []
    handle = linear.register_forward_hook(lambda module, args, output: inputs.append(args[0].detach()))
    # Launched, for a replayed graph calls no hooks.
    problem.eager_forward()
    handle.remove()
    batches = [(x, y) for x, (_, y) in zip(inputs, problem.batches, strict=True)]
    model, other = (
        nn.Sequential(OrderedDict(linear=module)) for module in (linear, problem.other.get_submodule(layer))
    )
    return Problem(model, other, batches)


def block_roads(
    problem: Problem, layer: str, unit: Problem, suffix: str = "", *, both_layouts: bool = False
) -> list[timing.Road]:
    """Roads to the dense block of a linear layer, rows and columns in the order weight, bias.

    Args:
        problem: The network.
        layer: Name of the layer in it.
        unit: The problem whose forward pass is F.
        suffix: End of the roads' names.
        both_layouts: True to let others compute with channels-last images, too.
    """
    block = HessianOperator(problem.objective).block(layer)
    roads: dict[str, Callable[[], Any]] = {
        OURS: lambda: layer_hessian(problem.objective, None, layer),
        "the same, method='products'": lambda: layer_hessian(problem.objective, None, layer, method="products"),
        "HessianOperator.block(layer).to_dense()": block.to_dense,
    }
    for layout, laid_out in peers.layouts(problem, both=both_layouts).items():
        roads[f"{TORCH}{layout}"] = functools.partial(_by_torch, laid_out, layer)
        if peers.installed("curvlinops"):
            at_once, run = peers.curvlinops_dense(laid_out, laid_out.model.get_submodule(layer).parameters(), probe=16)
            roads[f"curvlinops, H @ identity, {at_once} columns at once{layout}"] = run
    return [timing.Road(name + suffix, run, unit.forward) for name, run in roads.items()]


def _by_torch(problem: Problem, layer: str) -> Tensor:
    names = [f"{layer}.{name}" for name, _ in problem.model.get_submodule(layer).named_parameters()]
    parameters = {name: problem.model.get_parameter(name).detach() for name in names}
    sizes = [parameters[name].numel() for name in names]
    total = torch.zeros(sum(sizes), sum(sizes), device=problem.device)
    for x, y in problem.batches:
        blocks: Any = hessian(lambda point, x=x, y=y: F.cross_entropy(functional_call(problem.model, point, (x,)), y))(
            parameters
        )
        rows = [
            torch.cat([blocks[a][b].reshape(size, -1) for b in names], dim=1)
            for a, size in zip(names, sizes, strict=True)
        ]
        total += torch.cat(rows) * (len(x) / problem.examples)
    return total


def _bars(found: Mapping[str, timing.Measurement], suffix: str) -> list[Bar]:
    ours = found[OURS + suffix].in_forwards
    return [
        Bar(f"{name} / ours", measurement.in_forwards.over(ours), "at least", 5)
        for name, measurement in found.items()
        if name.startswith((TORCH, "curvlinops")) and measurement.multiples and (ALONE in name) == bool(suffix)
    ]


if __name__ == "__main__":
    main()
