"""Capture of a function of tensors as a graph of ATen operations, rewritten for the sweep.

Tracing runs the function once; what it does in place becomes functional, composite operations become their parts,
normalisation is written out, and scales and shifts per channel that follow a convolution move into its weight.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from lmc_curvature.curvature.sweep.capture.recorder import dependents, drop_unused, trace, value_of

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
    """Trace `function(*state, *data)` and split it into what the state alone decides, and the rest.

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
    module = trace(function, [tensor.detach() for tensor in (*state, *data)])
    graph = module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    given = placeholders[len(state) :]
    _allow_any_layout(graph)
    fold_channel_affine(graph, given)
    drop_unused(graph)
    return _split(module, placeholders[: len(state)], given)


def _allow_any_layout(graph: fx.Graph) -> None:
    # A view depends on the strides that values had when they were traced; tangents may lie otherwise in memory.
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


# --- Folding


def fold_channel_affine(graph: fx.Graph, data: Sequence[fx.Node]) -> None:
    """Move scales and shifts per channel that follow a convolution into its weight and bias.

        conv(x, w, b) · s + t  =  conv(x, w · s, b · s + t)

    This is what normalisation by running statistics comes to; a pass over the activations less for every tangent.
    It changes no derivative: the product w · s is an operation of the state like any other.
    """
    dependent = dependents(graph.nodes, data)
    for node in list(graph.nodes):
        if node.target is aten.mul.Tensor or (node.target is aten.add.Tensor and not node.kwargs):
            convolution, operand = _convolution_and_operand(node, dependent)
            if convolution is not None and operand is not None:
                kind = "scale" if node.target is aten.mul.Tensor else "shift"
                dependent.add(_fold(graph, node, convolution, **{kind: operand}))


def _convolution_and_operand(node: fx.Node, dependent: set[fx.Node]) -> tuple[fx.Node | None, fx.Node | None]:
    for convolution, operand in (node.args, reversed(node.args)):
        if not (isinstance(convolution, fx.Node) and isinstance(operand, fx.Node)):
            continue
        if (
            convolution.target is aten.convolution.default
            and convolution in dependent
            and len(convolution.users) == 1
            and not convolution.args[6]
            and convolution.args[1] not in dependent
            and operand not in dependent
            and _is_per_channel(operand, convolution)
        ):
            return convolution, operand
    return None, None


def _is_per_channel(operand: fx.Node, convolution: fx.Node) -> bool:
    shape, full = tuple(value_of(operand).shape), tuple(value_of(convolution).shape)
    return shape == (1, full[1]) + (1,) * (len(full) - 2)


def _fold(
    graph: fx.Graph,
    node: fx.Node,
    convolution: fx.Node,
    *,
    scale: fx.Node | None = None,
    shift: fx.Node | None = None,
) -> fx.Node:
    input, weight, bias, *settings = cast(tuple[Any, ...], convolution.args)
    channels = value_of(convolution).shape[1]
    with graph.inserting_before(node):
        if scale is not None:
            weight = _call(
                graph, aten.mul.Tensor, weight, _view(graph, scale, (-1,) + (1,) * (value_of(weight).ndim - 1))
            )
            if bias is not None:
                bias = _call(graph, aten.mul.Tensor, bias, _view(graph, scale, (channels,)))
        if shift is not None:
            shift = _view(graph, shift, (channels,))
            bias = shift if bias is None else _call(graph, aten.add.Tensor, bias, shift)
        folded = _call(graph, aten.convolution.default, input, weight, bias, *settings)
    node.replace_all_uses_with(folded)
    graph.erase_node(node)
    graph.erase_node(convolution)
    return folded


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta["val"] = target(*(_shape_alone(each) if isinstance(each, fx.Node) else each for each in args))
    return node


def _shape_alone(node: fx.Node) -> Tensor:
    value = value_of(node)
    return torch.empty(tuple(value.shape), dtype=value.dtype, device="meta")


def _view(graph: fx.Graph, node: fx.Node, shape: tuple[int, ...]) -> fx.Node:
    return _call(graph, aten.reshape.default, node, list(shape))
