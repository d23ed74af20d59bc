"""The directory of a forking experiment: the places of its files, its configuration, and its networks.

config.json
provenance.json       see `provenance`
parent/               the parent at each fork epoch and at the end; see `runs` for the files of one network
fork-0000/child-0/    each child of each fork epoch, at its snapshot epochs and at the end
traces/               see `lmc_curvature.tracing`
locks/                a file for each piece of work, locked while somebody is at it
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock
from torch import nn

from lmc_curvature.checkpoints import load_entries
from lmc_curvature.errors import CheckpointError, FileFormatError, NewerVersionError
from lmc_curvature.forking.configuration import ForkConfig, check_same, parse_config, stored_trace
from lmc_curvature.forking.orders import order_seed
from lmc_curvature.forking.runs import Run
from lmc_curvature.forking.state import TrainingState
from lmc_curvature.sources.models import make_model
from lmc_curvature.storage import read_json, remove_partial_files, write_json

_CONFIG = "config.json"
_VERSION = "2"


@dataclasses.dataclass(frozen=True)
class ForkDirectory:
    """The files of a forking experiment.

    Attributes:
        path: The directory.
        config: The experiment.
    """

    path: Path
    config: ForkConfig

    @property
    def parent(self) -> Run:
        """The run of the parent, which is stored at the fork epochs and at the last."""
        epochs = (*self.config.fork_epochs, self.config.training.epochs)
        return Run(self.path / "parent", "parent", order_seed(self.config.order_seed), 0, epochs)

    def child(self, fork_epoch: int, child: int) -> Run:
        """The run of a child."""
        return Run(
            self.path / f"fork-{fork_epoch:04d}" / f"child-{child}",
            f"fork {fork_epoch}, child {child}",
            order_seed(self.config.order_seed, child),
            fork_epoch,
            self.config.child_epochs(fork_epoch),
        )

    def runs(self) -> list[Run]:
        """Return the runs of the parent and of all children."""
        numbers = range(self.config.children)
        return [self.parent, *(self.child(fork, child) for fork in self.config.fork_epochs for child in numbers)]

    def can_start(self, run: Run) -> bool:
        """Return whether what a run starts from is there: for a child, the parent at its fork epoch."""
        return run == self.parent or self.parent.snapshot_path(run.first_epoch).is_file()

    def is_over(self, run: Run) -> bool:
        """Return whether nothing is left to train of a run: it is finished, has diverged, or will never start."""
        return run.status != "training" or self._will_never_start(run)

    def failures(self) -> dict[str, str]:
        """Return why networks will never be trained to the end, by the titles of their runs."""
        reasons = {run.title: run.manifest()["message"] for run in self.runs() if run.status == "diverged"}
        return reasons | {
            run.title: f"Cannot start, because the parent diverged before epoch {run.first_epoch}."
            for run in self.runs()
            if self._will_never_start(run)
        }

    def _will_never_start(self, run: Run) -> bool:
        return self.parent.status == "diverged" and not self.can_start(run)

    @property
    def provenance_path(self) -> Path:
        """Path of the record of what the experiment was begun with."""
        return self.path / "provenance.json"

    def trace_path(self, fork_epoch: int, epoch: int) -> Path:
        """Path of the directory with what was traced of a fork at an epoch."""
        return self.path / "traces" / f"fork-{fork_epoch:04d}" / f"epoch-{epoch:04d}"

    def lock_path(self, name: str) -> Path:
        """Path of the lock that whoever works on `name` holds."""
        return self.path / "locks" / f"{name.replace(', ', '-').replace(' ', '-')}.lock"

    @contextlib.contextmanager
    def writing(self, directory: Path) -> Iterator[None]:
        """Within the block, no other process writes the files right below a directory; clears what killed ones left."""
        lock = self.lock_path(f"files of {directory.name}")
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            remove_partial_files(directory)
            yield


def open_directory(out_dir: str | os.PathLike[str]) -> ForkDirectory:
    """Open the directory of an experiment that `run_forks` began.

    Raises:
        CheckpointError: There is no experiment in the directory, or its configuration is damaged.
        ConfigurationError: The configuration has keys or values that this release does not know.
        NewerVersionError: The directory was written by another release.
    """
    path = Path(out_dir) / _CONFIG
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; {fork_command(out_dir)} makes a directory of forks.")
    remedy = f"Delete it: {fork_command(out_dir)} writes it anew."
    with explain_damage(remedy):
        values = read_json(path, _VERSION).get("config")
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is damaged: it holds no configuration. {remedy}")
    if isinstance(values.get("trace"), dict):
        values = {**values, "trace": stored_trace(values["trace"])}
    return ForkDirectory(Path(out_dir), parse_config(ForkConfig, values, source=str(path)))


def create_directory(out_dir: str | os.PathLike[str], config: ForkConfig) -> ForkDirectory:
    """Open the directory of an experiment, making it if need be.

    Raises:
        LMCCurvatureError: The directory holds another experiment, or one that cannot be read; see `check_config`.
    """
    given = ForkDirectory(Path(out_dir), config)
    with given.writing(given.path):
        if not (given.path / _CONFIG).exists():
            write_config(given)
    check_config(given)
    return given


def check_config(directory: ForkDirectory) -> None:
    """Check that an experiment is the one that its directory holds.

    Until it has begun, it may still change: what was refused is to be corrected. Afterwards, what is traced may change,
    on which training does not depend, and so may the place of the data, which are known by their fingerprint.

    Raises:
        CheckpointError: The configuration in the directory is damaged.
        ConfigurationError: The directory belongs to another configuration. The message has the differences.
        NewerVersionError: The directory was written by another release.
    """
    stored, config = open_directory(directory.path).config, directory.config
    recorded = directory.provenance_path.is_file()
    if not recorded and not directory.parent.path.exists():
        return
    # Without a record of fingerprints, data are known by their place.
    free = {"trace", "data"} if recorded else {"trace"}
    stored = stored.model_copy(update={key: getattr(config, key) for key in free})
    check_same(stored, config, held=f"{directory.path} holds an experiment with", remedy="Use another directory")


def write_config(directory: ForkDirectory) -> None:
    """Store the configuration of an experiment; to be called by whoever is `writing` in the directory."""
    contents = {"version": _VERSION, "config": directory.config.model_dump(mode="json")}
    write_json(directory.path / _CONFIG, contents)


@contextlib.contextmanager
def explain_damage(remedy: str) -> Iterator[None]:
    """Within the block, let errors about files that are missing or damaged say what is to be done about them.

    Raises:
        CheckpointError: A file is missing or damaged.
        NewerVersionError: A file was written by another release, which is no damage.
    """
    try:
        yield
    except NewerVersionError:
        raise
    except (FileFormatError, CheckpointError) as error:
        raise CheckpointError(f"{error} {remedy}") from error


def load_child(out_dir: str | os.PathLike[str], fork_epoch: int, child: int, epoch: int | None = None) -> nn.Module:
    """Rebuild a child, on the CPU and in evaluation mode.

    Args:
        out_dir: The directory of an experiment.
        fork_epoch: One of its fork epochs.
        child: The number of the child, from 0.
        epoch: An epoch of the schedule at which it was stored; by default the last.

    Raises:
        CheckpointError: The experiment has no such child or snapshot, or its file is missing or damaged.
        ConfigurationError: The network cannot be built.
    """
    directory = open_directory(out_dir)
    config = directory.config
    if fork_epoch not in config.fork_epochs:
        raise CheckpointError(f"{out_dir} has no fork at epoch {fork_epoch}; its forks are {config.fork_epochs}.")
    if not 0 <= child < config.children:
        raise CheckpointError(f"{out_dir} has no child {child}; its children are 0 to {config.children - 1}.")
    return _load_network(directory, directory.child(fork_epoch, child), epoch)


def load_parent(out_dir: str | os.PathLike[str], epoch: int | None = None) -> nn.Module:
    """Rebuild the parent at a fork epoch, or at the end, on the CPU and in evaluation mode.

    Raises:
        CheckpointError: The epoch was not stored, or its file is missing or damaged.
        ConfigurationError: The network cannot be built.
    """
    directory = open_directory(out_dir)
    return _load_network(directory, directory.parent, epoch)


def initial_model(config: ForkConfig) -> nn.Module:
    """Build the network of an experiment as the parent's initialisation, on the CPU.

    Raises:
        ConfigurationError: The network cannot be built.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.init_seed)
        return make_model(config.model, **config.model_options)


def load_state(directory: ForkDirectory, run: Run, epoch: int) -> TrainingState:
    """Read a snapshot of a run.

    Raises:
        CheckpointError: It is missing or damaged; the message says what makes it.
        NewerVersionError: It was written by another release.
    """
    with explain_damage(f"{fork_command(directory.path)} makes it."):
        return TrainingState.load(run.snapshot_path(epoch))


def _load_network(directory: ForkDirectory, run: Run, epoch: int | None) -> nn.Module:
    epoch = run.epochs[-1] if epoch is None else epoch
    if epoch not in run.epochs:
        raise CheckpointError(f"{directory.path} has no {run.title} at epoch {epoch}; it was stored at {run.epochs}.")
    state = load_state(directory, run, epoch)
    model = initial_model(directory.config)
    load_entries(model, state.model, source=str(run.snapshot_path(epoch)))
    return model.eval()


def fork_command(out_dir: str | os.PathLike[str]) -> str:
    """Return the ways to train what a directory lacks, for messages."""
    return f"run_forks(config, {os.fspath(out_dir)!r}), or lmc-curvature fork CONFIG --out {os.fspath(out_dir)},"
