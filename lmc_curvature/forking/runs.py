"""The files of one network in training.

manifest.json               the status of training, what it was made with, and the SHA-256 of all that is kept
metrics.csv                 a row an epoch
epoch-0006.safetensors      the network and its optimiser at each epoch that is kept
latest.safetensors          the same at the last epoch trained, until training is finished
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from lmc_curvature.errors import CheckpointError, FileFormatError
from lmc_curvature.forking.state import EpochMetrics, TrainingState
from lmc_curvature.storage import discard_if_damaged, read_json, remove_partial_files, write_atomically, write_json

_MANIFEST = "manifest.json"
_METRICS = "metrics.csv"
_VERSION = "1"
_KINDS = {"status": str, "message": str, "made_with": dict, "sha256": dict}

Status = Literal["training", "finished", "diverged"]


@dataclasses.dataclass(frozen=True)
class Run:
    """One network in training, and where its files lie. Only one process writes to them at a time.

    Attributes:
        path: The directory.
        title: The name that messages and progress bars give it.
        order_seed: The seed of the order and augmentation of its examples.
        first_epoch: The epoch it begins at.
        epochs: The epochs that are kept, increasing; the last is the end of the schedule.
    """

    path: Path
    title: str
    order_seed: int
    first_epoch: int
    epochs: tuple[int, ...]

    @property
    def latest_path(self) -> Path:
        """Path of the state that training continues from."""
        return self.path / "latest.safetensors"

    def snapshot_path(self, epoch: int) -> Path:
        """Path of the snapshot at an epoch."""
        return self.path / f"epoch-{epoch:04d}.safetensors"

    @property
    def snapshot_paths(self) -> list[Path]:
        """Paths of all snapshots that are kept, in the order of their epochs."""
        return [self.snapshot_path(epoch) for epoch in self.epochs]

    @property
    def status(self) -> Status:
        """The state of training: finished or diverged only if every file is there that was, else training."""
        manifest = self.manifest()
        status = manifest.get("status", "training")
        recorded = [self.path / name for name in manifest.get("sha256", {})]
        files = [self.path / _METRICS, *self.snapshot_paths] if status == "finished" else recorded
        return status if all(path.is_file() for path in files) else "training"

    def manifest(self) -> dict[str, Any]:
        """Return the manifest; empty if there is none, or if it is damaged, so that it is made anew."""
        try:
            found = read_json(self.path / _MANIFEST, _VERSION)
        except (OSError, FileFormatError):
            return {}
        is_whole = all(isinstance(found.get(name), kind) for name, kind in _KINDS.items())
        return found if is_whole and found["status"] in get_args(Status) else {}

    def _kept(self, status: Status) -> list[Path]:
        """Paths of the files that will not change any more."""
        return [*self.snapshot_paths, *([self.path / _METRICS] if status == "finished" else [])]

    def write_manifest(self, status: Status, made_with: Mapping[str, Any], message: str = "") -> None:
        """Write the manifest: the status, what made the run, and the files that are kept with their digests."""
        contents = {
            "title": self.title,
            "status": status,
            "message": message,
            "order_seed": self.order_seed,
            "first_epoch": self.first_epoch,
            "epochs": self.epochs,
            "made_with": dict(made_with),
            "sha256": {path.name: _digest(path) for path in self._kept(status) if path.is_file()},
        }
        write_json(self.path / _MANIFEST, contents)

    def write_metrics(self, history: Sequence[EpochMetrics]) -> None:
        """Write the metrics of the run's own epochs, given those since the beginning of the schedule."""
        import pandas as pd

        with write_atomically(self.path / _METRICS) as temporary:
            pd.DataFrame(list(history[self.first_epoch :])).to_csv(temporary, index=False, lineterminator="\r\n")

    def epochs_trained(self) -> int:
        """Return how many epochs of its own the run has behind it, as far as its metrics tell."""
        try:
            return max(len((self.path / _METRICS).read_text(encoding="utf-8").splitlines()) - 1, 0)
        except OSError:
            return 0

    def discard_damage(self) -> None:
        """Remove what does not match its checksum, or is not what the manifest tells of, and unfinished files.

        A warning names each.

        Raises:
            NewerVersionError: A snapshot was written by another release; it is left alone.
        """
        remove_partial_files(self.path)
        for path in (*self.snapshot_paths, self.latest_path):
            discard_if_damaged(path, TrainingState.load)
        for path in self._kept("finished"):
            discard_if_damaged(path, self._check)

    def _check(self, path: Path) -> None:
        recorded = self.manifest().get("sha256", {}).get(path.name)
        if recorded is not None and recorded != _digest(path):
            raise CheckpointError(f"{path} is not the file that {self.path / _MANIFEST} tells the SHA-256 of.")

    def furthest(self, state: TrainingState, until: int) -> TrainingState:
        """Return the latest state if it lies after `state` and not after `until`, else `state`."""
        if self.latest_path.is_file():
            latest = TrainingState.load(self.latest_path)
            if state.epoch < latest.epoch <= until:
                return latest
        return state


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
