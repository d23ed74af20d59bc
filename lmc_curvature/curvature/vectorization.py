"""Several products at once on one graph, where calls to torch cost more than arithmetic.

A product of a small network is some hundred calls of a few microseconds each. `torch.func.vmap` over the product makes
the same calls for many vectors. Where tensors are large that saves nothing and costs memory, and a convolution by
several weights at once becomes a grouped one, which is slower than one after another.
"""

import warnings
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmc_curvature.errors import UnsupportedModelError
from lmc_curvature.network import State

# Numbers that the products made at once may write, in all: few of them are alive at the same time.
_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}


@dataclass(frozen=True)
class UnitVectors:
    """Some coordinates of one entry, each a direction that takes only the part of a graph that the entry needs.

    Attributes:
        entry: Name of the entry.
        tensor: Has its shape, type and device.
        start, stop: The coordinates.
    """

    entry: str
    tensor: Tensor
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def stacked(self, start: int, stop: int) -> dict[str, Tensor]:
        """A range of them, stacked along a first axis."""
        count = stop - start
        units = self.tensor.new_zeros(count, *self.tensor.shape)
        units.view(count, -1).diagonal(self.start + start).fill_(1.0)
        return {self.entry: units}


def unit_passes(tensors: State, size: int) -> Iterator[list[UnitVectors]]:
    """All coordinates of some entries, in order, so many at a time that share a pass over the data."""
    passed: list[UnitVectors] = []
    room = size
    for entry, tensor in tensors.items():
        start = 0
        while start < tensor.numel():
            stop = min(start + room, tensor.numel())
            passed.append(UnitVectors(entry, tensor, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield passed
                passed, room = [], size
    if passed:
        yield passed


Product = Callable[[State], dict[str, Tensor]]
"""What is computed from a direction, by name; a function that `torch.func.vmap` can map."""


class Vectorizer:
    """Decides by the first product how many are made at once from then on.

    Args:
        enabled: Whether products can be mapped at all.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self._at_once: dict[Hashable, int] = {}

    def map(
        self, compute: Product, directions: Callable[[int, int], State], count: int, key: Hashable
    ) -> Iterator[dict[str, Tensor]]:
        """Compute a product of each direction.

        Args:
            compute: The product.
            directions: `directions(start, stop)` gives a range of them, stacked along a first axis.
            count: How many there are.
            key: What tells products of different cost apart.

        Yields:
            For some directions in a row, in order, what `compute` returns for each, stacked along a first axis.
        """
        start = 0
        if self._enabled and count > 1 and key not in self._at_once:
            first = _only(directions(0, 1))
            with _Footprint(first) as footprint:
                found = compute(first)
            self._at_once[key] = footprint.fits
            yield _stacked_alone(found)
            start = 1
        while start < count:
            size = min(self._at_once.get(key, 1), count - start)
            found = None
            if size > 1:
                found = _mapped(compute, directions(start, start + size))
            if found is None:
                if size > 1:
                    self._at_once[key] = size = 1
                found = _stacked_alone(compute(_only(directions(start, start + 1))))
            yield found
            start += size


def one_by_one(found: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """What `Vectorizer.map` found, direction by direction."""
    for stacked in found:
        for tensors in zip(*stacked.values(), strict=True):
            yield dict(zip(stacked, tensors, strict=True))


def _only(directions: State) -> State:
    return {name: stacked[0] for name, stacked in directions.items()}


def _stacked_alone(found: State) -> dict[str, Tensor]:
    return {name: tensor.unsqueeze(0) for name, tensor in found.items()}


def _mapped(compute: Product, directions: State) -> dict[str, Tensor] | None:
    """The products of all directions; None if an operation cannot be mapped, or memory does not suffice."""
    with warnings.catch_warnings():
        # An operation that torch maps by a loop is exact, and no slower than our loop.
        warnings.filterwarnings("ignore", "There is a performance drop")
        try:
            return torch.func.vmap(compute)(dict(directions))
        except (RuntimeError, UnsupportedModelError):
            return None


class _Footprint(TorchDispatchMode):
    """How many numbers a computation from a direction writes, and whether it makes sense to map it."""

    def __init__(self, direction: State):
        super().__init__()
        self._device = next(iter(direction.values())).device.type
        self._elements = sum(tensor.numel() for tensor in direction.values())
        self._mappable = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.name()
        if "convolution" in name or "rnn" in name:
            self._mappable = False
        if not func.is_view:
            self._elements += sum(leaf.numel() for leaf in tree_leaves(found) if isinstance(leaf, Tensor))
        return found

    @property
    def fits(self) -> int:
        """How many of the computation may be made at once."""
        return max(_ELEMENTS.get(self._device, 0) // self._elements, 1) if self._mappable else 1
