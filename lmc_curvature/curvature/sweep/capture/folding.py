"""Scales and shifts per channel that follow a convolution, moved into its weight and bias."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from lmc_curvature.curvature.sweep.capture.nodes import dependents, value_of

aten = torch.ops.aten


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
