"""Trace an experiment: compute what lies between siblings, at every epoch at which they were stored.

traces/config.json                          what is traced
traces/fork-0004/epoch-0010/*.safetensors   what is computed of one pair of siblings; see `pair`
traces/*.csv                                all of it as tidy tables; see `tables`
traces/checksums.json                       the checksums of the tables
"""

import contextlib
import os
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from tqdm.auto import tqdm

from lmc_curvature.errors import CheckpointError, LMCCurvatureError, NonFiniteError, OptionError
from lmc_curvature.forking import ForkDirectory, TraceConfig, initial_model, load_fork_data, open_directory
from lmc_curvature.forking.checks import check_examples, check_layers
from lmc_curvature.forking.configuration import check_same, parse_config, stored_trace
from lmc_curvature.forking.directory import explain_damage, fork_command
from lmc_curvature.forking.sharing import Task, device_of_rank, helpers, progress_of_rank, share, unless_claimed
from lmc_curvature.objective.risk import Objective
from lmc_curvature.sources import Batches, Split
from lmc_curvature.sources.augmentation import Crops
from lmc_curvature.storage import read_json, write_json
from lmc_curvature.tracing.pair import Pair, trace_pair
from lmc_curvature.tracing.tables import Traces, write_tables

_VERSION = "1"

Bench = tuple[Objective, Mapping[str, Batches]]


def trace_forks(
    out_dir: str | os.PathLike[str],
    *,
    data: str | None = None,
    device: torch.device | str = "cpu",
    workers: int = 1,
    progress: bool | None = None,
) -> Traces:
    """Predict and measure the barriers between the first two siblings of every fork, epoch by epoch.

    What was traced before is kept, so the same call continues where an earlier one was stopped or killed, and ends with
    the same tables. What can be traced is, also when networks are missing or have diverged, and however the call ends,
    the tables hold what was traced until then. Several processes may make the same call, as for `run_forks`.

    Args:
        out_dir: The directory of a finished experiment; its configuration says what is traced.
        data: Where the data set lies now, if it has moved since the networks were trained on it.
        device: Where to compute.
        workers: Processes to compute in, this one included; see `run_forks`.
        progress: Show a bar of epochs; by default on a terminal and in notebooks.

    Returns:
        The tables, which lie as CSV files in the directory `traces`.

    Raises:
        CheckpointError: Snapshots are missing, damaged or of another release. The message names them and what makes
            them. All others were traced; `read_traces` has the tables. Or the record of what was traced is damaged.
        ConfigurationError: The directory holds traces of another configuration. The message has the differences.
        NewerVersionError: The directory or a trace was written by another release.
        DataError: The data set is missing, is not the one that the networks were trained on, or has fewer examples than
            are to be traced.
        NonFiniteError: Networks have diverged, or something between siblings is infinite or not a number. The message
            says which. All others were traced; `read_traces` has the tables.
        OptionError: `workers` is not positive, or there is no such device.
    """
    if workers < 1:
        raise OptionError(f"workers={workers} must be at least 1.")
    directory, device, progress = open_directory(out_dir), device_of_rank(device), progress_of_rank(progress)
    _check_config(directory)
    pairs = _pairs(directory)
    for pair in pairs:
        unless_claimed(pair.lock_path, pair.discard_damage)
    ready = [pair for pair in pairs if pair.is_done() or not pair.missing()]
    failures = {}
    try:
        if not all(pair.is_done() for pair in ready):
            work = partial(_trace_all, directory, ready, data, device, progress=False)
            bench = _prepare(directory, data, device, progress=progress)
            with helpers(workers - 1, work):
                failures = work(bench, progress=progress)
    except BaseException:
        # The error is what there is to tell, whatever becomes of the tables.
        with contextlib.suppress(OSError, LMCCurvatureError):
            write_tables(directory, pairs)
        raise
    traces = write_tables(directory, pairs)
    _report(directory, pairs, failures)
    return traces


