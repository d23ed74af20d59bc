"""Softmax and its logarithm along an axis; x̄ = Σ p x is the mean of x under the softmax p."""

from collections.abc import Mapping

from torch import Tensor, fx

from lmc_curvature.curvature.sweep.rules.inner_products import weighted_gram
from lmc_curvature.curvature.sweep.rules.rule import Contributions, OpCall, Rule, Tangents


class _Centering(Rule):
    """What subtracts a mean from its tangents."""

    def copies(self, node: fx.Node, reached: Mapping[fx.Node, int]) -> dict[fx.Node, int]:
        """The centred tangents, their stack, and that times the weight."""
        (operand,) = node.all_input_nodes
        return {operand: 3 * reached[operand]}


class Softmax(_Centering):
    """y = softmax(x):  Dy[u] = y (u − ū),  ⟨g, D²y[u, v]⟩ = Σ (g − ḡ) y (u − ū)(v − v̄)."""

    def push(self, call: OpCall) -> Tangents:
        """Y (u − ū) for every tangent u."""
        y = call.output.detach()
        return {i: y * u for i, u in _centered(call, y).items()}

    def contract(self, call: OpCall, contributions: Contributions) -> None:
        """Add the Gram matrix of u − ū, weighted by (g − ḡ) y."""
        y, g = call.output.detach(), call.adjoint
        weight = (g - (y * g).sum(_axis(call), keepdim=True)) * y
        tangents = _centered(call, y)
        contributions.add(tangents, tangents, weighted_gram(weight, tangents) / 2)


class LogSoftmax(_Centering):
    """y = log softmax(x), p = softmax(x):  Dy[u] = u − ū,  ⟨g, D²y[u, v]⟩ = −(Σ g) Σ p (u − ū)(v − v̄)."""

    def push(self, call: OpCall) -> Tangents:
        """U − ū for every tangent u."""
        return _centered(call, call.output.detach().exp())

    def contract(self, call: OpCall, contributions: Contributions) -> None:
        """Add the Gram matrix of u − ū, weighted by −(Σ g) p."""
        p = call.output.detach().exp()
        weight = -call.adjoint.sum(_axis(call), keepdim=True) * p
        tangents = _centered(call, p)
        contributions.add(tangents, tangents, weighted_gram(weight, tangents) / 2)


def _axis(call: OpCall) -> int:
    return call.value(1)


def _centered(call: OpCall, weights: Tensor) -> dict[int, Tensor]:
    tangents = call.tangents_of(call.node.args[0])
    return {i: u - (weights * u).sum(_axis(call), keepdim=True) for i, u in tangents.items()}
