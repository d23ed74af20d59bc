"""Forking: train a parent, and from its states at chosen epochs children that differ by their data order alone.

Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis" (2020), section 3, spawn children
so.
"""

import dataclasses
import importlib.util
import os
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial

import torch
from tqdm.auto import tqdm

from lmc_curvature.errors import DataError, NonFiniteError, OptionError
from lmc_curvature.forking.checks import check_examples, check_fit, check_layers
from lmc_curvature.forking.configuration import ForkConfig
from lmc_curvature.forking.directory import ForkDirectory, create_directory, initial_model, load_state, open_directory
from lmc_curvature.forking.events import event_log
from lmc_curvature.forking.provenance import Conditions, begin, conditions, load_fork_data, recorded_splits
from lmc_curvature.forking.runs import Run
from lmc_curvature.forking.sharing import Task, device_of_rank, helpers, progress_of_rank, share, unless_claimed
from lmc_curvature.forking.state import EpochMetrics, TrainingState, capture_state
from lmc_curvature.forking.trainer import Trainer
from lmc_curvature.forking.trainers import Trainers
from lmc_curvature.sources import ImageDataset, Split
from lmc_curvature.storage import remove_partial_files


def run_forks(
    config: ForkConfig,
    out_dir: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    workers: int = 1,
    together: int | None = None,
    tensorboard: str | os.PathLike[str] | None = None,
    save_seconds: float = 5.0,
    progress: bool | None = None,
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
        together: Networks that each process trains in turns, step by step; they come out with the same bits as one
            after another. On a CUDA device they are computed side by side, each on a stream of its own, and by default
            these are as many as fit into its memory and still make it faster; elsewhere it is one.
        tensorboard: Also log the metrics of every run there, as TensorBoard events.
        save_seconds: How often a state to continue from is written: what being killed costs at most, besides the epoch
            at hand.
        progress: Show one bar of epochs for the whole experiment; by default on a terminal and in notebooks.

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
        OptionError: `workers` or `together` is not positive, there is no such device, or TensorBoard is asked for and
            not installed.
        PartitionError: The layers that are to be traced are not those of the network.
    """
    if workers < 1:
        raise OptionError(f"workers={workers} must be at least 1.")
    if together is not None and together < 1:
        raise OptionError(f"together={together} must be at least 1.")
    if tensorboard is not None and importlib.util.find_spec("tensorboard") is None:
        raise OptionError("TensorBoard events need the package tensorboard: pip install lmc-curvature[tensorboard].")
    device, progress = device_of_rank(device), progress_of_rank(progress)
    directory = create_directory(out_dir, config)
    runs = directory.runs()
    for run in runs:
        unless_claimed(directory.lock_path(run.title), run.discard_damage)
    unfinished = not all(directory.is_over(run) for run in runs)
    # What is new in the configuration is stored only after what cannot be trained or traced has been refused.
    if unfinished or open_directory(out_dir).config != config:
        data = load_fork_data(directory, "train", progress=progress).to(device)
        _begin(directory, data, conditions(config, device), progress=progress)
        if unfinished:
            laboratory = _Laboratory(directory, device, workers, together, tensorboard, save_seconds)
            with helpers(workers - 1, partial(_train_all, laboratory)):
                _train_all(laboratory, data, progress=progress)
    failures = directory.failures()
    if failures:
        raise NonFiniteError("\n".join(f"{title}: {reason}" for title, reason in failures.items()))
    return directory


def _begin(directory: ForkDirectory, data: ImageDataset, made_with: Conditions, *, progress: bool | None) -> None:
    """Check what can be checked before anything is trained, and record what the experiment is begun with."""
    config = directory.config
    check_fit(config, data)
    # What cannot be traced is better known before days of training.
    check_layers(config)
    splits: dict[Split, ImageDataset] = {"train": data}
    if config.trace.test and "test" not in recorded_splits(directory):
        try:
            splits["test"] = load_fork_data(directory, "test", progress=progress)
        except DataError as error:
            raise DataError(f"{error} To trace without a test split, set trace.test to false.") from error
    for split, images in splits.items():
        check_examples(config.trace, images, split)
    begin(directory, splits, made_with)


@dataclasses.dataclass(frozen=True)
class _Laboratory:
    """An experiment, and the options of `run_forks` that every process trains with."""

    directory: ForkDirectory
    device: torch.device
    workers: int
    together: int | None
    tensorboard: str | os.PathLike[str] | None
    save_seconds: float

    @property
    def made_with(self) -> Conditions:
        return conditions(self.directory.config, self.device)


def _train_all(laboratory: _Laboratory, data: ImageDataset | None = None, *, progress: bool | None = False) -> None:
    """Train all runs, together with whatever other processes are at it."""
    directory, device = laboratory.directory, laboratory.device
    config, runs = directory.config, directory.runs()
    data = load_fork_data(directory, "train", progress=progress).to(device) if data is None else data
    trainers = Trainers(lambda: Trainer(initial_model(config).to(device), data, config.training), device)
    share(
        [
            Task(
                run.title,
                directory.lock_path(run.title),
                is_done=partial(directory.is_over, run),
                is_ready=partial(directory.can_start, run),
                work=partial(_train, laboratory, run, trainers),
            )
            for run in runs
        ],
        total=sum(run.epochs[-1] - run.first_epoch for run in runs),
        count=lambda: sum(run.epochs_trained() for run in runs),
        together=laboratory.together or _together(laboratory, trainers),
        threads=config.threads,
        progress=progress,
    )


def _together(laboratory: _Laboratory, trainers: Trainers) -> int:
    """Networks to train in turns: as many as fit, but not so many that another process has nothing to do."""
    processes = laboratory.workers * int(os.environ.get("WORLD_SIZE", "1"))
    unfinished = sum(not laboratory.directory.is_over(run) for run in laboratory.directory.runs())
    return min(trainers.room(laboratory.workers), -(-unfinished // processes) or 1)


def _train(laboratory: _Laboratory, run: Run, trainers: Trainers, bar: tqdm) -> Iterator[None]:
    """Train a run to its end, a step each time this is advanced, and tell its manifest how that went."""
    remove_partial_files(run.path)
    run.write_manifest("training", laboratory.made_with)

    def report(metrics: EpochMetrics) -> None:
        bar.update()
        bar.set_postfix(loss=f"{metrics.loss:.3g}", accuracy=f"{metrics.accuracy:.1%}")
        log(metrics)

    try:
        with (
            event_log(laboratory.tensorboard, run.path.relative_to(laboratory.directory.path)) as log,
            trainers.borrowed() as trainer,
        ):
            state = yield from _train_to_end(laboratory, run, trainer, report)
    except NonFiniteError as error:
        run.write_manifest("diverged", laboratory.made_with, str(error))
        return
    run.write_metrics(state.history)
    run.latest_path.unlink(missing_ok=True)
    run.write_manifest("finished", laboratory.made_with)


def _train_to_end(
    laboratory: _Laboratory, run: Run, trainer: Trainer, report: Callable[[EpochMetrics], None]
) -> Generator[None, None, TrainingState]:
    """Train to the end, leaving a snapshot at each epoch that is kept, and between them a state every few seconds.

    A state from a file is the same state as the trainer's: so it makes no difference to the result whether training was
    interrupted between two epochs.
    """
    directory = laboratory.directory
    if run == directory.parent:
        state = capture_state(initial_model(directory.config))
    else:
        state = load_state(directory, directory.parent, run.first_epoch)
    for epoch in run.epochs:
        if run.snapshot_path(epoch).is_file():
            state = TrainingState.load(run.snapshot_path(epoch))
            continue
        state, saved = run.furthest(state, epoch), time.monotonic()
        trainer.load(state)
        while trainer.epoch < epoch:
            yield from trainer.steps(run.order_seed)
            report(trainer.history[-1])
            if time.monotonic() - saved >= laboratory.save_seconds and trainer.epoch < epoch:
                trainer.state().save(run.latest_path)
                run.write_metrics(trainer.history)
                saved = time.monotonic()
        state = trainer.state()
        state.save(run.snapshot_path(epoch))
        run.write_manifest("training", laboratory.made_with)
    return state
