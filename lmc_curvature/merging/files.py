"""The average of two checkpoints, written tensor by tensor."""

import os
import platform
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from torch import Tensor, nn

from lmc_curvature import __version__
from lmc_curvature.checkpoints.streaming import (
    EntryForm,
    MappedCheckpoint,
    digests_of,
    metadata_of,
    write_stream,
)
from lmc_curvature.errors import ArchitectureMismatchError, CheckpointError, NonFiniteError, OptionError, counted
from lmc_curvature.merging.coordinates import Alpha, merge_coordinates
from lmc_curvature.merging.descriptions import setting_notes
from lmc_curvature.merging.recipes import check_plain, write_recipe
from lmc_curvature.objective.network import movable_entries, skeleton_of, tied_names
from lmc_curvature.objective.normalization import is_batch_counter
from lmc_curvature.objective.recalibration import running_statistics
from lmc_curvature.objective.wrappers import unwrap
from lmc_curvature.segment import LayerPartition, PartitionSpec
from lmc_curvature.segment.adapters import check_adapters, factor_pairs
from lmc_curvature.segment.compatibility import entry_differences, refuse_differences
from lmc_curvature.storage import make_header

KIND = "merged checkpoint"
"""What the header of a merged file says that it is, under the name of this library."""

_CHUNK = 1 << 22
# What is not grouped into layers is one of this name; of others, so many are named.
_ALL, _SHOWN = "all layers", 6


@dataclass(frozen=True)
class MergePlan:
    """Which entries of two checkpoints are averaged, and where.

    Attributes:
        a: The checkpoint at coordinate 0.
        b: The checkpoint at coordinate 1.
        base: The one of the two whose entries are kept where nothing is averaged.
        coordinates: Layer name to coordinate.
        entries: Entry name to coordinate, of those that can move.
        owners: The same names to those under which a partition knows the entries: of tied parameters, the first.
    """

    a: MappedCheckpoint
    b: MappedCheckpoint
    base: Literal["a", "b"]
    coordinates: Mapping[str, float]
    entries: Mapping[str, float]
    owners: Mapping[str, str]

    @property
    def kept(self) -> MappedCheckpoint:
        """The checkpoint of the base."""
        return self.b if self.base == "b" else self.a

    @property
    def averaged(self) -> tuple[str, ...]:
        """Names of the layers that are not at the base."""
        still = 1.0 if self.base == "b" else 0.0
        return tuple(layer for layer, alpha in self.coordinates.items() if alpha != still)

    @property
    def moved(self) -> str:
        """What is not at the base, in words: layers, or entries where they are not grouped."""
        if _ALL in self.coordinates:
            entries = counted(len(set(self.owners.values())), "entry")
            return f"all {entries}" if self.averaged else f"none of {entries}"
        shown = ", ".join(self.averaged[:_SHOWN]) + (", …" if len(self.averaged) > _SHOWN else "")
        return f"{len(self.averaged)} of {counted(len(self.coordinates), 'layer')}" + (f" ({shown})" if shown else "")

    def forms(self) -> dict[str, EntryForm]:
        """Entry name to its form in the merged file, which is that of the base."""
        return {name: EntryForm(form.dtype, tuple(form.shape)) for name, form in self.kept.forms.items()}

    def parts(self, name: str) -> Iterator[Tensor]:
        """The numbers of an entry of the merged network, part by part.

        Raises:
            NonFiniteError: Some are infinite or not a number.
        """
        dtype = self.kept.forms[name].dtype
        alpha = self.entries.get(name)
        sources = [self.kept] if alpha is None else [self.b] if alpha == 1 else [self.a, self.b] if alpha else [self.a]
        flat = [source[self._name_in(source, name)].reshape(-1) for source in sources]
        for start in range(0, flat[0].numel(), _CHUNK):
            pieces = [tensor[start : start + _CHUNK] for tensor in flat]
            if len(pieces) == 2 and torch.equal(*pieces):
                # Masks may hold infinity, of which there is no mean.
                yield pieces[0].to(dtype)
                continue
            if len(pieces) == 2:
                # A mean of halves is taken in single precision, as torch does within one operation.
                wide = torch.float64 if torch.float64 in [piece.dtype for piece in pieces] else torch.float32
                piece = torch.lerp(pieces[0].to(wide), pieces[1].to(wide), float(alpha or 0)).to(dtype)
            else:
                piece = pieces[0].to(dtype)
            if alpha is not None and not bool(torch.isfinite(piece).all()):
                raise NonFiniteError(
                    f"Entry {name!r} of the average of {self.a.path} and {self.b.path} has values that are infinite or "
                    "not a number. Has a training diverged?"
                )
            yield piece

    def _name_in(self, source: MappedCheckpoint, name: str) -> str:
        """The name of an entry in one of the files, which may hold a tied parameter under another of its names."""
        if name in source.forms:
            return name
        return next(other for other in source.forms if self.owners.get(other) == self.owners[name])


