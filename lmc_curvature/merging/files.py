"""The average of two checkpoints or several, written tensor by tensor."""

import os
import platform
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, cast

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
from lmc_curvature.errors import NonFiniteError, OptionError, counted
from lmc_curvature.merging.coordinates import (
    Alpha,
    Place,
    merge_coordinates,
    merge_shares,
    place_of_base,
    refuse_alpha,
)
from lmc_curvature.merging.descriptions import setting_notes
from lmc_curvature.merging.mapping import map_checkpoints
from lmc_curvature.merging.recipes import check_plain, write_recipe
from lmc_curvature.objective.recalibration import running_statistics
from lmc_curvature.segment import LayerPartition, PartitionSpec
from lmc_curvature.segment.hull import Weights, network_names, network_weights
from lmc_curvature.storage import make_header

KIND = "merged checkpoint"
"""What the header of a merged file says that it is, under the name of this library."""

_CHUNK = 1 << 22
# What is not grouped into layers is one of this name; of others, so many are named.
_ALL, _SHOWN = "all layers", 6


@dataclass(frozen=True)
class MergePlan:
    """Which entries of two checkpoints or several are averaged, and where.

    Attributes:
        checkpoints: The checkpoints; of two, those at coordinates 0 and 1.
        base: The one of the first two whose entries are kept where nothing is averaged.
        coordinates: Layer name to its place: the coordinate between two, or the share that each checkpoint has.
        entries: Entry name to the same, of those that can move.
        owners: The same names to those under which a partition knows the entries: of tied parameters, the first.
        weights: The shares of the averaged layers, where there are shares.
    """

    checkpoints: tuple[MappedCheckpoint, ...]
    base: Literal["a", "b"]
    coordinates: Mapping[str, Place]
    entries: Mapping[str, Place]
    owners: Mapping[str, str]
    weights: tuple[float, ...] | None = None

    @property
    def kept(self) -> MappedCheckpoint:
        """The checkpoint of the base."""
        return self.checkpoints["ab".index(self.base)]

    @property
    def averaged(self) -> tuple[str, ...]:
        """Names of the layers that are not at the base."""
        still = place_of_base(self.base, None if self.weights is None else len(self.weights))
        return tuple(layer for layer, place in self.coordinates.items() if place != still)

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
        place = self.entries.get(name)
        sources = self._sources(place)
        flat = [source[self._name_in(source, name)].reshape(-1) for source, _ in sources]
        for start in range(0, flat[0].numel(), _CHUNK):
            piece, *others = (tensor[start : start + _CHUNK] for tensor in flat)
            if others and all(torch.equal(piece, other) for other in others):
                # Masks may hold infinity, of which there is no mean.
                yield piece.to(dtype)
                continue
            if others:
                # A mean of halves is taken in single precision, as torch does within one operation.
                types = [each.dtype for each in (piece, *others)]
                wide = torch.float64 if torch.float64 in types else torch.float32
                piece = piece.to(wide)
                for other, (_, step) in zip(others, sources[1:], strict=True):
                    piece = torch.lerp(piece, other.to(wide), step)
            piece = piece.to(dtype)
            if place is not None and not bool(torch.isfinite(piece).all()):
                paths = " and ".join(str(checkpoint.path) for checkpoint in self.checkpoints)
                raise NonFiniteError(
                    f"Entry {name!r} of the average of {paths} has values that are infinite or not a number. Has a "
                    "training diverged?"
                )
            yield piece

    def _sources(self, place: Place | None) -> list[tuple[MappedCheckpoint, float]]:
        """The checkpoints that an entry is a running mean of, with the step to each from the mean of those before."""
        if place is None:
            return [(self.kept, 1.0)]
        if isinstance(place, tuple):
            found = [(checkpoint, w) for checkpoint, w in zip(self.checkpoints, place, strict=True) if w]
            totals = accumulate(w for _, w in found)
            return [(checkpoint, w / total) for (checkpoint, w), total in zip(found, totals, strict=True)]
        a, b = self.checkpoints
        return [(b, 1.0)] if place == 1 else [(a, 1.0), (b, float(place))] if place else [(a, 1.0)]

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
    others: Sequence[str | os.PathLike[str]] = (),
    alpha: Alpha | None = None,
    weights: Weights | None = None,
    layers: Iterable[str] | str | None = None,
    partition: PartitionSpec = "fused",
    base: Literal["a", "b"] = "a",
    key: str | None = None,
    strip_prefix: str | None = None,
) -> MergePlan:
    """Compare checkpoints by their headers, and find the place of every entry between them; see `merge`.

    Args:
        path_a: The checkpoint at coordinate 0; see `load_checkpoint`.
        path_b: The checkpoint at coordinate 1.
        model: A network that all fit, of whatever values; without one, every real floating-point entry moves but the
            vectors of spectral normalisation, and layers are told by names alone.
        others: Further checkpoints.
        alpha: The coordinate of the averaged layers between two, by default ½, or layer name to coordinate.
        weights: What each checkpoint counts for, positive numbers that sum to one, in their order; of several equal
            by default.
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
    paths = (path_a, path_b, *others)
    shares = None
    if others or weights is not None:
        refuse_alpha(alpha)
        shares = tuple(network_weights(weights, network_names(len(paths))).tolist())
    checkpoints, owners = map_checkpoints(paths, model, key=key, strip_prefix=strip_prefix)
    for other in checkpoints[1:]:
        for note in setting_notes(checkpoints[0].path, other.path):
            warnings.warn(f"{note} The merge goes by those of the base.", stacklevel=2)
    if model is not None:
        groups = LayerPartition.of(model, partition).groups
    elif layers is None and not isinstance(alpha, Mapping):
        groups = {_ALL: tuple(dict.fromkeys(owners.values()))}
    else:
        groups = LayerPartition.of_names(tuple(dict.fromkeys(owners.values())), partition).groups
    coordinates: Mapping[str, Place] = (
        merge_coordinates(groups, 0.5 if alpha is None else alpha, layers, base)
        if shares is None
        else merge_shares(groups, shares, layers, base)
    )
    of_owner = {entry: coordinates[layer] for layer, members in groups.items() for entry in members}
    entries = {name: of_owner[owner] for name, owner in owners.items()}
    return MergePlan(checkpoints, base, coordinates, entries, owners, shares)


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
    more than the largest entry of every checkpoint at a time.

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
        OptionError: mergekit cannot re-estimate statistics, or is asked for several networks or for weights.
        NonFiniteError: An averaged entry is not finite.
        OSError: A file cannot be written.
    """
    if mergekit is not None:
        check_plain(*plan.checkpoints)
        if plan.weights is not None:
            raise OptionError("A configuration for mergekit is written of two networks, by alpha: leave weights out.")
        if recalibrated is not None:
            raise OptionError("mergekit averages running statistics: leave it out, or the statistics re-estimated.")
    record = provenance(plan) | dict(facts or {})
    forms, statistics = plan.forms(), {} if recalibrated is None else running_statistics(recalibrated)

    def parts(name: str) -> Iterable[Tensor]:
        return [statistics[name].cpu().to(forms[name].dtype)] if name in statistics else plan.parts(name)

    write_stream(out, forms, parts, metadata_of_merge(plan.kept.path, record))
    if mergekit is not None:
        a, b = (checkpoint.path for checkpoint in plan.checkpoints)
        write_recipe(mergekit, a, b, plan.base, cast(Mapping[str, float], plan.entries))
    return record


def provenance(plan: MergePlan) -> dict[str, Any]:
    """Where a merged network comes from: files with their digests, coordinates or weights, and versions."""
    versions = {
        "lmc_curvature": __version__,
        "python": platform.python_version(),
        "safetensors": safetensors.__version__,
        "torch": torch.__version__,
    }
    files = {
        name.removeprefix("model_"): {"path": str(own.path), "sha256": digests_of(own.path)}
        for name, own in zip(network_names(len(plan.checkpoints)), plan.checkpoints, strict=True)
    }
    place = {"alpha": dict(plan.coordinates)} if plan.weights is None else {"weights": list(plan.weights)}
    layers = {"base": plan.base, "layers": list(plan.averaged), **place}
    return {"files": files, **layers, "batch_norm": "interpolate", "versions": versions}


def metadata_of_merge(base: Path, record: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a merged file: those of the base, and where it comes from."""
    return metadata_of(base) | make_header(KIND, {}, record)
