"""The straight line between two networks, moved along as a whole or layer by layer."""

import copy
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lmc_curvature.errors import ArchitectureMismatchError, OptionError, check_choice
from lmc_curvature.objective.network import check_finite, check_module, movable_entries, tied_names
from lmc_curvature.objective.normalization import POLICIES, BatchNormPolicy, statistic_names, tracked_modules
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
        check_module("model_a", model_a)
        check_module("model_b", model_b)
        check_choice("batch_norm", batch_norm, POLICIES)
        entries = movable_entries(model_a, batch_norm)
        movable_entries(model_b, batch_norm)
        _check_same_architecture(model_a, model_b)
        self.partition = LayerPartition.of(model_a, layers, batch_norm=batch_norm)
        self.start = _state_of(model_a, entries)
        self.end = {name: tensor.to(self.start[name].device) for name, tensor in _state_of(model_b, entries).items()}
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
        """The same segment walked from θ₂ to θ₁."""
        return self._between(self.end, self.start)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Segment":
        """The same segment with its states on another device or of another floating-point type."""
        return self._between(
            {name: tensor.to(device=device, dtype=dtype) for name, tensor in self.start.items()},
            {name: tensor.to(device=device, dtype=dtype) for name, tensor in self.end.items()},
        )

    def _between(self, start: dict[str, Tensor], end: dict[str, Tensor]) -> "Segment":
        segment = copy.copy(self)
        segment.start, segment.end = start, end
        return segment


def _state_of(model: nn.Module, entries: Iterable[str]) -> dict[str, Tensor]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensors[name].detach().clone() for name in entries}


def _check_same_architecture(model_a: nn.Module, model_b: nn.Module) -> None:
    differences = [*_entry_differences(model_a, model_b), *_module_differences(model_a, model_b)]
    if not differences:
        differences = _tie_differences(model_a, model_b)
    if not differences:
        differences = _fixed_buffer_differences(model_a, model_b)
    if differences:
        shown = "\n".join(f"  {line}" for line in differences[:10])
        more = f"\n  … and {len(differences) - 10} more" if len(differences) > 10 else ""
        counts = [_count_weight_modules(model) for model in (model_a, model_b)]
        raise ArchitectureMismatchError(
            f"The two networks are not of one architecture (model_a has {counts[0]} modules with parameters, model_b "
            f"has {counts[1]}):\n{shown}{more}\nBoth must be built alike, so that their entries can be averaged."
        )


def _count_weight_modules(model: nn.Module) -> int:
    return sum(any(True for _ in module.parameters(recurse=False)) for module in model.modules())


def _entry_differences(model_a: nn.Module, model_b: nn.Module) -> list[str]:
    entries_a, entries_b = (
        {**dict(model.named_parameters()), **dict(model.named_buffers())} for model in (model_a, model_b)
    )
    differences = []
    for name in [*entries_a, *(name for name in entries_b if name not in entries_a)]:
        a, b = entries_a.get(name), entries_b.get(name)
        if a is None or b is None:
            tensor, owner = (a, "model_a") if a is not None else (b, "model_b")
            shape = tuple(tensor.shape) if tensor is not None else ()
            differences.append(f"{name}: only in {owner}, with shape {shape}")
        elif a.shape != b.shape:
            differences.append(f"{name}: shape {tuple(a.shape)} in model_a, {tuple(b.shape)} in model_b")
        elif a.dtype != b.dtype:
            differences.append(f"{name}: type {a.dtype} in model_a, {b.dtype} in model_b")
    return differences


def _module_differences(model_a: nn.Module, model_b: nn.Module) -> list[str]:
    kinds_a, kinds_b = (
        {name: _describe_module(module) for name, module in model.named_modules()} for model in (model_a, model_b)
    )
    return [
        f"module {name or '(the network itself)'}: {kinds_a.get(name)} in model_a, {kinds_b.get(name)} in model_b"
        for name in {**kinds_a, **kinds_b}
        if kinds_a.get(name) != kinds_b.get(name)
    ]


def _describe_module(module: nn.Module) -> str:
    """Class and settings of a module: what decides, besides its entries, which function it is."""
    kind = type(module).__qualname__
    # Other packages may print anything there. Dropout is off, and momentum matters in training only.
    if not type(module).__module__.startswith(("torch.", "torchvision.")) or "Dropout" in kind:
        return kind
    settings = re.sub(r"(, )?(momentum|dropout)=[^,)]*", "", module.extra_repr())
    return f"{kind}({settings})" if settings else kind


def _tie_differences(model_a: nn.Module, model_b: nn.Module) -> list[str]:
    tied_a, tied_b = tied_names(model_a), tied_names(model_b)
    return [
        f"{name}: tied to {tied_a.get(name)} in model_a, to {tied_b.get(name)} in model_b"
        for name in {**tied_a, **tied_b}
        if tied_a.get(name) != tied_b.get(name)
    ]


def _fixed_buffer_differences(model_a: nn.Module, model_b: nn.Module) -> list[str]:
    """Buffers that no segment moves: where they differ, no one network lies between the two."""
    bookkeeping = set()
    for name, _ in tracked_modules(model_a):
        counter = f"{name}.num_batches_tracked" if name else "num_batches_tracked"
        bookkeeping |= {*statistic_names(name), counter}
    buffers_b = dict(model_b.named_buffers())
    return [
        f"buffer {name}: its values differ, and a segment moves parameters and running statistics only; make it "
        "equal in both, or a parameter"
        for name, buffer in model_a.named_buffers()
        if name not in bookkeeping and not torch.equal(buffer, buffers_b[name].to(buffer.device))
    ]
