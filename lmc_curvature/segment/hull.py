"""What lies between several networks of one architecture: each layer anywhere in their convex hull."""

import copy
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lmc_curvature.errors import OptionError, counted, naming, suggest
from lmc_curvature.objective.network import State, entries_of, equal
from lmc_curvature.objective.normalization import BatchNormPolicy
from lmc_curvature.objective.numerics import outside_inference
from lmc_curvature.objective.wrappers import unwrap
from lmc_curvature.plotting.summary import Display, Summary, some
from lmc_curvature.segment.adapters import check_adapters
from lmc_curvature.segment.frozen import Frozen, frozen_choices
from lmc_curvature.segment.partition import PartitionSpec, layer_indices
from lmc_curvature.segment.points import StatePoints
from lmc_curvature.segment.segment import Segment, frozen_notes

Weights = Mapping[str, float | int] | Sequence[float | int] | Float[np.ndarray, " networks"]
"""What each network counts for in a mean: in the order of the networks, or by their names."""

# Weights that are shares of something, as examples, sum to one but for rounding; and so points are told apart.
_ROUNDING, _DIGITS = 1e-6, 12
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Hull(Display):
    """The states between N networks, every layer ℓ with a place of its own: θ_ℓ(x) = Σ_k x_ℓk θ_kℓ.

    A point x is an array (L, N), whose rows are not negative and sum to one. For two networks it is the cube of layers
    of their `Segment`, whose coordinates are the second column.

    Args:
        models: The networks; they are not modified, and may be on different devices.
        names: A name for each; see `network_names`.
        layers: How entries are grouped into layers; see `LayerPartition.of`.
        batch_norm: Under `"interpolate"` running statistics move with their layer; otherwise they are not part of
            the states.
        frozen: What stays where it is, in no layer; see `Segment`.
        base: Name of the network at which it stays, whose frozen entries all states have; by default the first.

    Attributes:
        names: Names of the networks.
        states: The state of each, on the device of the base.
        notes: Sentences that belong beside every number computed from it: what is frozen.

    Raises:
        LMCCurvatureError: The networks cannot be averaged, for one of the reasons of `Segment`; names the two. Or the
            base is none of them.
    """

    @outside_inference()
    def __init__(
        self,
        models: Sequence[nn.Module],
        names: Sequence[str],
        *,
        layers: PartitionSpec = "fused",
        batch_norm: BatchNormPolicy = "interpolate",
        frozen: Frozen = (),
        base: str | None = None,
    ):
        self.names, segments = tuple(names), []
        (self._base,) = network_indices(self.names[0] if base is None else base, self.names)
        fixed, choices = self.names[self._base], frozen_choices(frozen)
        for name, other in zip(self.names, models, strict=True):
            if name != fixed:
                with naming(two_networks(fixed, name)):
                    segments.append(
                        Segment(models[self._base], other, layers=layers, batch_norm=batch_norm, frozen=choices)
                    )
        self._segment = segments[0]
        own, ends = self._segment.start, [segment.end for segment in segments]
        self.states = (*ends[: self._base], own, *ends[self._base :])
        moved = {entry for members in self.groups.values() for entry in members}
        still = [name for name in own if name not in moved]
        # What was never trained is frozen at all of them alike.
        self._has_frozen = np.array([_all_equal(entries_of(unwrap(model)), own, still) for model in models])
        others = [name for name, alike in zip(self.names, self._has_frozen, strict=True) if not alike]
        counts = counted(len(still), "entry") + (f", others in {', '.join(others)}" if others else "")
        self.notes = frozen_notes(choices, fixed, counts)
        # One network may move one factor of an update, and another the other.
        check_adapters([name for name in own if not all(torch.equal(own[name], end[name]) for end in ends)])

    def _summary(self) -> Summary:
        return Summary(
            f"Hull of {counted(len(self.names), 'network')}, {counted(len(self.layers), 'layer')}",
            {"networks": some(self.names), "layers": some(self.layers)},
            ".at(x), .line(start, end), .states",
        )

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the L layers, in the order of the network."""
        return self._segment.layers

    @property
    def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Layer name to the names of its entries."""
        return self._segment.partition.groups

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Hull":
        """This hull with its states on another device or of another floating-point type."""
        hull = copy.copy(self)
        hull.states = tuple(
            {name: tensor.to(device=device, dtype=dtype) for name, tensor in state.items()} for state in self.states
        )
        hull._segment = self._segment.between(*hull.states[:2]).to(device, dtype)
        return hull

    def corner(self, number: int) -> Float[np.ndarray, " N"]:
        """The place of a network, for all layers alike."""
        return np.eye(len(self.names))[number]

    def at(self, x: Float[np.ndarray, "#L N"]) -> dict[str, Tensor]:
        """The state θ_ℓ(x) = Σ_k x_ℓk θ_kℓ: a running mean, in which equal entries stay as they are.

        Entries may be shared with `states`.

        Args:
            x: The place of each layer, or one for all.
        """
        x = np.broadcast_to(x, (len(self.layers), len(self.names)))
        (whole,) = np.nonzero((x == 1).all(axis=0))
        if whole.size:
            return dict(self.states[whole[0]])
        state, total = self.states[0], x[:, 0]
        for network, share in zip(self.states[1:], x.T[1:], strict=True):
            total = total + share
            # Of what has no share nothing is taken, not even its type.
            steps = {layer: s / t for layer, s, t in zip(self.layers, share, total, strict=True) if s > 0}
            state = self._segment.between(state, network).at(steps)
        return state

    def line(self, start: Float[np.ndarray, " N"], end: Float[np.ndarray, " N"]) -> Segment:
        """The segment between two places, each for all layers alike."""
        has_frozen = [not self.notes or start[self._has_frozen].max() == 1, end[self._has_frozen].max() == 1]
        base = "a" if has_frozen[0] else "b" if has_frozen[1] else "other"
        return self._segment.between(self.at(start[None]), self.at(end[None]), base=base, notes=self.notes)

    def mixture(
        self, outside: Float[np.ndarray, " N"], inside: Float[np.ndarray, " N"], layers: Iterable[str] | str | None
    ) -> Float[np.ndarray, "L N"]:
        """The point with a set of layers at one place, and all other layers at another.

        Raises:
            PartitionError: There is no such layer.
        """
        x = np.tile(outside, (len(self.layers), 1))
        x[layer_indices(self.groups, layers)] = inside
        return x


