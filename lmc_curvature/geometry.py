"""Distances and angles between networks: siblings, their fork, and the planes their solutions span."""

import dataclasses
import math
import os
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lmc_curvature.errors import ArchitectureMismatchError, NonFiniteError
from lmc_curvature.storage import load_arrays, save_arrays

State = Mapping[str, Tensor]

_KIND = "sibling-geometry"


def distance(a: State, b: State) -> float:
    """‖a − b‖₂ over all entries of two states."""
    return float(_dot(_difference(a, b), _difference(a, b)) ** 0.5)


def cosine(a: State, b: State) -> float:
    """Cosine of the angle between two states seen as vectors, in [−1, 1].

    Raises:
        NonFiniteError: One of them is zero or not finite, so there is no angle.
        ArchitectureMismatchError: They differ in entries or shapes.
    """
    _check_alike(a, b)
    norms = (_dot(a, a) * _dot(b, b)) ** 0.5
    if norms == 0:
        raise NonFiniteError("The angle with a vector of length zero is undefined: are two of the states equal?")
    if not math.isfinite(norms):
        raise NonFiniteError("The angle with a vector that is not finite is undefined: has a training diverged?")
    return float(min(1.0, max(-1.0, _dot(a, b) / norms)))


def sibling_cosine(a: State, b: State, base: State | None = None) -> float:
    """Cosine of the angle between siblings, seen from their fork `base` or from the origin (Singh et al., Figure 2)."""
    if base is None:
        return cosine(a, b)
    return cosine(_difference(a, base), _difference(b, base))


def solution_plane_cosine(a: State, b: State, final_a: State, final_b: State) -> float:
    """Cosine of the sibling difference at one time with the final one: 1 once siblings have fixed their plane."""
    return cosine(_difference(b, a), _difference(final_b, final_a))


@dataclasses.dataclass(frozen=True)
class SiblingGeometry:
    """How two siblings lie to each other, to where they come from, and to where they end.

    Attributes:
        distance: Between the siblings.
        cosine_origin: Of the angle between them, seen from the origin.
        cosine_fork: Of the angle between them, seen from their fork.
        cosine_final: Of their difference with the final one; see `solution_plane_cosine`.
    """

    distance: float
    cosine_origin: float
    cosine_fork: float
    cosine_final: float

    @classmethod
    def of(cls, a: State, b: State, base: State, final_a: State, final_b: State) -> "SiblingGeometry":
        """Of two siblings, their fork, and the two at the end.

        Raises:
            NonFiniteError: Two of the states are equal, so there is no angle, or one is not finite.
            ArchitectureMismatchError: They differ in entries or shapes.
        """
        return cls(
            distance(a, b),
            sibling_cosine(a, b),
            sibling_cosine(a, b, base),
            solution_plane_cosine(a, b, final_a, final_b),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the four numbers to one file, without loss."""
        save_arrays(path, _KIND, {name: np.array(value) for name, value in dataclasses.asdict(self).items()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "SiblingGeometry":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            FileFormatError: The file is damaged or holds something else.
        """
        arrays, _ = load_arrays(path, _KIND)
        return cls(**{name: float(value) for name, value in arrays.items()})


def _difference(a: State, b: State) -> dict[str, Tensor]:
    _check_alike(a, b)
    return {name: tensor.double() - b[name].double() for name, tensor in a.items()}


def _check_alike(a: State, b: State) -> None:
    if a.keys() != b.keys():
        raise ArchitectureMismatchError(
            f"The states differ in entries: {sorted(a.keys() ^ b.keys())[:5]}; expected states of one architecture."
        )
    for name, tensor in a.items():
        if tensor.shape != b[name].shape:
            raise ArchitectureMismatchError(
                f"Entry {name!r} has shape {tuple(tensor.shape)} in one state, {tuple(b[name].shape)} in the other; "
                "expected states of one architecture."
            )


def _dot(a: State, b: State) -> float:
    return float(sum(torch.dot(a[name].detach().double().flatten(), b[name].detach().double().flatten()) for name in a))
