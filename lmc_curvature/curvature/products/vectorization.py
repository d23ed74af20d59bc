"""Several products at once on one graph, where calls to torch cost more than arithmetic.

A product of a small network is some hundred calls of a few microseconds each. `torch.func.vmap` over the product makes
the same calls for many vectors. Where tensors are large that saves nothing and costs memory, and a convolution by
several weights at once becomes a grouped one, which is slower than one after another.
"""

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmc_curvature.objective.network import State

# Numbers that the products made at once may write, in all: few of them are alive at the same time.
_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}

# In the names of operations that are slower by many weights at once than alone, or that torch maps wrongly.
_ALONE = ("convolution", "conv_tbc", "rnn", "lstm", "gru", "cdist")


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
        return stacked_units([self], start, stop)


def stacked_units(group: Sequence[UnitVectors], start: int, stop: int) -> dict[str, Tensor]:
    """A range of the unit vectors of several entries, one entry after the other, stacked along a first axis."""
    stacked = {units.entry: units.tensor.new_zeros(stop - start, *units.tensor.shape) for units in group}
    for units, vectors, coordinates in units_within(group, start, stop):
        ones = stacked[units.entry].view(stop - start, -1)[vectors]
        ones.diagonal(coordinates.start).fill_(1.0)
    return stacked


def units_within(group: Sequence[UnitVectors], start: int, stop: int) -> Iterator[tuple[UnitVectors, slice, slice]]:
    """Whose unit vectors are in a range of those of several entries: where in the range, and of which coordinates."""
    before = 0
    for units in group:
        first, last = max(start, before), min(stop, before + len(units))
        if first < last:
            offset = units.start - before
            yield units, slice(first - start, last - start), slice(first + offset, last + offset)
        before += len(units)


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
    """Decides by the first product how many are made at once from then on, and checks the first that are.

    Args:
        rounding: Relative rounding error of one operation.
        enabled: Whether products can be mapped at all.
    """

    def __init__(self, rounding: float, *, enabled: bool = True) -> None:
        self._rounding = rounding
        self._enabled = enabled
        self._at_once: dict[Hashable, int] = {}
        self._checked: set[Hashable] = set()

    def map(
        self, compute: Product, directions: Callable[[int, int], State], count: int, key: Hashable
    ) -> Iterator[dict[str, Tensor]]:
        """Compute a product of each direction.

        Args:
            compute: The product, linear in the direction.
            directions: `directions(start, stop)` gives a range of them, stacked along a first axis.
            count: How many there are.
            key: What tells products of different cost apart.

        Yields:
            For some directions in a row, in order, what `compute` returns for each, stacked along a first axis.
        """
        start = 0
        if count > 1 and self._is_unknown(key):
            yield _stacked_alone(self._measure(compute, directions, key))
            start = 1
        while start < count:
            size = min(self._at_once.get(key, 1), count - start)
            found = self._together(compute, directions(start, start + size), size, key) if size > 1 else None
            if found is None:
                size = 1
                found = _stacked_alone(compute(_only(directions(start, start + 1))))
            yield found
            start += size

    def at_once(self, compute: Product, directions: Callable[[int, int], State], key: Hashable) -> int:
        """How many products `map` would make at once; found, where that is not known, by making the first for nothing.

        Args:
            compute: See `map`.
            directions: Likewise.
            key: Likewise.
        """
        if self._is_unknown(key):
            self._measure(compute, directions, key)
        return self._at_once.get(key, 1)

    def _is_unknown(self, key: Hashable) -> bool:
        return self._enabled and key not in self._at_once

    def _measure(self, compute: Product, directions: Callable[[int, int], State], key: Hashable) -> dict[str, Tensor]:
        """The first product, which decides how many are made at once."""
        first = _only(directions(0, 1))
        with _Footprint() as footprint:
            found = compute(first)
        self._at_once[key] = footprint.fitting(first)
        return found

    def _together(self, compute: Product, directions: State, size: int, key: Hashable) -> dict[str, Tensor] | None:
        """The products of all directions; None, and fewer at once from now on, where that cannot be or is wrong."""
        try:
            found = _mapped(compute, directions)
        except torch.OutOfMemoryError:
            self._at_once[key] = size // 2
            return None
        except Exception:  # noqa: BLE001 - whatever it is, it comes again, or does not, where products are made alone
            self._at_once[key] = 1
            return None
        if key not in self._checked:
            if not self._agrees(found, compute, directions, size):
                self._at_once[key] = 1
                return None
            self._checked.add(key)
        return found

    def _agrees(self, found: State, compute: Product, directions: State, size: int) -> bool:
        """Whether a random combination of the products is the product of that combination.

        torch has an operation whose mapped form is wrong, without a word (`torch.cdist`).
        """
        signs = torch.randint(2, (size,), generator=torch.Generator().manual_seed(0)) * 2 - 1
        expected = compute({name: _combined(signs, stacked) for name, stacked in directions.items()})
        if not found:
            return True
        off = torch.stack([torch.linalg.vector_norm(_combined(signs, found[name]) - expected[name]) for name in found])
        sizes = torch.stack([torch.linalg.vector_norm(stacked) for stacked in found.values()])
        # Entry by entry: one that is wrong may be small beside others. Where a product cancels to nothing but rounding
        # of the others', it may differ; where all of them do, they are made alone.
        return bool((off <= self._rounding**0.5 * sizes + 10 * self._rounding * sizes.norm()).all())


def one_by_one(found: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """What `Vectorizer.map` found, direction by direction."""
    for stacked in found:
        for tensors in zip(*stacked.values(), strict=True):
            yield dict(zip(stacked, tensors, strict=True))


def _only(directions: State) -> State:
    return {name: stacked[0] for name, stacked in directions.items()}


def _stacked_alone(found: State) -> dict[str, Tensor]:
    return {name: tensor.unsqueeze(0) for name, tensor in found.items()}


def _combined(signs: Tensor, stacked: Tensor) -> Tensor:
    return torch.tensordot(signs.to(stacked), stacked, dims=1)


def _mapped(compute: Product, directions: State) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        # An operation that torch maps by a loop is exact, and no slower than our loop.
        warnings.filterwarnings("ignore", "There is a performance drop")
        return torch.func.vmap(compute)(dict(directions))


class _Footprint(TorchDispatchMode):
    """How many numbers a computation writes, and whether it makes sense to map it."""

    def __init__(self) -> None:
        super().__init__()
        self._written = 0
        self._mappable = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self._mappable &= not any(word in func.name() for word in _ALONE)
        if not func.is_view:
            self._written += sum(leaf.numel() for leaf in tree_leaves(found) if isinstance(leaf, Tensor))
        return found

    def fitting(self, direction: State) -> int:
        """How many of the computation, which was of a direction, may be made at once."""
        written = self._written + sum(tensor.numel() for tensor in direction.values())
        device = next((tensor.device.type for tensor in direction.values()), "")
        return max(_ELEMENTS.get(device, 0) // max(written, 1), 1) if self._mappable else 1
