"""Convolutions, together with the rectifiers that follow them, perhaps after a sum.

On a processor a pass over the tangents of an image costs a good part of a convolution. Where a rectifier reads one, or
its sum with something else, and nobody else does, tangents are written once: oneDNN adds and multiplies as it stores.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lmc_curvature.curvature.sweep.capture import value_of
from lmc_curvature.curvature.sweep.rules.bilinear import Bilinear
from lmc_curvature.curvature.sweep.rules.rule import OpCall, Tangents

aten = torch.ops.aten
# Absent where torch was built without oneDNN.
_POINTWISE: Any = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)


class Convolution(Bilinear):
    """A convolution of any kind, linear in its input, its weight and its bias."""

    def push(self, call: OpCall) -> Tangents:
        """Tangents of the convolution alone."""
        return self.push_through(call, {}, None)

    def push_through(self, call: OpCall, added: Tangents, slope: Tensor | None) -> Tangents:
        """Tangents of slope · (convolution + something else).

        Args:
            call: The convolution.
            added: Tangents of what is added.
            slope: What the sum is multiplied by, elementwise; None for one.
        """
        inputs, weights, biases = (call.tangents_of(argument) for argument in call.node.args[:3])
        settings = call.node.args[3:]
        tangents = {}
        for i in sorted({*inputs, *weights, *biases, *added}):
            terms: list[tuple[Tensor, Tensor, Tensor | None]] = []
            if i in inputs:
                terms.append((inputs[i], call.value(1), None))
            if i in weights:
                terms.append((call.value(0), weights[i], biases.get(i)))
            total = added.get(i)
            if i in biases and i not in weights:
                bias = biases[i].view(1, -1, *(1,) * (call.output.ndim - 2)).expand(call.output.shape)
                total = bias if total is None else total + bias
            if total is None and len(terms) == 1:
                tangents[i] = _convolve(*terms[0], settings, times=slope)
                continue
            for term in terms:
                total = _convolve(*term, settings, plus=total)
            if slope is not None and total is not None:
                # In place only what was made here.
                total = total.mul_(slope) if terms else total * slope
            tangents[i] = total
        return tangents


def _convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    settings: Any,
    *,
    plus: Tensor | None = None,
    times: Tensor | None = None,
) -> Tensor:
    """A new tensor: the convolution, and something of its shape added or multiplied."""
    other = times if plus is None else plus
    if other is None or not _fuses(input, settings):
        found = aten.convolution.default(input, weight, bias, *settings)
        if plus is not None:
            found += plus
        return found if times is None else found.mul_(times)
    stride, padding, dilation, _, _, groups = settings
    kind = "add" if times is None else "mul"
    # oneDNN reads a bias as if its numbers were neighbours.
    bias = None if bias is None else bias.contiguous()
    return _POINTWISE.binary(input, other, weight, bias, padding, stride, dilation, groups, kind, None, None, [], None)


def _fuses(input: Tensor, settings: Any) -> bool:
    """Whether oneDNN has the convolution, of a batch of images, with something to follow it as it stores."""
    return (
        _POINTWISE is not None
        and input.device.type == "cpu"
        and input.dtype == torch.float32
        and input.ndim == 4
        and not settings[3]
        and bool(torch.backends.mkldnn.enabled)
    )


def _gradient(call: OpCall, g: Tensor, input: Tensor, weight: Tensor, needed: list[bool]) -> Any:
    return aten.convolution_backward.default(g, input, weight, None, *call.node.args[3:], needed)


CONVOLUTION = Convolution(
    0,
    1,
    lambda call, a, b: _convolve(a, b, None, call.node.args[3:]),
    lambda call, g, weight: _gradient(call, g, call.value(0), weight, [True, False, False])[0],
    lambda call, g, input: _gradient(call, g, input, call.value(1), [False, True, False])[1],
)


@dataclass(frozen=True)
class Rectified:
    """A rectifier and the convolution that it alone reads, perhaps through a sum that it alone reads.

    Attributes:
        convolution: The convolution.
        added: What is added to it, if anything.
        inner: The nodes before the rectifier, whose tangents nobody else asks for.
    """

    convolution: fx.Node
    added: fx.Node | None
    inner: tuple[fx.Node, ...]

    @classmethod
    def at(cls, node: fx.Node, convolutions: Collection[fx.Node]) -> "Rectified | None":
        """What ends with a node; None if that is nothing of the kind."""
        if node.target is not aten.relu.default:
            return None
        (before,) = node.all_input_nodes
        if len(before.users) > 1:
            return None
        if before in convolutions:
            return cls(before, None, (before,))
        if before.target is aten.add.Tensor and not before.kwargs:
            first, second = before.args
            for convolution, added in ((first, second), (second, first)):
                if (
                    isinstance(convolution, fx.Node)
                    and isinstance(added, fx.Node)
                    and convolution in convolutions
                    and added is not convolution
                    and len(convolution.users) == 1
                    and _are_alike(value_of(convolution), value_of(added))
                ):
                    return cls(convolution, added, (convolution, before))
        return None

    def push(self, call: OpCall, output: Tensor) -> Tangents:
        """Tangents of the rectifier.

        Args:
            call: The convolution.
            output: The rectifier's value.
        """
        # One where the value is positive, in one pass over it; zero at zero, as torch has it.
        return CONVOLUTION.push_through(call, call.tangents_of(self.added), output.detach().sign())


def _are_alike(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and first.dtype == second.dtype
