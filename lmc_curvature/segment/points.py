"""The states a measurement evaluates, each once, made when they are needed."""

from collections.abc import Sequence
from typing import overload

from torch import Tensor

from lmc_curvature.segment.segment import Segment


class SegmentPoints(Sequence[dict[str, Tensor]]):
    """States θ₁ + α P_S Δ and θ₂ − (1−α) P_S Δ of several sets S, without repetitions.

    The two ends are points 0 and 1. A state is made anew each time it is asked for: a measurement of many sets needs
    many states, and holding one is enough.
    """

    START, END = 0, 1

    def __init__(self, segment: Segment):
        self._forward = segment
        self._backward = segment.reversed()
        # (walked from the end?, distance walked, layers that moved)
        self._walks: list[tuple[bool, float, frozenset[str]]] = []
        self._numbers: dict[tuple[bool, float, frozenset[str]], int] = {}
        self._add(False, 0.0, frozenset())
        self._add(True, 0.0, frozenset())

    def pair(self, layers: Sequence[str], alpha: float) -> tuple[int, int]:
        """Numbers of the two points whose losses, weighted by 1−α and α, make up the curve of a set at α."""
        members = frozenset(layers)
        # What has weight zero is not evaluated, and the whole network meets itself halfway.
        if alpha == 0:
            return self.START, self.START
        if alpha == 1:
            return self.END, self.END
        near = self._add(False, float(alpha), members)
        return near, near if len(members) == len(self._forward.layers) else self._add(True, float(1 - alpha), members)

    def describe(self, number: int) -> str:
        """Say for an error message which layers moved how far."""
        from_end, distance, members = self._walks[number]
        end = "model_b" if from_end else "model_a"
        if not members:
            return end
        layers = "all layers" if len(members) == len(self._forward.layers) else ", ".join(sorted(members))
        return f"alpha={1 - distance if from_end else distance:.3g} ({layers} moved from {end})"

    def _add(self, from_end: bool, distance: float, members: frozenset[str]) -> int:
        walk = (from_end, distance, members)
        if walk not in self._numbers:
            self._numbers[walk] = len(self._walks)
            self._walks.append(walk)
        return self._numbers[walk]

    def __len__(self) -> int:
        return len(self._walks)

    @overload
    def __getitem__(self, number: int) -> dict[str, Tensor]: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[dict[str, Tensor]]: ...
    def __getitem__(self, number: int | slice) -> dict[str, Tensor] | Sequence[dict[str, Tensor]]:
        if isinstance(number, slice):
            return [self[index] for index in range(*number.indices(len(self)))]
        from_end, distance, members = self._walks[number]
        return (self._backward if from_end else self._forward).point(distance, members)
