"""Two checkpoints compared before anything is computed of them."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lmc_curvature.checkpoints.streaming import MappedCheckpoint
from lmc_curvature.errors import NonFiniteError, counted
from lmc_curvature.merging.descriptions import setting_notes
from lmc_curvature.merging.mapping import map_checkpoints
from lmc_curvature.segment import LayerPartition, PartitionSpec
from lmc_curvature.segment.segment import EQUAL

_CHUNK = 1 << 22
_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class CheckpointComparison:
    """What two checkpoints of one form have in common, and where they differ.

    Attributes:
        entries: How many entries move between them, tied ones once.
        numbers: How many numbers these hold.
        layers: Names of the layers; empty where they cannot be told.
        distances: Distance of the parameters of each layer; None if they were not read.
        notes: Sentences on what differs and is no obstacle.
        same_types: Whether every entry has one type in both.
    """

    entries: int
    numbers: int
    layers: tuple[str, ...]
    distances: tuple[float, ...] | None
    notes: tuple[str, ...]
    same_types: bool = True

    @property
    def distance(self) -> float | None:
        """Distance of all parameters; None if they were not read."""
        return None if self.distances is None else math.hypot(*self.distances)

    def __str__(self) -> str:
        counts = f"{counted(self.entries, 'entry')} with {self.numbers:,} numbers"
        layers = f" in {counted(len(self.layers), 'layer')}" if self.layers else ""
        what = "Names, shapes and types" if self.same_types else "Names and shapes"
        lines = [
            f"{what} match ({counts}{layers}). Whether the average is any good: `lmc-curvature predict` or `select`."
        ]
        if self.distance is not None:
            lines.append(f"  distance {self.distance:.4g}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def check_checkpoints(
    path_a: str | os.PathLike[str],
    path_b: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    partition: PartitionSpec | None = None,
    distances: bool = False,
    key: str | None = None,
    strip_prefix: str | None = None,
) -> CheckpointComparison:
    """Compare two checkpoints by their headers: whether their entries match, and what differs.

    Args:
        path_a: The first; see `load_checkpoint`.
        path_b: The second.
        model: A network that both should fit, of whatever values.
        partition: How entries are grouped into layers; see `LayerPartition.of`, and without a network
            `LayerPartition.of_names`. None leaves layers out.
        distances: Also read the numbers, for the distance of each layer, or of each entry where layers are left out.
        key: The key of the state dict; see `load_checkpoint`.
        strip_prefix: What the names of the entries begin with.

    Raises:
        CheckpointError: A checkpoint cannot be read, or does not fit the network.
        ArchitectureMismatchError: They differ in entries or shapes, or in what does not move; lists the differences.
        UnsupportedModelError: Both factors of a low-rank update differ; see `check_adapters`.
        NonFiniteError: Numbers were read, and some are infinite or not a number.
        PartitionError: The partition is none.
    """
    (a, b), owners = map_checkpoints((path_a, path_b), model, key=key, strip_prefix=strip_prefix)
    names = list(dict.fromkeys(owners.values()))
    known = {owner: a.forms[name] for name, owner in owners.items() if name in a.forms}
    if partition is None:
        groups: Mapping[str, Sequence[str]] = {name: (name,) for name in names} if distances else {}
    elif model is None:
        groups = LayerPartition.of_names(names, partition).groups
    else:
        groups = LayerPartition.of(model, partition).groups
    found, notes = None, [*_differences(a, b), *setting_notes(a.path, b.path)]
    if distances:
        squares = _squared_distances(a, b, owners)
        parameters = {name: value for name, value in squares.items() if name.rpartition(".")[2] not in _STATISTICS}
        found = tuple(math.sqrt(sum(parameters.get(entry, 0.0) for entry in members)) for members in groups.values())
        if not any(squares.values()):
            notes.append(f"{EQUAL}: is the same file given twice?")
    elif Path(path_a).samefile(path_b):
        notes.append("Both are the same file.")
    numbers = sum(form.numel() for form in known.values())
    same_types = not _retyped(a, b)
    return CheckpointComparison(len(names), numbers, tuple(groups), found, tuple(notes), same_types)


def _differences(a: MappedCheckpoint, b: MappedCheckpoint) -> list[str]:
    """What differs between the files and makes no difference to a network that is loaded from them."""
    notes = []
    for first, second in ((a, b), (b, a)):
        alone = [name for name in first.forms if name not in second.forms]
        if alone:
            notes.append(
                f"{counted(len(alone), 'entry')} in {first.path} alone, {alone[0]!r} first: counters of batches, or "
                "further names of tied parameters"
            )
    retyped = _retyped(a, b)
    if retyped:
        types = [str(each.forms[retyped[0]].dtype).removeprefix("torch.") for each in (a, b)]
        notes.append(
            f"{counted(len(retyped), 'entry')} of another type, {retyped[0]!r} first: {types[0]} in {a.path}, "
            f"{types[1]} in {b.path}"
        )
    return notes


def _retyped(a: MappedCheckpoint, b: MappedCheckpoint) -> list[str]:
    return [name for name in a.forms if name in b.forms and a.forms[name].dtype != b.forms[name].dtype]


def _squared_distances(a: MappedCheckpoint, b: MappedCheckpoint, owners: Mapping[str, str]) -> dict[str, float]:
    """Squared distance of each entry that moves, by the name that a partition knows, read part by part."""
    inside = {owner: name for name, owner in reversed(list(owners.items())) if name in a.forms}
    other = {owner: name for name, owner in reversed(list(owners.items())) if name in b.forms}
    squares = {}
    for owner, name in inside.items():
        first, second = a[name].reshape(-1), b[other[owner]].reshape(-1)
        total = 0.0
        for start in range(0, first.numel(), _CHUNK):
            pieces = [tensor[start : start + _CHUNK].double() for tensor in (first, second)]
            if torch.equal(*pieces):
                # Masks may hold infinity.
                continue
            for piece, checkpoint in zip(pieces, (a, b), strict=True):
                _check_finite(piece, name, checkpoint)
            total += float(((pieces[1] - pieces[0]) ** 2).sum())
        squares[owner] = total
    return squares


def _check_finite(piece: Tensor, name: str, checkpoint: MappedCheckpoint) -> None:
    if not bool(torch.isfinite(piece).all()):
        raise NonFiniteError(
            f"Entry {name!r} of {checkpoint.path} has values that are infinite or not a number. Has its training "
            "diverged?"
        )
