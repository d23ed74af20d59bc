"""The point that a merge takes: for every layer a coordinate between two networks, or the share that each has."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from lmc_curvature.errors import OptionError, PartitionError, check_choice
from lmc_curvature.segment import layer_indices
from lmc_curvature.segment.segment import check_coordinates

Alpha = float | Mapping[str, float]
"""One coordinate for all layers that are averaged, or layer name to coordinate."""

Place = float | tuple[float, ...]
"""Where a layer is: its coordinate, 0 at one of two networks and 1 at the other; or the share of each of several."""


def merge_coordinates(
    groups: Mapping[str, Sequence[str]], alpha: Alpha, layers: Iterable[str] | str | None, base: Literal["a", "b"]
) -> dict[str, float]:
    """Coordinates of every layer: `alpha` for those that are averaged, the base's for the others.

    Args:
        groups: Names of all layers, with the names of their entries.
        alpha: The coordinate of the averaged layers, or a coordinate for each of them by name.
        layers: Names of the averaged layers; None for all, or for those that `alpha` names.
        base: The network whose entries the other layers keep, `"a"` (coordinate 0) or `"b"` (1).

    Raises:
        OptionError: A coordinate is no number in [0, 1], `alpha` and `layers` name different layers, or `base` is no
            choice.
        PartitionError: There is no such layer.
    """
    check_choice("base", base, ("a", "b"))
    names, chosen = tuple(groups), averaged_layers(groups, layers)
    if isinstance(alpha, Mapping):
        moved = check_coordinates(alpha, names)
        differing = set() if layers is None else set(chosen).symmetric_difference(moved)
        if differing:
            name = min(differing, key=names.index)
            known, other = ("alpha", "layers") if name in moved else ("layers", "alpha")
            raise OptionError(
                f"Layer {name!r} is in {known} and not in {other}: give every averaged layer a coordinate in alpha, or "
                "leave layers out."
            )
    else:
        moved = check_coordinates(dict.fromkeys(chosen, alpha), names)
    return dict.fromkeys(names, 1.0 if base == "b" else 0.0) | moved


def merge_shares(
    groups: Mapping[str, Sequence[str]],
    weights: tuple[float, ...],
    layers: Iterable[str] | str | None,
    base: Literal["a", "b"],
) -> dict[str, Place]:
    """Shares of every layer: the weights for those that are averaged, all of it the base's for the others.

    Raises:
        OptionError: `base` is no choice.
        PartitionError: There is no such layer.
    """
    check_choice("base", base, ("a", "b"))
    averaged = dict.fromkeys(averaged_layers(groups, layers), weights)
    return dict.fromkeys(groups, place_of_base(base, len(weights))) | averaged


def place_of_base(base: Literal["a", "b"], count: int | None = None) -> Place:
    """The place of the base, as a coordinate; of a number of networks with shares, as these."""
    number = "ab".index(base)
    return float(number) if count is None else tuple(float(each == number) for each in range(count))


def refuse_alpha(alpha: Alpha | None) -> None:
    """Refuse a coordinate where there are shares.

    Raises:
        OptionError: It is given.
    """
    if alpha is not None:
        raise OptionError(f"alpha={alpha!r} is a place between two networks, without weights: leave one of them out.")


def averaged_layers(groups: Mapping[str, Sequence[str]], layers: Iterable[str] | str | None) -> list[str]:
    """The layers that are averaged, each once and in order; None for all.

    Raises:
        PartitionError: There is no such layer.
    """
    names = tuple(groups)
    try:
        return [names[index] for index in layer_indices(groups, layers)]
    except PartitionError as error:
        raise PartitionError(f"{error} The rule that cuts networks into layers is partition, another option.") from None