def _prepare(directory: ForkDirectory, data: str | None, device: torch.device, *, progress: bool | None) -> Bench:
    """Load the data, and build the objective: one for all pairs, so that the network is captured once."""
    config = directory.config.trace
    splits: tuple[Split, ...] = ("train", "test") if config.test else ("train",)
    loaders = {}
    for split in splits:
        images = load_fork_data(directory, split, source=data, progress=progress)
        check_examples(config, images, split)
        images = images if config.examples is None else images.subset(config.examples)
        loaders[split] = images.to(device).batches(config.batch_size)
        if split == "train" and config.batch_norm == "recalibrate":
            # Statistics are re-estimated on images as in training.
            augmented = directory.config.training.augmentation == "crop-flip"
            crops = Crops.draw(len(images), torch.Generator().manual_seed(0)) if augmented else None
            loaders["recalibration"] = images.to(device).batches(config.batch_size, crops=crops and crops.to(device))
    check_layers(directory.config)
    # It is evaluated at the states of the pairs, not at its own.
    model = initial_model(directory.config).to(device).eval()
    return Objective(model, loaders["train"], batch_norm=config.batch_norm), loaders


def _trace_all(
    directory: ForkDirectory,
    pairs: Sequence[Pair],
    data: str | None,
    device: torch.device,
    bench: Bench | None = None,
    *,
    progress: bool | None,
) -> dict[str, Exception]:
    """Trace pairs together with whatever other processes are at it; return why some could not be, by their titles."""
    objective, loaders = bench or _prepare(directory, data, device, progress=progress)
    failures: dict[str, Exception] = {}

    def is_over(pair: Pair) -> bool:
        return pair.is_done() or pair.title in failures

    def work(pair: Pair, bar: tqdm) -> None:
        try:
            trace_pair(pair, objective, loaders)
        except (NonFiniteError, CheckpointError) as error:
            failures[pair.title] = error

    share(
        [Task(pair.title, pair.lock_path, partial(is_over, pair), partial(work, pair)) for pair in pairs],
        total=len(pairs),
        count=lambda: sum(pair.is_done() for pair in pairs),
        threads=directory.config.threads,
        progress=progress,
    )
    return failures


def _pairs(directory: ForkDirectory) -> list[Pair]:
    """Every fork and epoch to trace, without forks of which a sibling will never be trained to the end."""
    failed = _failed_siblings(directory)
    return [
        Pair(directory, fork, epoch)
        for fork in directory.config.fork_epochs
        if not any(directory.child(fork, child).title in failed for child in (0, 1))
        for epoch in directory.config.child_epochs(fork)
    ]


def _failed_siblings(directory: ForkDirectory) -> dict[str, str]:
    titles = {directory.child(fork, child).title for fork in directory.config.fork_epochs for child in (0, 1)}
    return {title: reason for title, reason in directory.failures().items() if title in titles}


def _report(directory: ForkDirectory, pairs: list[Pair], failures: Mapping[str, Exception]) -> None:
    """Raise an error that names all that was not traced, if anything was not."""
    reasons = _failed_siblings(directory) | {title: str(error) for title, error in failures.items()}
    problems = [f"{title}: {reason}" for title, reason in reasons.items()]
    missing = {path: None for pair in pairs if not pair.is_done() for path in pair.missing()}
    late = [pair for pair in pairs if not (pair.is_done() or pair.missing() or pair.title in failures)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        problems.append(f"{next(iter(missing))}{more} missing: {fork_command(directory.path)} makes them.")
    if late:
        problems.append(
            f"{late[0].title}{f' and {len(late) - 1} more' if len(late) > 1 else ''} not traced: their networks came "
            f"later. trace_forks({os.fspath(directory.path)!r}), or lmc-curvature trace {directory.path}, goes on."
        )
    if problems:
        if any(pair.is_done() for pair in pairs):
            problems.append(f"All others are in the tables of {directory.path / 'traces'}.")
        unreadable = missing or late or any(isinstance(error, CheckpointError) for error in failures.values())
        raise (CheckpointError if unreadable else NonFiniteError)("\n".join(problems))


def _check_config(directory: ForkDirectory) -> None:
    path = directory.path / "traces" / "config.json"
    config = directory.config.trace
    with directory.writing(path.parent):
        if not path.is_file():
            write_json(path, {"version": _VERSION, **config.model_dump(mode="json")})
    with explain_damage(f"Remove it if the traces are those that the configuration asks for now, else {path.parent}."):
        values = read_json(path, _VERSION)
    remedy = f"use the release that wrote it, or move {path.parent} away"
    source = f"{path} has keys or values that this release does not know ({remedy})"
    stored = parse_config(TraceConfig, stored_trace(values), source=source)
    check_same(stored, config, held=f"{path.parent} holds traces of", remedy=f"Move {path.parent} away")
