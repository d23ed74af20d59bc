"""Softmax and its logarithm along an axis; x̄ = Σ p x is the mean of x under the softmax p."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx

from lmc_curvature.curvature.sweep.rules.inner_products import weighted_gram
from lmc_curvature.curvature.sweep.rules.rule import Contributions, OpCall, Rule
from lmc_curvature.curvature.sweep.rules.stack import Stack


class _Centering(Rule):
    """What subtracts a mean from its tangents, once for its own tangents and its curvature."""

    overwrites = True

    def copies(self, node: fx.Node, reached: Mapping[fx.Node, int], *, in_parts: bool) -> dict[fx.Node, int]:
        """The centred tangents times the weight; the centred ones themselves become those of the value."""
        (operand,) = node.all_input_nodes
        return {} if in_parts else {operand: reached[operand]}

    def push(self, call: OpCall) -> Stack | None:
        """Without curvature."""
        return self.sweep(replace(call, adjoint=None), Contributions())

    def contract(self, call: OpCall, contributions: Contributions) -> None:
        """Without the tangents."""
        self.sweep(replace(call, is_last=False), contributions)


class Softmax(_Centering):
    """y = softmax(x):  Dy[u] = y (u − ū),  ⟨g, D²y[u, v]⟩ = Σ (g − ḡ) y (u − ū)(v − v̄)."""

    def sweep(self, call: OpCall, contributions: Contributions) -> Stack:
        """Y (u − ū) for every tangent u, and the Gram matrix of u − ū, weighted by (g − ḡ) y."""
        y, g, centered = call.output.detach(), call.adjoint, _centered(call, call.output.detach())
        if g is not None:
            _add_gram(contributions, (g - (y * g).sum(_axis(call), keepdim=True)) * y, centered)
        return centered.times(y)


class LogSoftmax(_Centering):
    """y = log softmax(x), p = softmax(x):  Dy[u] = u − ū,  ⟨g, D²y[u, v]⟩ = −(Σ g) Σ p (u − ū)(v − v̄)."""

    def sweep(self, call: OpCall, contributions: Contributions) -> Stack:
        """U − ū for every tangent u, and the Gram matrix of u − ū, weighted by −(Σ g) p."""
        p = call.output.detach().exp()
        centered = _centered(call, p)
        if call.adjoint is not None:
            _add_gram(contributions, -call.adjoint.sum(_axis(call), keepdim=True) * p, centered)
        return centered


def _axis(call: OpCall) -> int:
    """The axis, counted from the last one, as it is in a stack, too."""
    axis = call.value(1)
    return axis - call.output.ndim if axis >= 0 and call.output.ndim else axis


def _centered(call: OpCall, p: Tensor) -> Stack:
    stack = call.moved(0)
    u = stack.tensors
    if not p.ndim:
        mean = p * u
    elif _axis(call) == -1:
        # As products of a matrix and a vector, without p · u in memory.
        mean = torch.einsum("k...v,...v->k...", u, p).unsqueeze(-1)
    else:
        mean = (p * u).sum(_axis(call), keepdim=True)
    return Stack(stack.directions, u.sub_(mean) if stack.is_own else u - mean, is_own=True)


def _add_gram(contributions: Contributions, weight: Tensor, stack: Stack) -> None:
    contributions.add(stack.directions, stack.directions, weighted_gram(weight, stack.tensors) / 2)
