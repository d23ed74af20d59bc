"""What the bits of an experiment depend on besides its configuration, recorded when it is begun.

provenance.json    SHA-256 of each split of the data, wherever it lies; versions, device and threads
"""

import os
import warnings
from collections.abc import Mapping
from typing import Any

from lmc_curvature.errors import CheckpointError, DataError, FileFormatError, NewerVersionError
from lmc_curvature.forking.data import ImageDataset, Split, load_data
from lmc_curvature.forking.directory import ForkDirectory, open_directory
from lmc_curvature.storage import read_json, write_json

_VERSION = "1"


def load_fork_data(out_dir: str | os.PathLike[str], split: Split = "train", *, progress: bool = True) -> ImageDataset:
    """Load the data of an experiment: the examples it trained on, or the whole test split.

    Raises:
        CheckpointError: There is no experiment in the directory.
        DataError: The data set is missing, is not what it should be, or is not the one the experiment was begun with.
    """
    return load_split(open_directory(out_dir), split, progress=progress)


def load_split(
    directory: ForkDirectory, split: Split, source: str | None = None, *, progress: bool = True
) -> ImageDataset:
    """Load the examples that an experiment trains on, or the whole test split.

    Args:
        directory: The experiment.
        split: `"train"` or `"test"`.
        source: Where the data set lies now; by default where the configuration says.
        progress: Show a bar while images are decoded.

    Raises:
        CheckpointError: The record of what the experiment was begun with is damaged.
        DataError: The data set is missing, is not what it should be, or is not the one the experiment was begun with.
    """
    source = source or directory.config.data
    limit = directory.config.limit if split == "train" else None
    data = load_data(source, split, limit, progress=progress)
    begun_with = recorded_splits(directory).get(split)
    if begun_with is not None and begun_with != data.fingerprint():
        raise DataError(
            f"{source!r} has other images or labels in its {split} split than those that the experiment in "
            f"{directory.path} was begun with. Name the place where those lie now, or use another directory."
        )
    return data


def recorded_splits(directory: ForkDirectory) -> dict[str, str]:
    """The fingerprint of each split that was recorded: none in directories from before there were any."""
    return _read(directory).get("data", {})


def record_provenance(
    directory: ForkDirectory, splits: Mapping[Split, ImageDataset], made_with: Mapping[str, Any]
) -> None:
    """Record what an experiment is begun with. What was recorded before stays."""
    with directory.writing(directory.path):
        before = _read(directory)
        known = before.get("data", {})
        new = {split: data.fingerprint() for split, data in splits.items() if split not in known}
        contents = {"made_with": _begun_with(directory) or dict(made_with), "data": known | new}
        if contents != before:
            write_json(directory.provenance_path, {"version": _VERSION, **contents})


def warn_of_differences(directory: ForkDirectory, made_with: Mapping[str, Any]) -> None:
    """Warn if an experiment goes on with another release, device or number of threads than it was begun with."""
    begun_with = _begun_with(directory)
    changes = [
        f"{name}: {begun_with[name]} then, {value} now"
        for name, value in made_with.items()
        if begun_with.get(name, value) != value
    ]
    if changes:
        warnings.warn(
            f"{directory.path} was begun otherwise, so the last bits may differ from those of an undisturbed run:\n"
            + "\n".join(changes),
            stacklevel=2,
        )


def _begun_with(directory: ForkDirectory) -> dict[str, Any]:
    # Before there was a record, the parent's manifest told what it was made with last.
    return _read(directory).get("made_with") or directory.parent.manifest().get("made_with", {})


def _read(directory: ForkDirectory) -> dict[str, Any]:
    path = directory.provenance_path
    if not path.is_file():
        return {}
    try:
        return read_json(path, _VERSION)
    except NewerVersionError:
        raise
    except FileFormatError as error:
        raise CheckpointError(f"{error} Delete it if the data are still those that were trained on.") from error
