"""The straight line between two networks, moved along as a whole or layer by layer."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lmc_curvature.errors import OptionError, check_choice
from lmc_curvature.objective.network import check_finite, check_module, entries_of, movable_entries
from lmc_curvature.objective.normalization import POLICIES, BatchNormPolicy
from lmc_curvature.segment.compatibility import check_same_architecture
from lmc_curvature.segment.partition import LayerPartition, PartitionSpec, layer_indices


class Segment:
    """The segment θ(α) = (1−α) θ₁ + α θ₂ between the states of two networks of one architecture.

    Args:
        model_a: The network at α = 0.
        model_b: The network at α = 1. It may be on another device.
        layers: How entries are grouped into layers; see `LayerPartition.of`.
        batch_norm: Under `"interpolate"` running statistics move with their layer; otherwise they are not part of
            the state.

    Attributes:
        partition: The `LayerPartition`.
        start, end: The states θ₁ and θ₂ (copies), on `model_a`'s device.

    Raises:
        ArchitectureMismatchError: The networks differ in modules, entries, shapes, types, or in buffers that the
            segment does not move; lists the differences.
        NonFiniteError: A parameter or moved buffer is infinite or not a number; names it and its network.
        PartitionError: `layers` is not a partition of the entries.
    """

    def __init__(
        self,
        model_a: nn.Module,
        model_b: nn.Module,
        *,
        layers: PartitionSpec = "fused",
        batch_norm: BatchNormPolicy = "interpolate",
    ):
        check_choice("batch_norm", batch_norm, POLICIES)
        check_module("model_a", model_a)
        check_module("model_b", model_b)
        names, _ = (movable_entries(model, batch_norm) for model in (model_a, model_b))
        check_same_architecture(model_a, model_b)
        self.partition = LayerPartition.of(model_a, layers, batch_norm=batch_norm)
        entries_a, entries_b = entries_of(model_a), entries_of(model_b)
        self.start = {name: entries_a[name].detach().clone() for name in names}
        self.end = {name: entries_b[name].detach().clone().to(entries_a[name].device) for name in names}
        check_finite(self.start, "model_a")
        check_finite(self.end, "model_b")

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, in the order of the network."""
        return self.partition.names

    def directions(self) -> dict[str, dict[str, Tensor]]:
        """Layer name to the direction Δ_ℓ = P_ℓ (θ₂ − θ₁): a sparse state with that layer's entries only."""
        return {
            layer: {name: self.end[name] - self.start[name] for name in self.partition.entries(layer)}
            for layer in self.layers
        }

    def point(self, alpha: float, layers: Iterable[str] | str | None = None) -> dict[str, Tensor]:
        """The state θ₁ + α P_S Δ: the layers of the set S moved to α, the others left at θ₁.

        Entries that do not move are shared with `start`, not copied.

        Args:
            alpha: Position in [0, 1].
            layers: Names of the layers that move; None for all.

        Raises:
            OptionError: `alpha` lies outside [0, 1].
            PartitionError: The set names an unknown layer.
        """
        if not 0.0 <= alpha <= 1.0:
            raise OptionError(f"alpha={alpha} lies outside the segment; expected a number in [0, 1].")
        state = dict(self.start)
        for index in layer_indices(self.layers, layers):
            for name in self.partition.entries(self.layers[index]):
                # torch.lerp returns the end itself, bit for bit, at alpha = 1.
                state[name] = torch.lerp(self.start[name], self.end[name], alpha)
        return state

    def reversed(self) -> "Segment":
        """This segment walked from θ₂ to θ₁."""
        return _SegmentOfStates(self.end, self.start, self.partition)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Segment":
        """This segment with its states on another device or of another floating-point type."""
        start, end = (
            {name: tensor.to(device=device, dtype=dtype) for name, tensor in state.items()}
            for state in (self.start, self.end)
        )
        return _SegmentOfStates(start, end, self.partition)


class _SegmentOfStates(Segment):
    """The segment between two states that are known to fit together."""

    def __init__(self, start: dict[str, Tensor], end: dict[str, Tensor], partition: LayerPartition):
        self.start, self.end, self.partition = start, end, partition
