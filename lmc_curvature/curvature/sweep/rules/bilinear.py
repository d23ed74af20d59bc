"""Operations that are linear in each of two arguments."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lmc_curvature.curvature.sweep.rules.inner_products import gram, inner_with_each
from lmc_curvature.curvature.sweep.rules.rule import Contributions, OpCall, Rule, Tangents


@dataclass(frozen=True)
class Bilinear(Rule):
    """f(a, b), linear in each of two arguments, with perhaps a third one that is added.

    ⟨g, f(a_i, b_j) + f(a_j, b_i)⟩: g is contracted with the side that fewer directions have reached.

    Attributes:
        left: Position of a.
        right: Position of b.
        product: `product(call, a, b)`.
        pull_left: `pull_left(call, g, b)`, the gradient of ⟨g, f(a, b)⟩ in a.
        pull_right: `pull_right(call, g, a)`, likewise in b.
        added: Position of what is added, if anything.
        pass_added: Its contribution to the value, given its tangent.
    """

    left: int
    right: int
    product: Callable[[OpCall, Tensor, Tensor], Tensor]
    pull_left: Callable[[OpCall, Tensor, Tensor], Tensor]
    pull_right: Callable[[OpCall, Tensor, Tensor], Tensor]
    added: int | None = None
    pass_added: Callable[[OpCall, Tensor], Tensor] | None = None

    def has_curvature(self, node: fx.Node, active: set[fx.Node]) -> bool:
        """Whether both arguments depend on the directions."""
        return node.args[self.left] in active and node.args[self.right] in active

    def copies(self, node: fx.Node, reached: Mapping[fx.Node, int]) -> dict[fx.Node, int]:
        """What g is contracted to with the rarer side, and where that is more than one, the stacks of both sides."""
        left, right = node.args[self.left], node.args[self.right]
        assert isinstance(left, fx.Node)
        assert isinstance(right, fx.Node)
        fewer, more = sorted((reached[left], reached[right]))
        other = left if reached[right] == fewer else right
        return {other: fewer + (fewer + more if fewer > 1 else 0)}

    def _sides(self, call: OpCall) -> tuple[Tangents, Tangents]:
        return call.tangents_of(call.node.args[self.left]), call.tangents_of(call.node.args[self.right])

    def push(self, call: OpCall) -> Tangents:
        """f(a_i, b) + f(a, b_i) for every direction, and the tangent of what is added."""
        left, right = self._sides(call)
        tangents = {i: self.product(call, tangent, call.value(self.right)) for i, tangent in left.items()}
        for i, tangent in right.items():
            term = self.product(call, call.value(self.left), tangent)
            tangents[i] = tangents[i] + term if i in tangents else term
        if self.added is not None and self.pass_added is not None:
            for i, tangent in call.tangents_of(call.node.args[self.added]).items():
                term = self.pass_added(call, tangent)
                tangents[i] = tangents[i] + term if i in tangents else term.expand(call.output.shape)
        return tangents

    def contract(self, call: OpCall, contributions: Contributions) -> None:
        """Add ⟨g, f(a_i, b_j)⟩ for every direction i that has reached a, and j that has reached b."""
        left, right = self._sides(call)
        if not left or not right:
            return
        if len(right) <= len(left):
            pulled = {j: self.pull_left(call, call.adjoint, tangent) for j, tangent in right.items()}
            others = left
        else:
            pulled = {i: self.pull_right(call, call.adjoint, tangent) for i, tangent in left.items()}
            others = right
        if len(pulled) > 1:
            values = gram(list(pulled.values()), list(others.values()))
        else:
            values = torch.stack([inner_with_each(tensor, others.values()) for tensor in pulled.values()])
        contributions.add(pulled, others, values)


PRODUCT = Bilinear(
    0,
    1,
    lambda call, a, b: a * b,
    lambda call, g, b: (g * b).sum_to_size(call.value(0).shape),
    lambda call, g, a: (g * a).sum_to_size(call.value(1).shape),
)


MATRIX_VECTOR = Bilinear(
    0,
    1,
    lambda call, a, b: a @ b,
    lambda call, g, b: torch.outer(g, b),
    lambda call, g, a: a.mT @ g,
)
DOT = Bilinear(0, 1, lambda call, a, b: a @ b, lambda call, g, b: g * b, lambda call, g, a: g * a)


def matrix_product(left: int, right: int, added: int | None = None) -> Bilinear:
    """The product of two matrices, alpha times, perhaps with beta times something added: `addmm` and its like."""

    def scale(call: OpCall, name: str, tensor: Tensor) -> Tensor:
        factor: Any = call.node.kwargs.get(name, 1)
        return tensor if factor == 1 else tensor * factor

    return Bilinear(
        left,
        right,
        lambda call, a, b: scale(call, "alpha", a @ b),
        lambda call, g, b: scale(call, "alpha", g @ b.mT),
        lambda call, g, a: scale(call, "alpha", a.mT @ g),
        added=added,
        pass_added=lambda call, tangent: scale(call, "beta", tangent),
    )