class HullPoints(StatePoints):
    """States in a hull, without repetitions; the first are the networks themselves."""

    def __init__(self, hull: Hull):
        self._hull = hull
        self._places: list[tuple[np.ndarray, str]] = []
        self._numbers: dict[bytes, int] = {}
        self.networks = tuple(self.add(hull.corner(k)[None], name) for k, name in enumerate(hull.names))

    def add(self, x: Float[np.ndarray, "#L N"], description: str) -> int:
        """Number of the state at a place, which errors call as the first who has asked for it."""
        x = np.broadcast_to(x, (len(self._hull.layers), len(self._hull.names)))
        key = place_key(x)
        if key not in self._numbers:
            self._numbers[key] = len(self._places)
            self._places.append((x, description))
        return self._numbers[key]

    def describe(self, number: int) -> str:
        """Say for an error message which state it is."""
        return self._places[number][1]

    def state(self, number: int) -> dict[str, Tensor]:
        """The state of a number."""
        return self._hull.at(self._places[number][0])

    def __len__(self) -> int:
        return len(self._places)


def place_key(x: np.ndarray) -> bytes:
    """What two places have in common if they are one but for rounding."""
    # Adding zero takes the sign from -0.
    return (np.round(x, _DIGITS) + 0.0).tobytes()


def two_networks(first: str, second: str) -> str:
    """What errors that know of two networks alone begin with; nothing where these are called as those are."""
    return "" if (first, second) == ("model_a", "model_b") else f"Networks {first!r} (model_a) and {second!r} (model_b)"


def _all_equal(state: State, other: State, names: Iterable[str]) -> bool:
    return all(equal(state[name].detach().to(other[name].device), other[name]) for name in names)


def network_names(count: int, names: Iterable[str] | None = None) -> tuple[str, ...]:
    """Names of several networks: those given, or model_a, model_b, …; numbers, where there are more than letters.

    Raises:
        OptionError: There are fewer than two networks, or names are missing, given twice or no strings.
    """
    if count < 2:
        raise OptionError(f"models holds {counted(count, 'network')}; expected two or more.")
    if names is None:
        return tuple(f"model_{each}" for each in (_LETTERS[:count] if count <= len(_LETTERS) else range(1, count + 1)))
    found = (names,) if isinstance(names, str) else tuple(names)
    for name in found:
        if not isinstance(name, str):
            raise OptionError(f"names has {name!r}; expected a string for each network.")
        if found.count(name) > 1:
            raise OptionError(f"names has {name!r} twice: every network needs a name of its own.")
    if len(found) != count:
        raise OptionError(f"names has {counted(len(found), 'name')} for {counted(count, 'network')}.")
    return found


def network_weights(weights: Weights | None, names: Sequence[str]) -> Float[np.ndarray, " networks"]:
    """What each of several networks counts for in their mean: equal shares by default.

    Raises:
        OptionError: A weight is missing, unknown or not positive, or they do not sum to one.
    """
    if weights is None:
        return np.full(len(names), 1 / len(names))
    if isinstance(weights, Mapping):
        for name in weights:
            if name not in names:
                raise OptionError(
                    f"weights has a network {name!r}, of which there is none: {suggest(str(name), names)}"
                )
        for name in names:
            if name not in weights:
                raise OptionError(f"weights has no number for network {name!r}: name every network.")
        weights = [weights[name] for name in names]
    if len(weights) != len(names):
        raise OptionError(f"weights has {counted(len(weights), 'number')} for {counted(len(names), 'network')}.")
    for name, weight in zip(names, weights, strict=True):
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real) or not 0 < weight < math.inf:
            raise OptionError(
                f"The weight of network {name!r} is {weight!r}; expected a positive number. Leave out networks that "
                "count for nothing."
            )
    found = np.array([float(weight) for weight in weights])
    if abs(found.sum() - 1) > _ROUNDING:
        raise OptionError(f"weights sum to {found.sum():.6g}; expected 1: divide each by their sum.")
    return found / found.sum()


def network_indices(networks: Iterable[str] | str, names: Sequence[str]) -> tuple[int, ...]:
    """Positions of some networks among all, in order.

    Raises:
        OptionError: One is unknown or named twice, or there is none.
    """
    chosen = (networks,) if isinstance(networks, str) else tuple(networks)
    if not chosen:
        raise OptionError("An empty set of networks has no mean: name at least one.")
    for name in chosen:
        if name not in names:
            raise OptionError(f"There is no network {name!r}: {suggest(str(name), names)}")
        if chosen.count(name) > 1:
            raise OptionError(f"Network {name!r} is named twice: name it once, and give weights if it counts for more.")
    return tuple(index for index, name in enumerate(names) if name in chosen)
