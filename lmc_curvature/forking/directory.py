"""What a forking experiment is, and where its files lie.

config.json
parent/epoch-0000.safetensors       the parent at each fork epoch and at the end
parent/metrics.csv
fork-0000/child-0.safetensors       each child of each fork epoch, at the end
fork-0000/child-0.csv
"""

import csv
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, JsonValue, field_validator
from torch import nn

from lmc_curvature.errors import CheckpointError, ConfigurationError
from lmc_curvature.forking.checkpoints import load_entries
from lmc_curvature.forking.configuration import Configuration
from lmc_curvature.forking.data import ImageDataset, Split, load_data
from lmc_curvature.forking.models import make_model
from lmc_curvature.forking.training import EpochMetrics, TrainingConfig, TrainingState
from lmc_curvature.storage import write_atomically

_VERSION = "1"


class ForkConfig(Configuration):
    """A parent, and children forked from it at some epochs.

    Attributes:
        training: The schedule, common to the parent and all children.
        fork_epochs: Epochs of the parent to fork at, increasing; 0 is the initialisation.
        data: What `load_data` takes.
        limit: Train on at most this many examples, a fixed random sample.
        model: What `make_model` takes.
        model_options: Options of the network.
        init_seed: Decides the parent's initialisation.
        order_seed: Decides the order of the parent's examples. Child c has the order seed `order_seed + 1 +
            c` at every fork, so forks differ by their epoch alone.
        children: Children of each fork, at least 2.
        threads: CPU threads to train with; by default as many as torch uses. The last bits of a network depend on the
            number. Small networks train fastest with one, above all on a busy machine.

    Raises:
        ConfigurationError: A key is unknown, missing, or has a bad value.
    """

    training: TrainingConfig
    fork_epochs: tuple[int, ...] = Field(min_length=1)
    data: str = "digits"
    limit: int | None = Field(default=None, ge=1)
    model: str = "digits-resnet"
    model_options: dict[str, JsonValue] = Field(default_factory=dict)
    init_seed: int = Field(default=0, ge=0, lt=2**63)
    order_seed: int = Field(default=0, ge=0, lt=2**63)
    children: int = Field(default=2, ge=2)
    threads: int | None = Field(default=None, ge=1)

    @field_validator("fork_epochs")
    @classmethod
    def _increasing_within_schedule(cls, fork_epochs: tuple[int, ...], info: Any) -> tuple[int, ...]:
        if list(fork_epochs) != sorted(set(fork_epochs)):
            raise ValueError(f"{fork_epochs} must increase.")
        # A bad schedule is reported by itself.
        if "training" in info.data:
            last = info.data["training"].epochs - 1
            outside = [epoch for epoch in fork_epochs if not 0 <= epoch <= last]
            if outside:
                raise ValueError(f"{outside[0]} is outside the schedule of {last + 1} epochs; choose from 0 to {last}.")
        return fork_epochs

    @property
    def parent_epochs(self) -> tuple[int, ...]:
        """The epochs at which the parent is stored: the fork epochs and the last."""
        return (*self.fork_epochs, self.training.epochs)


@dataclasses.dataclass(frozen=True)
class ForkDirectory:
    """The files of a forking experiment.

    Attributes:
        path: The directory.
        config: The experiment.
    """

    path: Path
    config: ForkConfig

    def parent_path(self, epoch: int) -> Path:
        """Return the path of the parent's snapshot at an epoch."""
        return self.path / "parent" / f"epoch-{epoch:04d}.safetensors"

    def child_path(self, fork_epoch: int, child: int) -> Path:
        """Return the path of a finished child's snapshot."""
        return self.path / f"fork-{fork_epoch:04d}" / f"child-{child}.safetensors"

    def parent_metrics_path(self) -> Path:
        """Return the path of the parent's metrics by epoch."""
        return self.path / "parent" / "metrics.csv"

    def child_metrics_path(self, fork_epoch: int, child: int) -> Path:
        """Return the path of a child's metrics by epoch, from the fork on."""
        return self.child_path(fork_epoch, child).with_suffix(".csv")


def open_directory(out_dir: str | os.PathLike[str]) -> ForkDirectory:
    """Open the directory of an experiment that `run_forks` began.

    Raises:
        CheckpointError: There is no experiment in the directory, or its configuration is damaged.
        ConfigurationError: The configuration has keys or values that this release does not know.
    """
    path = Path(out_dir) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; {_remedy(out_dir)} makes a directory of forks.")
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        version, values = contents["version"], dict(contents["config"])
    except (ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it and {_remedy(out_dir)} again.") from error
    if version != _VERSION:
        raise ConfigurationError(
            f"{path} has format version {version!r}; this release reads {_VERSION!r}. Upgrade lmc_curvature."
        )
    try:
        return ForkDirectory(Path(out_dir), ForkConfig(**values))
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}:\n{error}") from error


