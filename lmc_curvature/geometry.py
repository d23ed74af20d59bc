"""Distances and angles between networks: siblings, their fork, and the planes their solutions span.

States may be those of `state_dict()`: what counts or indexes, integers and counters of batches, is no part of a vector.
"""

import dataclasses
import math
import os
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from lmc_curvature.errors import ArchitectureMismatchError, NonFiniteError
from lmc_curvature.objective.normalization import is_batch_counter
from lmc_curvature.plotting.summary import Display, Summary
from lmc_curvature.storage import check_arrays, load_arrays, refuse_damage, save_arrays

State = Mapping[str, Tensor]

_KIND = "sibling-geometry"


def distance(a: State, b: State) -> float:
    """‖a − b‖₂ over all entries of two states that hold real or complex numbers."""
    first, second = _vectors(a, b)
    return float(torch.linalg.vector_norm(first - second))


def cosine(a: State, b: State) -> float:
    """Cosine of the angle between two states seen as real vectors, in [−1, 1].

    Raises:
        NonFiniteError: One of them is zero or not finite, so there is no angle.
        ArchitectureMismatchError: They differ in entries or shapes.
    """
    return _cosine(*_vectors(a, b))


def sibling_cosine(a: State, b: State, base: State | None = None) -> float:
    """Cosine of the angle between siblings, seen from their fork `base` or from the origin (Singh et al., Figure 2)."""
    if base is None:
        return cosine(a, b)
    first, second, origin = _vectors(a, b, base)
    return _cosine(first - origin, second - origin)


def solution_plane_cosine(a: State, b: State, final_a: State, final_b: State) -> float:
    """Cosine of the sibling difference at one time with the final one: 1 once siblings have fixed their plane."""
    first, second, final_first, final_second = _vectors(a, b, final_a, final_b)
    return _cosine(second - first, final_second - final_first)


@dataclasses.dataclass(frozen=True, repr=False)
class SiblingGeometry(Display):
    """The distance between two siblings, and angles that they make with their fork and with their end.

    Attributes:
        distance: Norm of the difference of the siblings.
        cosine_origin: Cosine of the angle between them, seen from the origin.
        cosine_fork: Cosine of the angle between them, seen from their fork.
        cosine_final: Cosine of the angle between their difference and the final one; see `solution_plane_cosine`.
    """

    distance: float
    cosine_origin: float
    cosine_fork: float
    cosine_final: float

    def _summary(self) -> Summary:
        return Summary(
            f"SiblingGeometry: two siblings at a distance of {self.distance:.4g}",
            {
                "from the origin": f"cosine {self.cosine_origin:.4g}",
                "from their fork": f"cosine {self.cosine_fork:.4g}",
                "with the end": f"cosine {self.cosine_final:.4g} of their difference with the final one",
            },
        )

    @classmethod
    def of(cls, a: State, b: State, base: State, final_a: State, final_b: State) -> "SiblingGeometry":
        """Compare the states of two siblings, of their fork, and of the siblings at the end of training.

        Raises:
            NonFiniteError: Two of the states are equal, so there is no angle, or one is not finite.
            ArchitectureMismatchError: They differ in entries or shapes.
        """
        with_final = solution_plane_cosine(a, b, final_a, final_b)
        return cls(distance(a, b), sibling_cosine(a, b), sibling_cosine(a, b, base), with_final)

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
        names = [field.name for field in dataclasses.fields(cls)]
        with refuse_damage(path):
            check_arrays(arrays, dict.fromkeys(names, ""))
        return cls(**{name: float(arrays[name]) for name in names})


def _cosine(u: Float64[Tensor, " n"], v: Float64[Tensor, " n"]) -> float:
    norms = float(torch.sqrt((u @ u) * (v @ v)))
    if norms == 0:
        raise NonFiniteError("The angle with a vector of length zero is undefined: are two of the states equal?")
    if not math.isfinite(norms):
        raise NonFiniteError("The angle with a vector that is not finite is undefined: has a training diverged?")
    return min(1.0, max(-1.0, float(u @ v) / norms))


def _vectors(*states: State) -> list[Float64[Tensor, " n"]]:
    """The entries of each state as one vector, in the order of the first state."""
    states = tuple({name: tensor for name, tensor in state.items() if _is_numeric(name, tensor)} for state in states)
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in states]
    for others in shapes[1:]:
        for name in sorted(shapes[0].keys() | others.keys()):
            one, other = shapes[0].get(name, "absent"), others.get(name, "absent")
            if one != other:
                raise ArchitectureMismatchError(
                    f"Entry {name!r} has different shapes: {one} in one state, {other} in the other; expected states "
                    "of one architecture."
                )
    return [torch.cat([_real(state[name].detach()).flatten() for name in shapes[0]]) for state in states]


def _real(tensor: Tensor) -> Tensor:
    """Real numbers in float64; of complex ones, real and imaginary parts."""
    return torch.view_as_real(tensor.to(torch.complex128).resolve_conj()) if tensor.is_complex() else tensor.double()


def _is_numeric(name: str, tensor: Tensor) -> bool:
    return (tensor.is_floating_point() or tensor.is_complex()) and not is_batch_counter(name)