def plan_merge(
    path_a: str | os.PathLike[str],
    path_b: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    alpha: Alpha = 0.5,
    layers: Iterable[str] | str | None = None,
    partition: PartitionSpec = "fused",
    base: Literal["a", "b"] = "a",
    key: str | None = None,
    strip_prefix: str | None = None,
) -> MergePlan:
    """Compare two checkpoints by their headers, and find the coordinate of every entry; see `merge`.

    Args:
        path_a: The checkpoint at coordinate 0; see `load_checkpoint`.
        path_b: The checkpoint at coordinate 1.
        model: A network that both fit, of whatever values; without one, every real floating-point entry moves but the
            vectors of spectral normalisation, and layers are told by names alone.
        alpha: The coordinate of the averaged layers, or layer name to coordinate.
        layers: Names of the layers that are averaged; by default all, or those that `alpha` names.
        partition: How entries are grouped into layers; see `LayerPartition.of`. Without names of layers, it does not
            matter.
        base: The checkpoint, `"a"` or `"b"`, whose entries are kept where nothing is averaged.
        key: The key of the state dict; see `load_checkpoint`.
        strip_prefix: What the names of the entries begin with.

    Raises:
        CheckpointError: A checkpoint cannot be read, or does not fit the network.
        ArchitectureMismatchError: They differ in entries or shapes, or in what does not move.
        UnsupportedModelError: Both factors of a low-rank update differ; see `check_adapters`.
        LMCCurvatureError: An option is not what it should be.
    """
    a, b, owners = map_pair(path_a, path_b, model, key=key, strip_prefix=strip_prefix)
    for note in setting_notes(a.path, b.path):
        warnings.warn(f"{note} The merge goes by those of the base.", stacklevel=2)
    if model is not None:
        groups = LayerPartition.of(model, partition).groups
    elif layers is None and not isinstance(alpha, Mapping):
        groups = {_ALL: tuple(dict.fromkeys(owners.values()))}
    else:
        groups = LayerPartition.of_names(tuple(dict.fromkeys(owners.values())), partition).groups
    coordinates = merge_coordinates(groups, alpha, layers, base)
    of_owner = {entry: coordinates[layer] for layer, members in groups.items() for entry in members}
    entries = {name: of_owner[owner] for name, owner in owners.items()}
    return MergePlan(a, b, base, coordinates, entries, owners)


def map_pair(
    path_a: str | os.PathLike[str],
    path_b: str | os.PathLike[str],
    model: nn.Module | None,
    *,
    key: str | None = None,
    strip_prefix: str | None = None,
) -> tuple[MappedCheckpoint, MappedCheckpoint, dict[str, str]]:
    """Map two checkpoints of one network, which must have the same entries, and equal ones where nothing moves.

    Returns:
        The two, and the name of each entry that moves to the name under which a partition knows it.

    Raises:
        CheckpointError: A checkpoint cannot be read, or does not fit the network.
        ArchitectureMismatchError: They differ in entries or shapes, or in what does not move.
        UnsupportedModelError: Both factors of a low-rank update differ.
    """
    own, network, ties = None, "the network", {}
    if model is not None:
        # Entries are compared in their forms, so the network's numbers need no memory.
        structure = skeleton_of(unwrap(model))
        own, network, ties = structure.state_dict(), type(structure).__name__, tied_names(structure)
    options = {"network": network, "key": key, "strip_prefix": strip_prefix}
    (a, left_out_a), (b, left_out_b) = (_mapped(path, own, **options) for path in (path_a, path_b))
    if unused := [name for name in left_out_a if name in left_out_b]:
        raise CheckpointError(f"{unused[0]}={options[unused[0]]!r} fits neither {path_a} nor {path_b}: leave it out.")
    for checkpoint, left_out in ((a, left_out_a), (b, left_out_b)):
        if left_out:
            warnings.warn(
                f"{checkpoint.path} was read without {' and '.join(left_out)}, which does not fit it.", stacklevel=4
            )
    _refuse_coarse_types(a, b)
    if model is None:
        refuse_differences(entry_differences(_wide(a), _wide(b), (str(a.path), str(b.path))), "checkpoints")
        ties = {name: first for name, first in (a.ties | b.ties).items() if all(_ties(c, name, first) for c in (a, b))}
        real = {name for name, form in a.forms.items() if form.is_floating_point()}
        movable = {name for name in real if not _is_of_power_iteration(name, real)}
    else:
        movable = set(movable_entries(model, "interpolate"))
    owners = {name: ties.get(name, name) for name in {**a.forms, **b.forms} if ties.get(name, name) in movable}
    _refuse_fixed_differences(a, b, owners)
    factors = {name for pair in factor_pairs(owners) for name in pair}
    check_adapters([name for name in owners if name in factors and _differs(a, b, name)])
    return a, b, owners


def _mapped(
    path: str | os.PathLike[str], own: Mapping[str, Any] | None, **options: Any
) -> tuple[MappedCheckpoint, list[str]]:
    """A checkpoint, and the options that were left out because it does not fit them."""
    try:
        return MappedCheckpoint(path, own, **options), []
    except CheckpointError as error:
        # The other file may need these options, and this one may hold a single state dict that fits as it is.
        given = [name for name in ("key", "strip_prefix") if options.pop(name) is not None]
        try:
            found = MappedCheckpoint(path, own, **options) if given else None
        except CheckpointError:
            found = None
        if found is None:
            raise error from None
        return found, given