def create_directory(out_dir: str | os.PathLike[str], config: ForkConfig) -> ForkDirectory:
    """Open the directory of an experiment, beginning it if need be.

    Raises:
        CheckpointError: The configuration in the directory is damaged.
        ConfigurationError: The directory belongs to another configuration. The message has the differences.
    """
    path = Path(out_dir) / "config.json"
    if not path.exists():
        contents = {"version": _VERSION, "config": config.model_dump(mode="json")}
        with write_atomically(path) as temporary:
            temporary.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    directory = open_directory(out_dir)
    changes = _differences(directory.config.model_dump(mode="json"), config.model_dump(mode="json"))
    if changes:
        raise ConfigurationError(
            f"{out_dir} holds an experiment with another configuration:\n" + "\n".join(changes) + "\nUse another "
            "directory, or the same configuration."
        )
    return directory


def load_child(out_dir: str | os.PathLike[str], fork_epoch: int, child: int) -> nn.Module:
    """Rebuild a finished child, on the CPU and in evaluation mode.

    Args:
        out_dir: The directory of an experiment.
        fork_epoch: One of its fork epochs.
        child: Which child, from 0.

    Raises:
        CheckpointError: The experiment has no such child, or its file is missing or damaged.
        ConfigurationError: The network cannot be built.
    """
    directory = open_directory(out_dir)
    config = directory.config
    if fork_epoch not in config.fork_epochs:
        raise CheckpointError(f"{out_dir} has no fork at epoch {fork_epoch}; its forks are {config.fork_epochs}.")
    if not 0 <= child < config.children:
        raise CheckpointError(f"{out_dir} has no child {child}; its children are 0 to {config.children - 1}.")
    return _load_network(directory, directory.child_path(fork_epoch, child))


def load_parent(out_dir: str | os.PathLike[str], epoch: int | None = None) -> nn.Module:
    """Rebuild the parent at a fork epoch, or at the end, on the CPU and in evaluation mode.

    Raises:
        CheckpointError: The epoch was not stored, or its file is missing or damaged.
        ConfigurationError: The network cannot be built.
    """
    directory = open_directory(out_dir)
    config = directory.config
    epoch = config.training.epochs if epoch is None else epoch
    if epoch not in config.parent_epochs:
        raise CheckpointError(f"{out_dir} has no parent at epoch {epoch}; it was stored at {config.parent_epochs}.")
    return _load_network(directory, directory.parent_path(epoch))


def load_fork_data(out_dir: str | os.PathLike[str], split: Split = "train", *, progress: bool = True) -> ImageDataset:
    """Load the data of an experiment: the examples it trained on, or the whole test split.

    Raises:
        CheckpointError: There is no experiment in the directory.
        DataError: The data set is missing or is not what it should be.
    """
    config = open_directory(out_dir).config
    return load_data(config.data, split, config.limit if split == "train" else None, progress=progress)


def initial_model(config: ForkConfig) -> nn.Module:
    """Build the network of an experiment as the parent's initialisation, on the CPU.

    Raises:
        ConfigurationError: The network cannot be built.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.init_seed)
        return make_model(config.model, **config.model_options)


def write_metrics(path: str | os.PathLike[str], history: Sequence[EpochMetrics]) -> None:
    """Write metrics as CSV, a row an epoch, whole or not at all."""
    names = [field.name for field in dataclasses.fields(EpochMetrics)]
    with write_atomically(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(dataclasses.astuple(metrics) for metrics in history)


def _load_network(directory: ForkDirectory, path: Path) -> nn.Module:
    try:
        state = TrainingState.load(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error} {_remedy(directory.path)} makes it.") from error
    model = initial_model(directory.config)
    load_entries(model, state.model, source=str(path))
    return model.eval()


def _remedy(out_dir: str | os.PathLike[str]) -> str:
    return f"run_forks(config, {os.fspath(out_dir)!r})"


def _differences(stored: dict[str, Any], given: dict[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for key in sorted(stored.keys() | given.keys()):
        old, new = stored.get(key), given.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {json.dumps(old)} there, {json.dumps(new)} now")
    return lines
