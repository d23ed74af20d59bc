"""Capture of a function of tensors as a graph of ATen operations, rewritten for the sweep.

The function is run once; what it does in place becomes functional, composite operations become their parts,
normalisation is written out, and scales and shifts per channel that follow a convolution move into its weight.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lmc_curvature.curvature.sweep.capture.folding import fold_channel_affine
from lmc_curvature.curvature.sweep.capture.nodes import dependents, drop_unused
from lmc_curvature.curvature.sweep.capture.recorder import record

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Stage:
    """A part of a captured graph: operations that turn inputs into outputs.

    Attributes:
        module: The captured graph, which holds its constants.
        inputs: Nodes whose values are given: placeholders, or results of an earlier stage.
        operations: Nodes to evaluate, in order.
        outputs: Nodes whose values a later stage needs; an input may be among them.
    """

    module: fx.GraphModule
    inputs: tuple[fx.Node, ...]
    operations: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]

    def constant(self, node: fx.Node) -> Any:
        """Value of a node that reads a constant of the graph."""
        return getattr(self.module, str(node.target))


def capture(function: Callable[..., Tensor], state: Sequence[Tensor], data: Sequence[Tensor]) -> tuple[Stage, Stage]:
    """Record `function(*state, *data)` and split it into what the state alone decides, and the rest.

    Args:
        function: Returns one tensor.
        state: Example values of the first arguments.
        data: Example values of the others; the graph holds for their shapes.

    Returns:
        The stage from the state to the operands of the network (folded weights, say), and the stage from those and
        the data to the result. Both list their inputs in the order given, the second one operands first.

    Raises:
        CaptureError: The function does something that depends on values, not only on shapes; says what and where.
    """
    module = record(function, [tensor.detach() for tensor in (*state, *data)])
    graph = module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    given = placeholders[len(state) :]
    _allow_any_layout(graph)
    fold_channel_affine(graph, given)
    drop_unused(graph)
    return _split(module, placeholders[: len(state)], given)


def _allow_any_layout(graph: fx.Graph) -> None:
    # A view depends on the strides that values had when they were recorded; tangents may lie otherwise in memory.
    for node in graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default


def _split(module: fx.GraphModule, state: list[fx.Node], data: list[fx.Node]) -> tuple[Stage, Stage]:
    dependent = dependents(module.graph.nodes, data)
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    operations = [node for node in module.graph.nodes if node.op in ("call_function", "get_attr")]
    first = [node for node in operations if node not in dependent]
    second = [node for node in operations if node in dependent]
    result = output.args[0]
    assert isinstance(result, fx.Node)
    read = {operand for node in second for operand in node.all_input_nodes} | {result}
    operands = tuple(node for node in (*state, *first) if node in read)
    return (
        Stage(module, tuple(state), tuple(first), operands),
        Stage(module, (*operands, *data), tuple(second), (result,)),
    )
