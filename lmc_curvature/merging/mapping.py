"""Checkpoints of one network, mapped into memory: whether they can be averaged, told by their headers."""

import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lmc_curvature.checkpoints.streaming import MappedCheckpoint
from lmc_curvature.errors import ArchitectureMismatchError, CheckpointError
from lmc_curvature.objective.network import movable_entries, skeleton_of, tied_names
from lmc_curvature.objective.normalization import is_batch_counter
from lmc_curvature.objective.wrappers import unwrap
from lmc_curvature.segment.adapters import check_adapters, factor_pairs
from lmc_curvature.segment.compatibility import entry_differences, refuse_differences


def map_checkpoints(
    paths: Sequence[str | os.PathLike[str]],
    model: nn.Module | None,
    *,
    key: str | None = None,
    strip_prefix: str | None = None,
) -> tuple[tuple[MappedCheckpoint, ...], dict[str, str]]:
    """Map checkpoints of one network, which must have the same entries, and equal ones where nothing moves.

    Returns:
        All of them, and the name of each entry that moves to the name under which a partition knows it.

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
    mapped = [_mapped(path, own, **options) for path in paths]
    checkpoints, left_out = tuple(each for each, _ in mapped), [some for _, some in mapped]
    if unused := [name for name in left_out[0] if all(name in some for some in left_out)]:
        neither = " nor ".join(map(str, paths))
        raise CheckpointError(f"{unused[0]}={options[unused[0]]!r} fits neither {neither}: leave it out.")
    for checkpoint, some in zip(checkpoints, left_out, strict=True):
        if some:
            warnings.warn(
                f"{checkpoint.path} was read without {' and '.join(some)}, which does not fit it.", stacklevel=4
            )
    _refuse_coarse_types(*checkpoints)
    first, *others = checkpoints
    if model is None:
        for other in others:
            labels = (str(first.path), str(other.path))
            refuse_differences(entry_differences(_wide(first), _wide(other), labels), "checkpoints")
        known = {name: owner for checkpoint in checkpoints for name, owner in checkpoint.ties.items()}
        ties = {name: owner for name, owner in known.items() if all(_ties(c, name, owner) for c in checkpoints)}
        real = {name for name, form in first.forms.items() if form.is_floating_point()}
        movable = {name for name in real if not _is_of_power_iteration(name, real)}
    else:
        movable = set(movable_entries(model, "interpolate"))
    names = dict.fromkeys(name for checkpoint in checkpoints for name in checkpoint.forms)
    owners = {name: ties.get(name, name) for name in names if ties.get(name, name) in movable}
    factors = {name for pair in factor_pairs(owners) for name in pair}
    for other in others:
        _refuse_fixed_differences(first, other, owners)
    # One checkpoint may move one factor of an update, and another the other.
    check_adapters(
        [name for name in owners if name in factors and any(_differs(first, other, name) for other in others)]
    )
    return checkpoints, owners


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


def _refuse_coarse_types(*checkpoints: MappedCheckpoint) -> None:
    for checkpoint in checkpoints:
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
