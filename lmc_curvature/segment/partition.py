"""Partitions of a state into layers, by the names of its entries."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lmc_curvature.errors import PartitionError, counted, suggest
from lmc_curvature.objective.network import movable_entries, tied_names
from lmc_curvature.objective.normalization import BatchNormPolicy
from lmc_curvature.objective.wrappers import unwrap
from lmc_curvature.plotting.summary import Display, Summary, some
from lmc_curvature.segment.frozen import Frozen, frozen_entries
from lmc_curvature.segment.norms import weights_of_norms


@dataclass(frozen=True, repr=False)
class LayerPartition(Display):
    """Named layers that together hold each entry of a state exactly once.

    Attributes:
        groups: Layer name to the names of its entries, in the order of the network.
    """

    groups: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        spec: "PartitionSpec" = "fused",
        *,
        batch_norm: BatchNormPolicy = "interpolate",
        frozen: Frozen = (),
    ) -> "LayerPartition":
        """Group the movable entries of a network into layers.

        Tied parameters belong, once, to the layer of the name they are listed under first.

        Args:
            model: The network.
            spec: One of

                - `"fused"`: each module that carries weights, with the normalisation that belongs to it: the one
                  right after it, or the one that feeds it, as in blocks of pre-norm transformers; see
                  `weights_of_norms`;
                - `"module"`: each module that holds parameters itself;
                - `"tensor"`: each entry;
                - `"block"` or `"block:DEPTH"`: the first DEPTH components of the module's name (default 1);
                - a mapping from layer name to regular expressions, searched in the entry's name; the first layer
                  that matches takes the entry;
                - a function from entry name to layer name;
                - a `LayerPartition`, which is checked against the network.
            batch_norm: The policy decides whether running statistics are among the entries.
            frozen: Layers or entries that are left out, in no layer; see `frozen_entries`. The specification may
                leave them out, too.

        Raises:
            PartitionError: The specification is not understood, leaves an entry out, or has a layer without entries;
                or `frozen` matches nothing.
            OptionError: Every entry is frozen.
        """
        model = unwrap(model)
        entries = movable_entries(model, batch_norm)
        groups = _groups(spec, model, entries)
        out = frozen_entries(frozen, model, entries, groups)
        if isinstance(spec, LayerPartition):
            _check_cover(groups, entries, out)
        elif left_out := [entry for entry in entries if entry not in out.union(*groups.values())]:
            raise PartitionError(
                f"No layer matches {_listing(left_out)}: a partition covers every entry. Add a last layer with the "
                "pattern '.*' for the rest."
            )
        kept = {layer: tuple(entry for entry in members if entry not in out) for layer, members in groups.items()}
        return cls({layer: members for layer, members in kept.items() if members})

    @classmethod
    def of_names(cls, entries: Sequence[str], spec: "PartitionSpec") -> "LayerPartition":
        """Group entries into layers by their names alone, without the network that they are of.

        Args:
            entries: Their names.
            spec: As in `of`, but for `"fused"`, which asks the network for its normalisations.

        Raises:
            PartitionError: As in `of`; or the specification is `"fused"`.
        """
        if spec == "fused":
            raise PartitionError(
                "The partition 'fused' asks the network which normalisation belongs to which layer, and here are names "
                "of entries alone: name the network (--model on the command line), or choose 'module', 'tensor' or "
                "'block:DEPTH'."
            )
        groups = _groups(spec, nn.Module(), entries)
        _check_cover(groups, entries, ())
        return cls({layer: tuple(members) for layer, members in groups.items()})

    def _summary(self) -> Summary:
        shown = [f"{name} ({counted(len(members), 'entry')})" for name, members in self.groups.items()]
        count = sum(map(len, self.groups.values()))
        title = f"LayerPartition of {counted(count, 'entry')} into {counted(len(self.groups), 'layer')}"
        return Summary(title, {"layers": some(shown)}, ".names, .groups, .entries(layer), .layer_of(entry)")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers, in the order of the network."""
        return tuple(self.groups)

    def entries(self, name: str) -> tuple[str, ...]:
        """Names of the entries of one layer.

        Raises:
            PartitionError: There is no such layer.
        """
        layer_indices(self.groups, [name])
        return self.groups[name]

    def layer_of(self, entry: str) -> str:
        """Name of the layer that holds an entry.

        Raises:
            PartitionError: No layer holds it.
        """
        owners = {member: name for name, members in self.groups.items() for member in members}
        if entry not in owners:
            raise PartitionError(f"No layer holds an entry {entry!r}: {suggest(entry, owners)}")
        return owners[entry]


PartitionSpec = LayerPartition | str | Mapping[str, Sequence[str]] | Callable[[str], str]
"""A specification that `LayerPartition.of` understands."""


