"""The straight line between two networks, moved along as a whole or layer by layer."""

import contextlib
import copy
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lmc_curvature.errors import OptionError, PartitionError, UnsupportedModelError, check_choice, counted
from lmc_curvature.objective.network import check_finite, check_module, entries_of, movable_entries
from lmc_curvature.objective.normalization import POLICIES, BatchNormPolicy
from lmc_curvature.objective.numerics import outside_inference, wide_dtype
from lmc_curvature.objective.wrappers import unwrap
from lmc_curvature.plotting.summary import Display, Summary, some
from lmc_curvature.segment.adapters import check_adapters
from lmc_curvature.segment.compatibility import check_same_architecture
from lmc_curvature.segment.frozen import REQUIRES_GRAD, Frozen, frozen_choices
from lmc_curvature.segment.partition import LayerPartition, PartitionSpec, layer_indices


class Segment(Display):
    """The segment θ(α) = (1−α) θ₁ + α θ₂ between the states of two networks of one architecture.

    Args:
        model_a: The network at α = 0.
        model_b: The network at α = 1. It may be on another device.
        layers: How entries are grouped into layers; see `LayerPartition.of`.
        batch_norm: Under `"interpolate"` running statistics move with their layer; otherwise they are not part of
            the state.
        frozen: What stays where it is, in no layer: names of layers, regular expressions for entries, or
            `"requires_grad"` for what does not require gradients; see `frozen_entries`. Running statistics stay
            under `"interpolate"` only: the other policies take those of the data everywhere.
        base: The network at which it stays, `"a"` or `"b"`: both ends have the frozen entries of that one.

    Attributes:
        partition: The `LayerPartition` of what moves.
        whole: The same with running statistics in their layers, whether or not they are part of the state.
        base: The network at which the rest stays, `"a"` or `"b"`; in a `Hull` it may be `"other"` than both ends.
        start, end: The states θ₁ and θ₂ (copies), as the networks are in evaluation mode, on `model_a`'s device.

    Raises:
        ArchitectureMismatchError: The networks differ in entries, shapes, types, ties, or in buffers that the segment
            does not move; lists the differences.
        UnsupportedModelError: The networks have no entry that can move, or both factors of a low-rank adapter move.
        NonFiniteError: A parameter or moved buffer is infinite or not a number; names it and its network.
        PartitionError: `layers` is not a partition of the entries, or `frozen` matches nothing.
        OptionError: `batch_norm` or `base` is not a choice, or everything is frozen.
    """

    @outside_inference()
    def __init__(
        self,
        model_a: nn.Module,
        model_b: nn.Module,
        *,
        layers: PartitionSpec = "fused",
        batch_norm: BatchNormPolicy = "interpolate",
        frozen: Frozen = (),
        base: Literal["a", "b"] = "a",
    ):
        check_choice("batch_norm", batch_norm, POLICIES)
        check_choice("base", base, ("a", "b"))
        check_module("model_a", model_a)
        check_module("model_b", model_b)
        model_a, model_b = unwrap(model_a), unwrap(model_b)
        names, _ = (movable_entries(model, batch_norm) for model in (model_a, model_b))
        check_same_architecture(model_a, model_b)
        if not names:
            raise UnsupportedModelError(
                "Nothing can move between the two networks, which have no parameters. Quantised layers keep their "
                "weights elsewhere: pass the networks as they were before quantisation."
            )
        choices = frozen_choices(frozen)
        fixed = model_b if base == "b" else model_a
        self.partition = LayerPartition.of(fixed, layers, batch_norm=batch_norm, frozen=choices)
        self._parameters = {name for name, _ in fixed.named_parameters()}
        self.base: Literal["a", "b", "other"] = base
        self.whole = self.partition
        if batch_norm != "interpolate":
            # A specification of one's own may know of no running statistics.
            with contextlib.suppress(PartitionError):
                self.whole = LayerPartition.of(fixed, layers, frozen=choices)
        moved = {entry for members in self.partition.groups.values() for entry in members}
        entries, still = [entries_of(model) for model in (model_a, model_b)], entries_of(fixed)
        self.start, self.end = (
            {
                name: (own if name in moved else still)[name].detach().clone().to(entries[0][name].device)
                for name in names
            }
            for own in entries
        )
        for owner, state in {"a": self.start, "b": self.end}.items():
            check_finite({n: t for n, t in state.items() if n in moved or owner == base}, f"model_{owner}")
        check_adapters([name for name in names if name in moved and not torch.equal(self.start[name], self.end[name])])
        others = [name for name in names if name not in moved]
        differ = sum(
            not torch.equal(*(own[name].detach().to(entries[0][name].device) for own in entries)) for name in others
        )
        # Whether the floating-point type was asked for.
        self._is_of_type = False
        of_other = f", {differ} of which are others in model_{'a' if base == 'b' else 'b'}" if differ else ""
        self._notes = frozen_notes(choices, f"model_{base}", counted(len(others), "entry") + of_other)

    def _summary(self) -> Summary:
        distances, layers = self.distances(), self.layers
        first = next(iter(self.start.values()))
        movable = [name for members in self.partition.groups.values() for name in members]
        far = np.argsort(distances, kind="stable")[::-1]
        return Summary(
            f"Segment between two networks, {counted(len(layers), 'layer')} with "
            f"{sum(self.start[name].numel() for name in movable):,} numbers that move",
            {
                "distance": f"{float(np.linalg.norm(distances)):.4g}",
                "farthest layers": some([f"{layers[index]} {distances[index]:.3g}" for index in far]),
                "entries": f"{len(movable)} of {len(self.start)} move",
                "device, dtype": f"{first.device}, {first.dtype}",
                **({"notes": some(self.notes)} if self.notes else {}),
            },
            ".layers, .directions(), .point(alpha, layers), .distances(), .partition",
        )

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, in the order of the network."""
        return self.partition.names

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences that belong beside every number computed from it: what is frozen, and equal ends."""
        return self._notes + ((EQUAL,) if self.is_point else ())

    @property
    def is_point(self) -> bool:
        """Whether both ends are one state, so that nothing moves."""
        return all(torch.equal(tensor, self.end[name]) for name, tensor in self.start.items())

    def directions(self) -> dict[str, dict[str, Tensor]]:
        """Layer name to the direction Δ_ℓ = P_ℓ (θ₂ − θ₁): a sparse state with that layer's entries only.

        Of networks in half precision they are, like points between the ends, in single precision, unless `to` was told
        another type.
        """
        return {
            layer: {n: self._wide(self.end[n]) - self._wide(self.start[n]) for n in self.partition.entries(layer)}
            for layer in self.layers
        }

    def distances(self) -> Float[np.ndarray, " L"]:
        """Norms of the directions over parameters: running statistics have another scale, and are left out."""
        return self._norms(lambda name: self.end[name].double() - self.start[name].double())

    def norms(self) -> Float[np.ndarray, "2 L"]:
        """Norms over parameters of each layer at both ends."""
        return np.stack([self._norms(end.__getitem__) for end in (self.start, self.end)])

    def _norms(self, tensor_of: Callable[[str], Tensor]) -> Float[np.ndarray, " L"]:
        groups = [self._parameters.intersection(entries) for entries in self.partition.groups.values()]
        return np.sqrt(
            [sum(float((tensor_of(name).double() ** 2).sum()) for name in sorted(names)) for names in groups]
        )

    def point(self, alpha: float, layers: Iterable[str] | str | None = None) -> dict[str, Tensor]:
        """The state θ₁ + α P_S Δ: the layers of the set S moved to α, the others left at θ₁.

        Entries that do not move, or to the end, are shared with `start` or `end`, not copied.

        Args:
            alpha: Position in [0, 1].
            layers: Names of the layers that move; None for all.

        Raises:
            OptionError: `alpha` lies outside [0, 1].
            PartitionError: The set names an unknown layer.
        """
        if not 0.0 <= alpha <= 1.0:
            raise OptionError(f"alpha={alpha} lies outside the segment; expected a number in [0, 1].")
        return self.at({self.layers[index]: alpha for index in layer_indices(self.layers, layers)})

    @outside_inference()
    def at(self, alphas: Mapping[str, float]) -> dict[str, Tensor]:
        """The state θ₁ + Σ x_ℓ Δ_ℓ: each layer moved by a coordinate of its own.

        Entries that do not move, or to the end, are shared with `start` or `end`, not copied.

        Args:
            alphas: Layer name to its coordinate in [0, 1]; layers without one are left at θ₁.

        Raises:
            OptionError: A coordinate lies outside [0, 1].
            PartitionError: There is no such layer.
        """
        state = dict(self.start)
        for layer, alpha in check_coordinates(alphas, self.layers).items():
            for name in self.partition.entries(layer) if alpha else ():
                first, second = self.start[name], self.end[name]
                inside = 0 < alpha < 1
                state[name] = torch.lerp(self._wide(first), self._wide(second), alpha) if inside else second
        return state

    def reversed(self) -> "Segment":
        """This segment walked from θ₂ to θ₁."""
        return self.between(self.end, self.start)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Segment":
        """This segment with its states on another device or of another floating-point type."""
        start, end = (
            {name: tensor.to(device=device, dtype=dtype) for name, tensor in state.items()}
            for state in (self.start, self.end)
        )
        segment = self.between(start, end)
        segment._is_of_type |= dtype is not None
        return segment

    def _wide(self, tensor: Tensor) -> Tensor:
        # What lies between two numbers of half precision would be rounded to one of them, or nearly so.
        return tensor if self._is_of_type else tensor.to(wide_dtype(tensor.dtype))

    def between(
        self,
        start: dict[str, Tensor],
        end: dict[str, Tensor],
        *,
        base: Literal["a", "b", "other"] | None = None,
        notes: tuple[str, ...] | None = None,
    ) -> "Segment":
        """A segment of the same layers between two other states, which have the entries of its own ends.

        Args:
            start: The one state.
            end: The other.
            base: Which of them has the frozen entries as a network's own; by default as here.
            notes: Sentences that belong beside its numbers; by default those of this one.
        """
        segment = copy.copy(self)
        segment.start, segment.end = start, end
        segment.base = base or self.base
        segment._notes = self._notes if notes is None else notes
        return segment


def check_coordinates(alphas: Mapping[str, float], layers: Sequence[str]) -> dict[str, float]:
    """Coordinates of layers, each a number in [0, 1].

    Raises:
        OptionError: One is not; names the layer.
        PartitionError: A layer is none of those given.
    """
    layer_indices(layers, alphas)
    for layer, alpha in alphas.items():
        if isinstance(alpha, bool) or not isinstance(alpha, numbers.Real) or not 0 <= alpha <= 1:
            raise OptionError(f"alpha={alpha!r} of layer {layer!r} lies outside the cube; expected a number in [0, 1].")
    return {layer: float(alpha) for layer, alpha in alphas.items()}


EQUAL = "model_a and model_b are equal in every entry that moves"


def frozen_notes(frozen: tuple[str, ...], base: str, counts: str) -> tuple[str, ...]:
    """What is frozen, at which network, and how many entries these are; nothing, if nothing is."""
    names = ("what does not require gradients" if choice == REQUIRES_GRAD else choice for choice in frozen)
    return (f"frozen at {base}: {', '.join(names)} ({counts})",) if frozen else ()
