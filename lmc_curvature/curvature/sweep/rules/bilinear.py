"""Operations that are linear in each of two arguments."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lmc_curvature.curvature.sweep.rules.inner_products import gram
from lmc_curvature.curvature.sweep.rules.rule import Contributions, OpCall, Rule
from lmc_curvature.curvature.sweep.rules.stack import Stack, total


@dataclass(frozen=True)
class Bilinear(Rule):
    """f(a, b), linear in each of two arguments, with perhaps a third one that is added.

    ⟨g, f(a_i, b_j) + f(a_j, b_i)⟩: g is contracted with the side that fewer directions have reached.

    Attributes:
        left: Position of a.
        right: Position of b.
        product: `product(call, a, b)`, where one of both may be a stack.
        pull_left: `pull_left(call, g, b)`, the gradients of ⟨g, f(a, b)⟩ in a for a stack b.
        pull_right: `pull_right(call, g, a)`, likewise in b for a stack a.
        added: Position of what is added, if anything.
        pass_added: Its contribution to the value, given its stack.
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

    def copies(self, node: fx.Node, reached: Mapping[fx.Node, int], *, in_parts: bool) -> dict[fx.Node, int]:
        """What g is contracted to with the rarer side, and where that is more than one, the stacks of both sides."""
        left, right = node.args[self.left], node.args[self.right]
        assert isinstance(left, fx.Node)
        assert isinstance(right, fx.Node)
        fewer, more = sorted((reached[left], reached[right]))
        other = left if reached[right] == fewer else right
        return {other: fewer + (fewer + more if fewer > 1 else 0)}

    def _sides(self, call: OpCall) -> tuple[Stack | None, Stack | None]:
        return call.tangents_of(call.node.args[self.left]), call.tangents_of(call.node.args[self.right])

    def push(self, call: OpCall) -> Stack:
        """f(a_i, b) + f(a, b_i) for every direction, and the tangent of what is added."""
        left, right = self._sides(call)
        rank = call.output.ndim
        terms = []
        if left is not None:
            product = self.product(call, left.of_rank(rank), call.value(self.right))
            terms.append(Stack(left.directions, product, is_own=True))
        if right is not None:
            product = self.product(call, call.value(self.left), right.of_rank(rank))
            terms.append(Stack(right.directions, product, is_own=True))
        return total([*terms, *self._passed(call)], call.output.shape)

    def _passed(self, call: OpCall) -> list[Stack]:
        """The tangent of what is added."""
        added = None if self.added is None else call.tangents_of(call.node.args[self.added])
        if added is None or self.pass_added is None:
            return []
        return [Stack(added.directions, self.pass_added(call, added.tensors))]

    def contract(self, call: OpCall, contributions: Contributions) -> None:
        """Add ⟨g, f(a_i, b_j)⟩ for every direction i that has reached a, and j that has reached b."""
        left, right = self._sides(call)
        if left is None or right is None:
            return
        # The rarer side; of two alike, towards the smaller argument.
        size_left, size_right = call.value(self.left).numel(), call.value(self.right).numel()
        rank = call.output.ndim
        if (len(right.directions), size_left) <= (len(left.directions), size_right):
            pulled = self.pull_left(call, call.adjoint, right.of_rank(rank))
            contributions.add(right.directions, left.directions, gram(pulled, left.tensors))
        else:
            pulled = self.pull_right(call, call.adjoint, left.of_rank(rank))
            contributions.add(left.directions, right.directions, gram(pulled, right.tensors))


def _summed_to(call: OpCall, position: int, stack: Tensor) -> Tensor:
    """A stack, summed over the axes that an argument was broadcast along."""
    shape = call.value(position).shape
    padded = (1,) * (stack.ndim - 1 - len(shape)) + tuple(shape)
    return stack.sum_to_size(len(stack), *padded).reshape(len(stack), *shape)


PRODUCT = Bilinear(
    0,
    1,
    lambda call, a, b: a * b,
    lambda call, g, b: _summed_to(call, 0, g * b),
    lambda call, g, a: _summed_to(call, 1, g * a),
)


class MatrixProduct(Bilinear):
    """The product of two matrices, alpha times, perhaps with beta times something added: `addmm` and its like."""

    def push(self, call: OpCall) -> Stack:
        """As for all bilinear operations; both sides' tangents are written next to each other where they are others."""
        left, right = self._sides(call)
        if left is None or right is None or not set(left.directions).isdisjoint(right.directions):
            return super().push(call)
        directions, count = left.directions + right.directions, len(left.directions)
        out = call.output.new_empty((len(directions), *call.output.shape))
        torch.matmul(left.tensors, call.value(self.right), out=out[:count])
        torch.matmul(call.value(self.left), right.tensors, out=out[count:])
        terms = [Stack(directions, _scaled(call, "alpha", out), is_own=True), *self._passed(call)]
        return total(terms, call.output.shape)


def _scaled(call: OpCall, name: str, tensor: Tensor) -> Tensor:
    factor: Any = call.node.kwargs.get(name, 1)
    return tensor if factor == 1 else tensor * factor


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """Products of matrices, a @ b, one of which is a stack of them with a further axis first.

    torch copies the other for every direction. Where it is large, as attention's weights are, the directions are taken
    as further columns of b or rows of a instead.
    """
    (rows, inner), columns = a.shape[-2:], b.shape[-1]
    if 3 <= a.ndim == b.ndim - 1 and rows * inner > (rows + inner) * columns:
        wide = a @ b.movedim(0, -2).flatten(-2)
        return wide.unflatten(-1, (len(b), columns)).movedim(-2, 0)
    if 3 <= b.ndim == a.ndim - 1 and inner * columns > (inner + columns) * rows:
        tall = a.movedim(0, -3).flatten(-3, -2) @ b
        return tall.unflatten(-2, (len(a), rows)).movedim(-3, 0)
    return a @ b


def matrix_product(left: int, right: int, added: int | None = None) -> MatrixProduct:
    """The rule of a matrix product, given the positions of its arguments."""
    return MatrixProduct(
        left,
        right,
        lambda call, a, b: _scaled(call, "alpha", _matmul(a, b)),
        lambda call, g, b: _scaled(call, "alpha", _matmul(g, b.mT)),
        lambda call, g, a: _scaled(call, "alpha", _matmul(a.mT, g)),
        added=added,
        pass_added=lambda call, tangent: _scaled(call, "beta", tangent),
    )
