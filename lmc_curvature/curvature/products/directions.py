"""Directions to multiply by one matrix: tensors that are there, or unit vectors that are made when asked for."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from lmc_curvature.objective.network import State


def places_of(tensors: State) -> dict[str, slice]:
    """The place of each entry in the vector that some entries make up, one after the other."""
    places, start = {}, 0
    for name, tensor in tensors.items():
        places[name] = slice(start, start := start + tensor.numel())
    return places


@dataclass(frozen=True)
class StackedDirections:
    """Directions that are there, stacked along a first axis.

    Attributes:
        tensors: Entry name to the directions' tensors, along a first axis. At least one entry.
    """

    tensors: State

    @property
    def entries(self) -> tuple[str, ...]:
        """Names of the entries that the directions move."""
        return tuple(self.tensors)

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def stacked(self, start: int, stop: int) -> dict[str, Tensor]:
        """A range of the directions, stacked along a first axis."""
        return {name: tensor[start:stop] for name, tensor in self.tensors.items()}


@dataclass(frozen=True)
class UnitVectors:
    """The unit vectors of a range of coordinates, counted through some entries one after the other.

    Attributes:
        tensors: Entry name to a tensor of the entry's shape, type and device.
        start, stop: The range.
    """

    tensors: State
    start: int
    stop: int

    @functools.cached_property
    def entries(self) -> tuple[str, ...]:
        """Names of the entries that have coordinates in the range."""
        return tuple(name for name, _, _ in self.within(0, len(self)))

    def __len__(self) -> int:
        return self.stop - self.start

    def within(self, start: int, stop: int) -> Iterator[tuple[str, slice, slice]]:
        """For each entry that some of these move: its name, which of them, and along which of its coordinates."""
        before = self.start + start
        for name, place in places_of(self.tensors).items():
            first, last = max(before, place.start), min(self.start + stop, place.stop)
            if first < last:
                yield name, slice(first - before, last - before), slice(first - place.start, last - place.start)

    def stacked(self, start: int, stop: int) -> dict[str, Tensor]:
        """Some of these, stacked along a first axis."""
        stacked = {name: self.tensors[name].new_zeros(stop - start, *self.tensors[name].shape) for name in self.entries}
        for name, vectors, coordinates in self.within(start, stop):
            stacked[name].view(stop - start, -1)[vectors].diagonal(coordinates.start).fill_(1.0)
        return stacked

    def by_entry(self) -> list["UnitVectors"]:
        """The same unit vectors, each entry's by themselves: they need only the part of a graph that the entry has."""
        parts = self.within(0, len(self))
        return [UnitVectors({name: self.tensors[name]}, own.start, own.stop) for name, _, own in parts]


Directions = StackedDirections | UnitVectors
"""A sequence of directions over the same entries."""


def unit_vectors(tensors: State) -> UnitVectors:
    """The unit vectors of all coordinates of some entries."""
    return UnitVectors(tensors, 0, sum(tensor.numel() for tensor in tensors.values()))