def layer_indices(names: Sequence[str] | Mapping[str, Sequence[str]], layers: Iterable[str] | str | None) -> list[int]:
    """Positions of a set of layers (None: all of them) among `names`, each once and in order.

    Args:
        names: Names of all layers; those of their entries, too, tell of what a module is a part.
        layers: The set.

    Raises:
        PartitionError: A layer of the set is not among the names; suggests the nearest.
    """
    if layers is None:
        return list(range(len(names)))
    members = {layers} if isinstance(layers, str) else set(layers)
    for name in sorted(members, key=str):
        if name not in names:
            raise PartitionError(
                f"There is no layer {name!r}: {_owners(str(name), names) or suggest(str(name), names)}"
            )
    return [index for index, name in enumerate(names) if name in members]


def _owners(name: str, groups: Sequence[str] | Mapping[str, Sequence[str]]) -> str | None:
    """Of which layers an entry or a module is a part, in words; None if it is of none that is known."""
    if not isinstance(groups, Mapping):
        return None
    inside = [layer for layer, own in groups.items() if any(f"{entry}.".startswith(f"{name}.") for entry in own)]
    if len(inside) > 1:
        return f"{name} is in layers {_listing(inside)}."
    return f"{name} is part of layer {inside[0]!r}." if inside else None


_SPECS = "'fused', 'module', 'tensor', 'block' or 'block:DEPTH'"


def _groups(spec: PartitionSpec, model: nn.Module, entries: Sequence[str]) -> Mapping[str, Sequence[str]]:
    """Layer name to the names of its entries, before it is known whether they cover all."""
    if isinstance(spec, LayerPartition):
        return spec.groups
    if isinstance(spec, str):
        layer_of = _named_rule(spec, model)
    elif isinstance(spec, Mapping):
        return _pattern_groups(spec, entries, tied_names(model))
    elif callable(spec):
        layer_of = spec
    else:
        raise PartitionError(
            f"layers={spec!r} is not a partition: expected {_SPECS}, a mapping from layer name to regular "
            "expressions, or a function from entry name to layer name."
        )
    groups: dict[str, list[str]] = {}
    for entry in entries:
        layer = layer_of(entry)
        if not isinstance(layer, str):
            raise PartitionError(f"The partition function returned {layer!r} for entry {entry!r}; expected a string.")
        groups.setdefault(layer, []).append(entry)
    return groups


def _named_rule(spec: str, model: nn.Module) -> Callable[[str], str]:
    if spec == "tensor":
        return lambda entry: entry
    if spec == "module":
        return _holder
    if spec == "fused":
        joined = weights_of_norms(model)
        return lambda entry: joined.get(_holder(entry), _holder(entry))
    if block := re.fullmatch(r"block(?::([1-9]\d*))?", spec):
        depth = int(block[1] or 1)
        return lambda entry: ".".join(_holder(entry).split(".")[:depth])
    raise PartitionError(f"layers={spec!r} is not a partition: {suggest(spec, ['fused', 'module', 'tensor', 'block'])}")


def _holder(entry: str) -> str:
    """Name of the module that holds an entry; the entry's own name if the network holds it directly."""
    module, _, name = entry.rpartition(".")
    # A parametrised weight lives in a child of the module whose weight it is.
    return module.split(".parametrizations.")[0] or name


def _pattern_groups(
    patterns: Mapping[str, Sequence[str]], entries: Sequence[str], tied: Mapping[str, str]
) -> dict[str, list[str]]:
    compiled: dict[str, list[re.Pattern[str]]] = {}
    for layer, expressions in patterns.items():
        expressions = [expressions] if isinstance(expressions, str) else expressions
        try:
            compiled[layer] = [re.compile(expression) for expression in expressions]
        except re.error as error:
            raise PartitionError(f"Layer {layer!r} has a bad regular expression {error.pattern!r}: {error}.") from error

    def matches(layer: str, entry: str) -> bool:
        return any(pattern.search(entry) for pattern in compiled[layer])

    groups: dict[str, list[str]] = {}
    for entry in entries:
        layer = next((layer for layer in patterns if matches(layer, entry)), None)
        if layer is not None:
            groups.setdefault(layer, []).append(entry)
    for layer in patterns:
        if layer not in groups:
            aliases = [f"{name!r} is tied to {first!r}" for name, first in tied.items() if matches(layer, name)]
            reason = f" ({aliases[0]})" if aliases else ""
            raise PartitionError(f"Layer {layer!r} matches no entry that an earlier layer has not taken{reason}.")
    return groups


def _check_cover(groups: Mapping[str, Sequence[str]], entries: Sequence[str], frozen: Collection[str]) -> None:
    held = Counter(entry for members in groups.values() for entry in members)
    faults = {
        "holds twice": sorted(entry for entry, times in held.items() if times > 1),
        "has unknown": sorted(held.keys() - set(entries)),
        "leaves out": [entry for entry in entries if entry not in held and entry not in frozen],
        "has no entry in layer": [layer for layer, members in groups.items() if not members],
    }
    found = "; ".join(f"{fault} {_listing(names)}" for fault, names in faults.items() if names)
    if found:
        raise PartitionError(f"The partition {found}: it must cover each entry of the network once.")


def _listing(names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
