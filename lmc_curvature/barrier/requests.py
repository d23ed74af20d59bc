"""What a measurement is asked for: positions on the segment, and sets of layers."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from lmc_curvature.barrier.expansions import check_alphas
from lmc_curvature.errors import OptionError
from lmc_curvature.segment import layer_indices

Sets = Literal["each"] | Sequence[Iterable[str]]
"""Sets of layers: each layer alone, or a list of sets of names."""


def positions_of(alphas: int | np.integer | Sequence[float] | np.ndarray) -> Float[np.ndarray, " n"]:
    """Positions in [0, 1] in order: those given, or as many as asked for, evenly spaced.

    Raises:
        OptionError: They are fewer than three, or lie outside; or none of those given lies between the ends.
    """
    if isinstance(alphas, (int, np.integer)):
        if alphas < 3:
            raise OptionError(f"alphas={alphas}: at least 3 positions are needed, the ends and one between them.")
        return np.linspace(0.0, 1.0, int(alphas))
    positions = np.sort(check_alphas(alphas))
    if not ((positions > 0) & (positions < 1)).any():
        raise OptionError(f"alphas={alphas}: a position between 0 and 1 is needed; the ends tell no barrier.")
    return positions


def refuse_former_options(layers: object, partition: object) -> None:
    """Refuse `partition`, and a list of sets as `layers`, which an earlier version took.

    Raises:
        OptionError: They are given.
    """
    if partition is not None:
        raise OptionError(f"partition={partition!r} is now layers={partition!r}, and the sets to measure are sets=[…].")
    if layers is None or isinstance(layers, (list, tuple)):
        raise OptionError(
            f"layers={layers!r}: layers is the partition, and the sets to measure are now sets={layers or ()!r}."
        )


def resolve_sets(groups: Mapping[str, Sequence[str]], sets: Sets) -> tuple[tuple[str, ...], ...]:
    """Return the members of each set, in the order of the network, from the entries of each layer.

    Raises:
        OptionError: They are no sets, or one is empty.
        PartitionError: A set names an unknown layer.
    """
    names = tuple(groups)
    if sets == "each":
        return tuple((name,) for name in names)
    if isinstance(sets, str) or not isinstance(sets, Iterable) or not all(isinstance(s, Iterable) for s in sets):
        raise OptionError(f"sets={sets!r}: expected 'each', or a list of sets of layer names, as in [['conv1', 'fc']].")
    found = tuple(tuple(names[index] for index in layer_indices(groups, members)) for members in sets)
    if () in found:
        raise OptionError(f"sets[{found.index(())}] is an empty set: name at least one layer.")
    return found
