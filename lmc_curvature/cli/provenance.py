"""What an answer was computed from: files by their SHA-256, data, options, versions and commits."""

import hashlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import lmc_curvature
from lmc_curvature.segment.hull import network_names

if TYPE_CHECKING:
    from lmc_curvature.cli.options import Comparison


def provenance(comparison: "Comparison", loader: Iterable[Any]) -> dict[str, Any]:
    """The record of networks, their data and how they are compared, as what JSON can hold.

    Args:
        comparison: The options.
        loader: The batches that came of them.
    """
    names = ("layers", "frozen", "base", "batch_norm", "recalibration", "augmentation", "loss", "max_batches")
    names += ("device", "dtype")
    return {
        "networks": {
            name.removeprefix("model_"): checkpoint_record(path)
            for name, path in zip(network_names(len(comparison.paths)), comparison.paths, strict=True)
        },
        "model": {
            "name": comparison.model,
            "options": comparison.model_options(),
            "key": comparison.key,
            "strip_prefix": comparison.strip_prefix,
        },
        "data": data_record(comparison, loader),
        "options": {name: getattr(comparison, name) for name in names} | {"threads": torch.get_num_threads()},
        **software_record(),
    }


def data_record(comparison: "Comparison", loader: Iterable[Any]) -> dict[str, Any]:
    """The data by their name and, where they are images known by name, their preparation and fingerprint."""
    from lmc_curvature.sources import Batches, TransformedImages

    named = {"name": comparison.data}
    known = named | {name: getattr(comparison, name) for name in ("batch_size", "split", "limit", "resize")}
    if isinstance(loader, Batches):
        data = loader.dataset
        return known | {"mean": data.mean.tolist(), "std": data.std.tolist(), "sha256": data.fingerprint()}
    if isinstance(loader, TransformedImages):
        return known | {"transform": comparison.transform, "sha256": loader.fingerprint()}
    # What a loader of one's own yields is known when it is visited, once.
    return named


def checkpoint_record(path: Path) -> dict[str, Any]:
    """The SHA-256 of each file that a checkpoint is read from."""
    from lmc_curvature.checkpoints.files import files_of

    return {"path": str(path), "sha256": {file.name: _sha256(file) for file in files_of(path)}}


def software_record() -> dict[str, Any]:
    """Versions, the commit of this library, and that of the directory in which its user stands."""
    installed = {package: importlib.metadata.version(package) for package in ("lmc-curvature", "torchvision", "numpy")}
    here = repository_of(Path.cwd())
    return {
        # torch's own word says for which CUDA it was built, too.
        "versions": {"python": platform.python_version(), "torch": torch.__version__, **installed},
        "commits": {
            "lmc-curvature": commit_of(Path(lmc_curvature.__file__).parents[1]),
            "working directory": {"commit": None, "dirty": None} if here is None else commit_of(here),
        },
    }


def commit_of(folder: Path) -> dict[str, Any]:
    """The commit that is checked out in a folder, and whether its files differ from it (`dirty`).

    Both are None where the folder is not the root of a git repository.
    """
    try:
        if repository_of(folder) == folder.resolve():
            commit, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain")
            return {"commit": commit, "dirty": bool(changes)}
    except (OSError, subprocess.CalledProcessError):
        pass
    return {"commit": None, "dirty": None}


def repository_of(folder: Path) -> Path | None:
    """The root of the git repository that a folder lies in; None if it lies in none, or there is no git."""
    try:
        return Path(_git(folder, "rev-parse", "--show-toplevel"))
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True).stdout.strip()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
