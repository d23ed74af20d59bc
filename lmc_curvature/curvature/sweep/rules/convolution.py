"""Convolutions of any kind."""

from collections.abc import Callable

import torch
from torch import Tensor

from lmc_curvature.curvature.sweep.rules.bilinear import Bilinear
from lmc_curvature.curvature.sweep.rules.rule import OpCall
from lmc_curvature.curvature.sweep.rules.stack import Stack, stacked, total, union

aten = torch.ops.aten


class Convolution(Bilinear):
    """A convolution, linear in its input, its weight and its bias."""

    def push(self, call: OpCall) -> Stack:
        """The convolution of all tangents of the input as one batch, and of the input with each of weight and bias."""
        inputs, weights, biases = (call.tangents_of(argument) for argument in call.node.args[:3])
        channels = (1, -1, *(1,) * (call.output.ndim - 2))
        terms = []
        if inputs is not None:
            found = _convolve(call, inputs.tensors.flatten(0, 1), call.value(1))
            terms.append(Stack(inputs.directions, found.unflatten(0, inputs.tensors.shape[:2]), is_own=True))
        joining: dict[int, Tensor] = {}
        for i in union([weights, biases]):
            weight, bias = (None if stack is None else stack.at(i) for stack in (weights, biases))
            if weight is not None:
                joining[i] = _convolve(call, call.value(0), weight, bias)
            elif bias is not None:
                joining[i] = bias.view(channels).expand(call.output.shape)
        if joining:
            terms.append(stacked(joining))
        return total(terms, call.output.shape)


def _convolve(call: OpCall, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return aten.convolution.default(input, weight, bias, *call.node.args[3:])


def _gradients(call: OpCall, g: Tensor, input: Tensor, weight: Tensor, place: int) -> Tensor:
    needed = [k == place for k in range(3)]
    return aten.convolution_backward.default(g, input, weight, None, *call.node.args[3:], needed)[place]


def _each(function: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
    return torch.stack([function(tangent) for tangent in stack]) if len(stack) > 1 else function(stack[0]).unsqueeze(0)


CONVOLUTION = Convolution(
    0,
    1,
    _convolve,
    lambda call, g, weights: _each(lambda weight: _gradients(call, g, call.value(0), weight, 0), weights),
    lambda call, g, inputs: _each(lambda input: _gradients(call, g, input, call.value(1), 1), inputs),
)
