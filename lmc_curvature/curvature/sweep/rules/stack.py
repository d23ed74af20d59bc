"""Tangents of one value along several directions, as one tensor."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Stack:
    """The tangents of one value along those directions that have reached it; along all others they are zero.

    Attributes:
        directions: Numbers of the directions, in the order in which they joined.
        first: The tangents one after another, (directions, *shape); of a tuple of values, a tuple of such tensors with
            None for zero.
        is_own: Whether nothing else reads the tensors, so that they may be overwritten.
        joining: The tangents of directions that have just joined, which `first` is without: whoever goes over all
            tangents anyway puts them behind the others on the way.
    """

    directions: tuple[int, ...]
    first: Any
    is_own: bool = False
    joining: Tensor | None = None

    @cached_property
    def tensors(self) -> Any:
        """All tangents, one after another."""
        if self.joining is None:
            return self.first
        # Seen as a batch of more examples, so that images stay laid out as they are.
        parts = [part.flatten(0, 1) if part.ndim > 1 else part for part in (self.first, self.joining)]
        return torch.cat(parts).reshape(-1, *self.shape)

    @property
    def shape(self) -> torch.Size:
        """The shape of each tangent."""
        return self.first.shape[1:]

    def at(self, direction: int) -> Any:
        """The tangent along one direction; None where it is zero."""
        if direction not in self.directions:
            return None
        place = self.directions.index(direction)
        if isinstance(self.tensors, Tensor):
            return self.tensors[place] if len(self.directions) > 1 else self.tensors.squeeze(0)
        return tuple(None if tensor is None else tensor[place] for tensor in self.tensors)

    def among(self, directions: Sequence[int]) -> "Stack":
        """The tangents along those of some directions that have reached the value."""
        kept = tuple(i for i in self.directions if i in directions)
        return self if kept == self.directions else Stack(kept, self.spread(kept))

    def of_rank(self, rank: int) -> Tensor:
        """The tensor as it broadcasts with one of a rank, whose first axes the value may lack."""
        missing = rank - len(self.shape)
        return self.tensors.reshape(len(self.directions), *(1,) * missing, *self.shape) if missing else self.tensors

    def spread(self, directions: Sequence[int]) -> Tensor:
        """The tangents along other directions than these, in their order, zero along those that have not come here."""
        if tuple(directions) == self.directions:
            return self.tensors
        zero = self.tensors.new_zeros(()).expand(self.shape)
        return torch.stack([self.at(i) if i in self.directions else zero for i in directions])

    def times(self, factor: Tensor | float | int) -> "Stack":
        """The tangents, each times a tensor of their shape or a number."""
        if self.joining is None:
            return Stack(self.directions, self.first.mul_(factor) if self.is_own else self.first * factor, is_own=True)
        out = self.first.new_empty_strided((len(self.directions), *self.shape), self.first.stride())
        for part, place in zip(
            (self.first, self.joining), out.split((len(self.first), len(self.joining))), strict=True
        ):
            torch.mul(part, factor, out=place)
        return Stack(self.directions, out, is_own=True)


def stacked(tangents: Mapping[int, Any]) -> Stack:
    """The stack of tangents, given direction by direction; there is at least one."""
    first, *others = tangents.values()
    if isinstance(first, Tensor):
        return Stack(tuple(tangents), torch.stack([first, *others]) if others else first.unsqueeze(0))
    columns = zip(first, *others, strict=True)
    return Stack(tuple(tangents), tuple(None if parts[0] is None else torch.stack(parts) for parts in columns))


def union(stacks: Iterable[Stack | None]) -> tuple[int, ...]:
    """The directions of any of the stacks."""
    return tuple(dict.fromkeys(i for stack in stacks if stack is not None for i in stack.directions))


def along(function: Callable[..., Any], *stacks: Stack) -> Stack:
    """A linear function of tangents along every direction that has reached any of them, vectorised by torch."""
    directions = union(stacks)
    found = torch.vmap(function)(*(stack.spread(directions) for stack in stacks))
    # A view of what nothing else reads, or new; elements of some views are the same numbers.
    return Stack(directions, found, all(stack.is_own for stack in stacks) and _is_dense(found))


def _is_dense(found: Any) -> bool:
    """Whether a tensor has a place of its own in memory for each number, and no gaps."""
    return isinstance(found, Tensor) and torch.empty_like(found, device="meta").stride() == found.stride()


def total(terms: Iterable[Stack], shape: Sequence[int]) -> Stack:
    """The sum of stacks, each of which broadcasts to a shape."""
    found, *others = sorted(terms, key=lambda term: -len(term.directions) * term.shape.numel())
    if found.shape != shape:
        found = Stack(found.directions, found.of_rank(len(shape)).expand(-1, *shape))
    if not others:
        return found
    # Small ones first: a layer's weight and bias move one direction.
    term = total(others, others[0].shape if len(others) == 1 else shape)
    known, new = ([i for i in term.directions if (i in found.directions) == here] for here in (True, False))
    if known:
        found = _added(found, term.among(known), len(shape))
    return _appended(found, term.among(new), shape) if new else found


def _added(stack: Stack, term: Stack, rank: int) -> Stack:
    """A stack, and another one along some of its directions added to it."""
    tensor, count = term.of_rank(rank), len(term.directions)
    if term.directions == stack.directions and not stack.is_own:
        return Stack(stack.directions, stack.tensors + tensor, is_own=True)
    is_first = term.directions == stack.directions[:count]
    if stack.is_own and is_first and count <= len(stack.first):
        stack.first[:count].add_(tensor)
        # A new one, because the old one may have kept all its tangents joined.
        return replace(stack)
    out = stack.tensors if stack.is_own else stack.tensors.clone()
    if is_first:
        out[:count].add_(tensor)
    else:
        for place, direction in enumerate(term.directions):
            out[stack.directions.index(direction)].add_(tensor[place])
    return Stack(stack.directions, out, is_own=True)


def _appended(stack: Stack, term: Stack, shape: Sequence[int]) -> Stack:
    """A stack, and another one along other directions after it."""
    last = term.of_rank(len(shape))
    last = last if last.shape[1:] == shape else last.expand(-1, *shape)
    joined = Stack(stack.directions + term.directions, stack.first, stack.is_own, last)
    if stack.is_own and stack.joining is None:
        return joined
    return Stack(joined.directions, replace(joined, first=stack.tensors).tensors, is_own=True)