def _ties(checkpoint: MappedCheckpoint, name: str, first: str) -> bool:
    return checkpoint.ties.get(name) == first or torch.equal(checkpoint[name].clone(), checkpoint[first])


def _wide(checkpoint: MappedCheckpoint) -> dict[str, Tensor]:
    """Entry name to form, with one type for all real numbers: files may round them differently."""
    return {n: form.double() if form.is_floating_point() else form for n, form in checkpoint.forms.items()}


def _refuse_coarse_types(a: MappedCheckpoint, b: MappedCheckpoint) -> None:
    for checkpoint in (a, b):
        for name, form in checkpoint.forms.items():
            if form.is_floating_point() and form.dtype.itemsize < 2:
                raise CheckpointError(
                    f"Entry {name!r} of {checkpoint.path} is of type {form.dtype}, which is too coarse for an average, "
                    "and stands for other numbers where there are scales: bring it to bfloat16 or float32 first."
                )


def _is_of_power_iteration(name: str, names: Collection[str]) -> bool:
    """Whether an entry is one of the vectors that spectral normalisation keeps: no parameter, and of unit length."""
    owner, _, last = name.rpartition(".")
    weight, _, vector = last.rpartition("_")
    if vector not in ("u", "v"):
        return False
    # By torch.nn.utils.spectral_norm, and as a parametrisation: the index of that is the last part of the owner.
    original = f"{owner}.{weight}_orig".lstrip(".") if weight else f"{owner.rpartition('.')[0]}.original"
    return original in names


def _refuse_fixed_differences(a: MappedCheckpoint, b: MappedCheckpoint, owners: Mapping[str, str]) -> None:
    for name in (name for name in a.forms if name in b.forms):
        if name not in owners and not is_batch_counter(name) and _differs(a, b, name):
            raise ArchitectureMismatchError(
                f"Entry {name!r} differs between {a.path} and {b.path}, and is none that moves: parameters and running "
                "statistics are averaged only. Make it equal in both."
            )


def _differs(a: MappedCheckpoint, b: MappedCheckpoint, name: str) -> bool:
    first, second = (checkpoint[name] if name in checkpoint.forms else None for checkpoint in (a, b))
    return first is None or second is None or not torch.equal(first, second.to(first.dtype))


def merge_checkpoints(
    plan: MergePlan,
    out: str | os.PathLike[str],
    *,
    mergekit: Path | None = None,
    recalibrated: nn.Module | None = None,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the merged checkpoint as a safetensors file, entry by entry.

    The file holds every entry of the base's state dict, of its type; those that move are averaged. In memory are no
    more than the largest entry of either checkpoint at a time.

    Args:
        plan: What is averaged, and where.
        out: The file to write.
        mergekit: Also write the same there as a configuration of mergekit.
        recalibrated: The merged network, if its running statistics were re-estimated: they come from here.
        facts: What else to say of the provenance.

    Returns:
        What the file's metadata say of its provenance.

    Raises:
        CheckpointError: A checkpoint is damaged, or has an entry that safetensors cannot hold, or mergekit would not
            find the entries in it.
        OptionError: mergekit cannot re-estimate statistics.
        NonFiniteError: An averaged entry is not finite.
        OSError: A file cannot be written.
    """
    if mergekit is not None:
        check_plain(plan.a, plan.b)
        if recalibrated is not None:
            raise OptionError("mergekit averages running statistics: leave it out, or the statistics re-estimated.")
    record = provenance(plan) | dict(facts or {})
    forms, statistics = plan.forms(), {} if recalibrated is None else running_statistics(recalibrated)

    def parts(name: str) -> Iterable[Tensor]:
        return [statistics[name].cpu().to(forms[name].dtype)] if name in statistics else plan.parts(name)

    write_stream(out, forms, parts, metadata_of_merge(plan.kept.path, record))
    if mergekit is not None:
        write_recipe(mergekit, plan.a.path, plan.b.path, plan.base, plan.entries)
    return record


def provenance(plan: MergePlan) -> dict[str, Any]:
    """Where a merged network comes from: files with their digests, coordinates of its layers, and versions."""
    versions = {
        "lmc_curvature": __version__,
        "python": platform.python_version(),
        "safetensors": safetensors.__version__,
        "torch": torch.__version__,
    }
    files = {
        name: {"path": str(own.path), "sha256": digests_of(own.path)} for name, own in (("a", plan.a), ("b", plan.b))
    }
    layers = {"base": plan.base, "layers": list(plan.averaged), "alpha": dict(plan.coordinates)}
    return {"files": files, **layers, "batch_norm": "interpolate", "versions": versions}


def metadata_of_merge(base: Path, record: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a merged file: those of the base, and where it comes from."""
    return metadata_of(base) | make_header(KIND, {}, record)
