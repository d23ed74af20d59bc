"""The states a measurement evaluates, each once, made when they are needed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from typing import overload

from torch import Tensor

from lmc_curvature.errors import OptionError, PartitionError
from lmc_curvature.segment.partition import layer_indices
from lmc_curvature.segment.segment import Segment


class StatePoints(Sequence[dict[str, Tensor]]):
    """States by their numbers, each made anew when it is asked for: holding one is enough, however many there are.

    Attributes:
        networks: Numbers of those that are the networks themselves.
    """

    networks: Sequence[int]

    def describe(self, number: int) -> str:
        """Say for an error message which state it is."""
        raise NotImplementedError

    def state(self, number: int) -> dict[str, Tensor]:
        """The state of a number."""
        raise NotImplementedError

    @overload
    def __getitem__(self, number: int) -> dict[str, Tensor]: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[dict[str, Tensor]]: ...
    def __getitem__(self, number: int | slice) -> dict[str, Tensor] | Sequence[dict[str, Tensor]]:
        if isinstance(number, slice):
            return [self[index] for index in range(*number.indices(len(self)))]
        return self.state(number)


class StatesOnDemand(Mapping[str, Mapping[str, Tensor]]):
    """States by name, each made anew when it is asked for.

    Args:
        make: Name to a function that makes the state.
    """

    def __init__(self, make: Mapping[str, Callable[[], Mapping[str, Tensor]]]):
        self._make = dict(make)

    def __getitem__(self, name: str) -> Mapping[str, Tensor]:
        return self._make[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._make)

    def __len__(self) -> int:
        return len(self._make)


class SegmentPoints(StatePoints):
    """States θ₁ + α P_S Δ and θ₂ − (1−α) P_S Δ of several sets S, or θ₁ + Σ_ℓ x_ℓ Δ_ℓ, without repetitions.

    The two ends are points 0 and 1.
    """

    START, END = 0, 1
    networks = (START, END)

    def __init__(self, segment: Segment):
        self._forward = segment
        self._backward = segment.reversed()
        # (walked from the end?, the distance that each layer walked)
        self._walks: list[tuple[bool, tuple[float, ...]]] = []
        self._numbers: dict[tuple[bool, tuple[float, ...]], int] = {}
        self._add(False, [0.0] * len(segment.layers))
        self._add(True, [0.0] * len(segment.layers))

    def pair(self, layers: Sequence[str], alpha: float) -> tuple[int, int]:
        """Numbers of the two points whose losses, weighted by 1−α and α, make up the curve of a set at α."""
        chosen = set(layers)
        members = [layer in chosen for layer in self._forward.layers]
        # What has weight zero is not evaluated, and the whole network meets itself halfway.
        if alpha == 0:
            return self.START, self.START
        if alpha == 1:
            return self.END, self.END
        near = self._add(False, [alpha * member for member in members])
        return near, near if all(members) else self._add(True, [(1 - alpha) * member for member in members])

    def at(self, x: Sequence[float]) -> int:
        """Number of the point x of the cube, a number in [0, 1] for each layer."""
        return self.END if all(each == 1 for each in x) else self._add(False, x)

    def describe(self, number: int) -> str:
        """Say for an error message which layers moved how far."""
        from_end, distances = self._walks[number]
        end = "model_b" if from_end else "model_a"
        moved = {layer: walked for layer, walked in zip(self._forward.layers, distances, strict=True) if walked}
        if not moved:
            return end
        if len(set(moved.values())) > 1:
            return f"alpha={{{', '.join(f'{layer!r}: {walked:.3g}' for layer, walked in moved.items())}}}"
        distance = next(iter(moved.values()))
        layers = "all layers" if len(moved) == len(distances) else ", ".join(sorted(moved))
        return f"alpha={1 - distance if from_end else distance:.3g} ({layers} moved from {end})"

    def _add(self, from_end: bool, distances: Sequence[float]) -> int:
        walk = (from_end, tuple(map(float, distances)))
        if walk not in self._numbers:
            self._numbers[walk] = len(self._walks)
            self._walks.append(walk)
        return self._numbers[walk]

    def __len__(self) -> int:
        return len(self._walks)

    def state(self, number: int) -> dict[str, Tensor]:
        """The state of a number."""
        from_end, distances = self._walks[number]
        segment = self._backward if from_end else self._forward
        return segment.at({layer: walked for layer, walked in zip(segment.layers, distances, strict=True) if walked})


def check_points(layers: Sequence[str], points: Sequence[Mapping[str, float | int]]) -> tuple[dict[str, float], ...]:
    """Points of the cube, a number for every layer each, with the layers in their own order.

    Raises:
        OptionError: A point is no mapping to numbers in [0, 1].
        PartitionError: A point names an unknown layer, or leaves one out.
    """
    for place, point in enumerate(points):
        if not isinstance(point, Mapping):
            raise OptionError(f"points[{place}]={point!r}: expected a mapping from every layer to a number in [0, 1].")
        if len(layer_indices(layers, point)) < len(layers):
            missing = next(layer for layer in layers if layer not in point)
            raise PartitionError(f"points[{place}] has no number for layer {missing!r}: name every layer.")
        for layer, x in point.items():
            if not isinstance(x, Real) or not 0 <= x <= 1:
                raise OptionError(
                    f"points[{place}][{layer!r}]={x!r} lies outside the cube; expected numbers in [0, 1]."
                )
    return tuple({layer: float(point[layer]) for layer in layers} for point in points)
