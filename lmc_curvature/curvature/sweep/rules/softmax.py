"""Softmax and its logarithm along an axis; x̄ = Σ p x is the mean of x under the softmax p."""

from collections.abc import Mapping

from torch import Tensor, fx

from lmc_curvature.curvature.sweep.rules.inner_products import weighted_gram
from lmc_curvature.curvature.sweep.rules.rule import Contributions, OpCall, Rule
from lmc_curvature.curvature.sweep.rules.stack import Stack


class _Centering(Rule):
    """What subtracts a mean from its tangents."""

    def copies(self, node: fx.Node, reached: Mapping[fx.Node, int]) -> dict[fx.Node, int]:
        """The centred tangents, their stack, and that times the weight."""
        (operand,) = node.all_input_nodes
        return {operand: 3 * reached[operand]}


class Softmax(_Centering):
    """y = softmax(x):  Dy[u] = y (u − ū),  ⟨g, D²y[u, v]⟩ = Σ (g − ḡ) y (u − ū)(v − v̄)."""

    def push(self, call: OpCall) -> Stack:
        """Y (u − ū) for every tangent u."""
        y = call.output.detach()
        centered = _centered(call, y)
        return Stack(centered.directions, centered.tensors.mul_(y))

    def contract(self, call: OpCall, contributions: Contributions) -> None:
        """Add the Gram matrix of u − ū, weighted by (g − ḡ) y."""
        y, g = call.output.detach(), call.adjoint
        weight = (g - (y * g).sum(_axis(call), keepdim=True)) * y
        _add_gram(contributions, weight, _centered(call, y))


class LogSoftmax(_Centering):
    """y = log softmax(x), p = softmax(x):  Dy[u] = u − ū,  ⟨g, D²y[u, v]⟩ = −(Σ g) Σ p (u − ū)(v − v̄)."""

    def push(self, call: OpCall) -> Stack:
        """U − ū for every tangent u."""
        return _centered(call, call.output.detach().exp())

    def contract(self, call: OpCall, contributions: Contributions) -> None:
        """Add the Gram matrix of u − ū, weighted by −(Σ g) p."""
        p = call.output.detach().exp()
        _add_gram(contributions, -call.adjoint.sum(_axis(call), keepdim=True) * p, _centered(call, p))


def _axis(call: OpCall) -> int:
    """The axis, counted from the last one, as it is in a stack, too."""
    axis = call.value(1)
    return axis - call.output.ndim if axis >= 0 and call.output.ndim else axis


def _centered(call: OpCall, weights: Tensor) -> Stack:
    stack = call.moved(0)
    u = stack.tensors
    if not weights.ndim:
        return Stack(stack.directions, u - weights * u)
    return Stack(stack.directions, u - (weights * u).sum(_axis(call), keepdim=True))


def _add_gram(contributions: Contributions, weight: Tensor, stack: Stack) -> None:
    contributions.add(stack.directions, stack.directions, weighted_gram(weight, stack.tensors) / 2)
