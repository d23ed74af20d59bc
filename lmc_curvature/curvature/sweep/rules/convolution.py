"""Convolutions of any kind."""

from typing import Any

import torch
from torch import Tensor

from lmc_curvature.curvature.sweep.rules.bilinear import Bilinear
from lmc_curvature.curvature.sweep.rules.rule import OpCall, Tangents

aten = torch.ops.aten


class Convolution(Bilinear):
    """A convolution, linear in its input, its weight and its bias."""

    def push(self, call: OpCall) -> Tangents:
        """Convolutions of each tangent of the input, and of the input with each of weight and bias, as new tensors."""
        inputs, weights, biases = (call.tangents_of(argument) for argument in call.node.args[:3])
        tangents: Tangents = {i: _convolve(call, tangent, call.value(1)) for i, tangent in inputs.items()}
        for i in {*weights, *biases}:
            if i in weights:
                term = _convolve(call, call.value(0), weights[i], biases.get(i))
            else:
                term = torch.zeros_like(call.output) + biases[i].view(1, -1, *(1,) * (call.output.ndim - 2))
            # In place, because it was made here.
            tangents[i] = tangents[i].add_(term) if i in tangents else term
        return tangents


def _convolve(call: OpCall, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return aten.convolution.default(input, weight, bias, *call.node.args[3:])


def _gradient(call: OpCall, g: Tensor, input: Tensor, weight: Tensor, needed: list[bool]) -> Any:
    return aten.convolution_backward.default(g, input, weight, None, *call.node.args[3:], needed)


CONVOLUTION = Convolution(
    0,
    1,
    _convolve,
    lambda call, g, weight: _gradient(call, g, call.value(0), weight, [True, False, False])[0],
    lambda call, g, input: _gradient(call, g, input, call.value(1), [False, True, False])[1],
)
