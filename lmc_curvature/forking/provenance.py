"""The record of what the bits of an experiment depend on besides its configuration, made when it is begun.

provenance.json    SHA-256 of each split of the data, wherever it lies; versions, device and threads
"""

import os
import platform
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from lmc_curvature import __version__
from lmc_curvature.errors import DataError, FileFormatError
from lmc_curvature.forking.configuration import ForkConfig
from lmc_curvature.forking.directory import ForkDirectory, check_config, explain_damage, open_directory, write_config
from lmc_curvature.sources import ImageDataset, Split, load_data
from lmc_curvature.storage import read_json, write_json

_VERSION = "1"

Conditions = Mapping[str, str | int]


def conditions(config: ForkConfig, device: torch.device) -> Conditions:
    """Return what decides the last bits of a trained network, besides the configuration and the data."""
    # On a CPU, it is the vector instructions that torch uses there.
    processor = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "lmc_curvature": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
        "threads": config.threads or torch.get_num_threads(),
    }


def load_fork_data(
    experiment: ForkDirectory | str | os.PathLike[str],
    split: Split = "train",
    *,
    source: str | None = None,
    progress: bool | None = None,
) -> ImageDataset:
    """Load the data of an experiment: the examples it trains on, or the whole test split.

    Args:
        experiment: The experiment, or its directory.
        split: `"train"` or `"test"`.
        source: Where the data set lies now; by default where the configuration says.
        progress: Show a bar while images are decoded; by default on a terminal and in notebooks.

    Raises:
        CheckpointError: There is no experiment in the directory, or the record of what it was begun with is damaged.
        DataError: The data set is missing, is not what it should be, or is not the one the experiment was begun with.
    """
    directory = experiment if isinstance(experiment, ForkDirectory) else open_directory(experiment)
    source = source or directory.config.data
    limit = directory.config.limit if split == "train" else None
    data = load_data(source, split, limit, progress=progress)
    begun_with = recorded_splits(directory).get(split)
    if begun_with is not None:
        _check_fingerprint(directory, split, source, data.fingerprint(), begun_with)
    return data


def _check_fingerprint(directory: ForkDirectory, split: Split, source: str, found: str, begun_with: str) -> None:
    if found != begun_with:
        raise DataError(
            f"{source!r} has other images or labels in its {split} split than those that the experiment in "
            f"{directory.path} was begun with. Name the place where those lie now, or use another directory."
        )


def recorded_splits(directory: ForkDirectory) -> dict[str, str]:
    """Return the fingerprint of each split that was recorded."""
    return _read(directory).get("data", {})


def begin(directory: ForkDirectory, splits: Mapping[Split, ImageDataset], made_with: Conditions) -> None:
    """Record the configuration of an experiment, and what it is begun with; what was recorded of that before stays.

    A warning says if the experiment goes on with another release, device or number of threads. From here on the
    directory belongs to this experiment: of several processes that try to begin it with different configurations or
    data, one does.

    Raises:
        CheckpointError: The configuration or the record in the directory is damaged.
        ConfigurationError: It was begun with another configuration.
        DataError: It was begun with other data.
    """
    found: dict[Split, str] = {split: data.fingerprint() for split, data in splits.items()}
    with directory.writing(directory.path):
        check_config(directory)
        before = _read(directory)
        known = before.get("data", {})
        for split, fingerprint in found.items():
            _check_fingerprint(directory, split, directory.config.data, fingerprint, known.get(split, fingerprint))
        # Without a record, the parent's manifest tells what it was made with last.
        begun_with = before.get("made_with") or directory.parent.manifest().get("made_with") or dict(made_with)
        contents = {"made_with": begun_with, "data": {**found, **known}}
        if contents != before:
            write_json(directory.provenance_path, {"version": _VERSION, **contents})
        write_config(directory)
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


def _read(directory: ForkDirectory) -> dict[str, Any]:
    path = directory.provenance_path
    with explain_damage("Delete it if the data are still those that were trained on."):
        found = read_json(path, _VERSION) if path.is_file() else {}
        if not all(isinstance(found.get(name, {}), dict) for name in ("data", "made_with")):
            raise FileFormatError(f"{path} is damaged: it does not tell what the experiment was begun with.")
        return found
