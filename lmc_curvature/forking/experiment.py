"""Forking: train a parent, and from its states at chosen epochs children that differ by their data order alone.

Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis" (2020), section 3, spawn children
so.
"""

import dataclasses
import functools
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from lmc_curvature.errors import DataError, NonFiniteError, OptionError
from lmc_curvature.forking.checks import check_examples, check_fit, check_layers
from lmc_curvature.forking.directory import ForkDirectory, create_directory, initial_model, load_state, open_directory
from lmc_curvature.forking.events import check_tensorboard, event_log
from lmc_curvature.forking.plan import ForkConfig
from lmc_curvature.forking.provenance import begin, load_split, recorded_splits, warn_of_differences
from lmc_curvature.forking.runs import Run
from lmc_curvature.forking.sharing import cpu_threads, device_of_rank, helpers, is_first_rank, share, unless_claimed
from lmc_curvature.forking.training import EpochMetrics, TrainingState, capture_state, train
from lmc_curvature.sources.data import ImageDataset, Split
from lmc_curvature.storage import remove_partial_files

# What being killed costs at most, besides the epoch at hand.
_SECONDS_BETWEEN_SAVES = 5.0


def run_forks(
    config: ForkConfig,
    out_dir: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    workers: int = 1,
    tensorboard: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> ForkDirectory:
    """Train the parent to the end, and the children of every fork to the same epoch.

    A child starts from the parent's network and momentum at its fork epoch. What the directory already holds
    is kept, so the same call continues where an earlier one was stopped or killed, and ends with the same bits on the
    same machine with as many threads; a warning says if these, or the versions of the software, are others. A damaged
    snapshot is computed again, with a warning that names it. Several processes may make the same call, under `torchrun`
    for example: each takes what no other is working on.

    Args:
        config: The experiment.
        out_dir: Where to write; made if need be.
        device: Where to train. Under `torchrun`, `"cuda"` is the device of the rank.
        workers: Processes to train in, this one included. A script that asks for more than one needs the usual
            `if __name__ == "__main__":`.
        tensorboard: Also log the metrics of every run there, as TensorBoard events.
        progress: Show one bar of epochs for the whole experiment.

    Returns:
        The directory. `load_child(out_dir, fork_epoch, child)` rebuilds a network from it.

    Raises:
        ConfigurationError: The directory belongs to another configuration, or the network does not fit the
            data.
        DataError: The data set is missing, is not what it should be, or is not the one the directory was begun with;
            where it lies makes no difference.
        NonFiniteError: The parent or children diverged. All others were trained, except for the children of forks that
            the parent did not reach. The message says which.
        NewerVersionError: The directory, or a snapshot, was written by another release.
        OptionError: `workers` is not positive, or TensorBoard is asked for and not installed.
        PartitionError: The layers that are to be traced are not those of the network.
    """
    if workers < 1:
        raise OptionError(f"workers={workers} must be at least 1.")
    if tensorboard is not None:
        check_tensorboard()
    directory = create_directory(out_dir, config)
    for run in directory.runs():
        unless_claimed(directory.lock_path(run.title), run.discard_damage)
    laboratory = _Laboratory(directory, device_of_rank(device), tensorboard, progress=progress)
    unfinished = any(run.status == "training" and not directory.cannot_start(run) for run in directory.runs())
    # What is new in the configuration is stored only after what cannot be trained or traced has been refused.
    if unfinished or open_directory(out_dir).config != config:
        laboratory.begin()
    if unfinished:
        with helpers(workers - 1, _help, directory, device, tensorboard):
            laboratory.train_all()
    failures = directory.failures()
    if failures:
        raise NonFiniteError("\n".join(f"{title}: {reason}" for title, reason in failures.items()))
    return directory


def _help(directory: ForkDirectory, device: torch.device | str, tensorboard: str | os.PathLike[str] | None) -> None:
    _Laboratory(directory, device_of_rank(device), tensorboard, progress=False).train_all()


class _Laboratory:
    """What training every run of a directory needs: the network, the data, the device, and who is to be told."""

    def __init__(
        self,
        directory: ForkDirectory,
        device: torch.device,
        tensorboard: str | os.PathLike[str] | None,
        *,
        progress: bool,
    ):
        self.directory = directory
        self.config = directory.config
        self.device = device
        self.tensorboard = tensorboard
        self.progress = progress and is_first_rank()
        self.bar = tqdm(disable=True)

    @functools.cached_property
    def data(self) -> ImageDataset:
        return load_split(self.directory, "train", progress=self.progress).to(self.device)

    @functools.cached_property
    def model(self) -> nn.Module:
        return initial_model(self.config).to(self.device)

    @property
    def made_with(self) -> dict[str, str | int]:
        """What decides the last bits of a result, besides the configuration."""
        cuda = self.device.type == "cuda"
        return {
            "lmc_curvature": version("lmc-curvature"),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(self.device) if cuda else _processor(),
            "threads": self.config.threads or torch.get_num_threads(),
        }

    def begin(self) -> None:
        """Check what can be checked before anything is started, and record what the experiment is begun with.

        Raises:
            LMCCurvatureError: As `run_forks`.
        """
        check_fit(self.config, self.data)
        # What cannot be traced is better known before days of training.
        check_layers(self.config)
        splits: dict[Split, ImageDataset] = {"train": self.data}
        if self.config.trace.test and "test" not in recorded_splits(self.directory):
            splits["test"] = self._load_test_split()
        for split, data in splits.items():
            check_examples(self.config.trace, data, split)
        warn_of_differences(self.directory, self.made_with)
        begin(self.directory, splits, self.made_with)

    def _load_test_split(self) -> ImageDataset:
        try:
            return load_split(self.directory, "test", progress=self.progress)
        except DataError as error:
            raise DataError(f"{error} To trace without a test split, set trace.test to false.") from error

    def train_all(self) -> None:
        """Train all runs, together with whatever other processes are at it."""
        tasks = [_Training(self, run) for run in self.directory.runs()]
        total = sum(run.epochs[-1] - run.first_epoch for run in self.directory.runs())
        with (
            cpu_threads(self.config.threads),
            tqdm(total=total, initial=self._trained(), unit="epoch", disable=not self.progress) as self.bar,
        ):
            share(tasks, on_turn=self._look_at_others)

    def _trained(self) -> int:
        return sum(run.epochs_trained() for run in self.directory.runs())

    def _look_at_others(self) -> None:
        self.bar.update(max(self._trained() - self.bar.n, 0))

    def on_epoch(self, metrics: EpochMetrics) -> None:
        self.bar.update()
        self.bar.set_postfix(loss=f"{metrics.loss:.3g}", accuracy=f"{metrics.accuracy:.1%}")


@dataclasses.dataclass(frozen=True)
class _Training:
    """The task of training one run to its end."""

    laboratory: _Laboratory
    trained: Run

    @property
    def lock_path(self) -> Path:
        return self.laboratory.directory.lock_path(self.trained.title)

    def is_done(self) -> bool:
        return self.trained.status != "training" or self.laboratory.directory.cannot_start(self.trained)

    def is_ready(self) -> bool:
        return self._is_parent or self.laboratory.directory.parent.snapshot_path(self.trained.first_epoch).is_file()

    def run(self) -> None:
        laboratory, run = self.laboratory, self.trained
        laboratory.bar.set_description(run.title)
        remove_partial_files(run.path)
        run.write_manifest("training", laboratory.made_with)
        try:
            with event_log(laboratory.tensorboard, run.path.relative_to(laboratory.directory.path)) as log:
                state = self._train(log)
        except NonFiniteError as error:
            run.write_manifest("diverged", laboratory.made_with, str(error))
            return
        run.write_metrics(state.history)
        run.latest_path.unlink(missing_ok=True)
        run.write_manifest("finished", laboratory.made_with)

    def _train(self, log: Callable[[EpochMetrics], None]) -> TrainingState:
        """Train to the end, leaving a snapshot at each epoch that is kept."""
        run = self.trained
        state = self._start()
        for epoch in run.epochs:
            if run.snapshot_path(epoch).is_file():
                state = TrainingState.load(run.snapshot_path(epoch))
                continue
            state = self._advance(run.furthest(state, epoch), epoch, log)
            state.save(run.snapshot_path(epoch))
            run.write_manifest("training", self.laboratory.made_with)
        return state

    @property
    def _is_parent(self) -> bool:
        return self.trained == self.laboratory.directory.parent

    def _start(self) -> TrainingState:
        if self._is_parent:
            return capture_state(initial_model(self.laboratory.config))
        directory = self.laboratory.directory
        return load_state(directory, directory.parent, self.trained.first_epoch)

    def _advance(self, state: TrainingState, until: int, log: Callable[[EpochMetrics], None]) -> TrainingState:
        """Train to an epoch of the schedule, leaving a state to continue from every few seconds.

        Every epoch starts from a state, and a state from a file is the same state: so it makes no difference to the
        result whether training was interrupted between two epochs.
        """

        def report(metrics: EpochMetrics) -> None:
            self.laboratory.on_epoch(metrics)
            log(metrics)

        saved = time.monotonic()
        while state.epoch < until:
            state = train(
                self.laboratory.model,
                self.laboratory.data,
                self.laboratory.config.training,
                order_seed=self.trained.order_seed,
                start=state,
                until=state.epoch + 1,
                on_epoch=report,
                progress=False,
            )
            if time.monotonic() - saved >= _SECONDS_BETWEEN_SAVES and state.epoch < until:
                state.save(self.trained.latest_path)
                self.trained.write_metrics(state.history)
                saved = time.monotonic()
        return state


def _processor() -> str:
    """What decides the last bits on a CPU: which vector instructions torch uses there."""
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
