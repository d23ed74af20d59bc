"""Trace an experiment: what lies between siblings, at every epoch at which they were stored.

traces/config.json                                 what is traced
traces/fork-0004/epoch-0010/predicted.safetensors  `BarrierPrediction` on the training split
                            train.safetensors      `BarrierMeasurement` of the whole network, loss and error
                            test.safetensors       the same on the test split
                            geometry.safetensors   `SiblingGeometry`: distance, angles, solution plane
                            sets.safetensors       `BarrierMeasurement` of layers, and of the first and last k layers
traces/*.csv                                       all of it as tidy tables; see `traces`
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from lmc_curvature.barrier.measurement import BarrierMeasurement, measure_barrier
from lmc_curvature.barrier.prediction import BarrierPrediction, predict_on_segment
from lmc_curvature.errors import (
    CheckpointError,
    ConfigurationError,
    FileFormatError,
    LMCCurvatureError,
    NewerVersionError,
    NonFiniteError,
    OptionError,
)
from lmc_curvature.forking.checks import check_examples, check_layers
from lmc_curvature.forking.directory import (
    ForkDirectory,
    differences,
    initial_model,
    load_child,
    load_parent,
    open_directory,
)
from lmc_curvature.forking.plan import TraceConfig, When
from lmc_curvature.forking.provenance import load_split
from lmc_curvature.forking.sharing import cpu_threads, device_of_rank, helpers, is_first_rank, share, unless_claimed
from lmc_curvature.geometry import SiblingGeometry
from lmc_curvature.objective.risk import Objective
from lmc_curvature.segment.partition import LayerPartition
from lmc_curvature.segment.segment import Segment
from lmc_curvature.sources.data import Batches, Split
from lmc_curvature.storage import discard_if_damaged, read_json, remove_partial_files, write_json
from lmc_curvature.tracing.traces import Traces, cumulative_sets, write_tables

_VERSION = "1"
# Not what a device happens to have free: how a batch is cut into tiles decides the last bits of a prediction.
_MEMORY_GIB = 4.0

Traced = BarrierPrediction | BarrierMeasurement | SiblingGeometry


def trace_forks(
    out_dir: str | os.PathLike[str],
    *,
    data: str | None = None,
    device: torch.device | str = "cpu",
    workers: int = 1,
    progress: bool = True,
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
        progress: Show a bar of epochs.

    Returns:
        The tables, which lie as CSV files in the directory `traces`.

    Raises:
        CheckpointError: Snapshots are missing, damaged or of another release. The message names them and what makes
            them. All others were traced; `read_traces` has the tables.
        ConfigurationError: The directory holds traces of another configuration. The message has the differences.
        NewerVersionError: The directory or a trace was written by another release.
        DataError: The data set is missing, is not the one that the networks were trained on, or has fewer examples than
            are to be traced.
        NonFiniteError: Networks have diverged, or something between siblings is infinite or not a number. The message
            says which. All others were traced; `read_traces` has the tables.
        OptionError: `workers` is not positive.
    """
    if workers < 1:
        raise OptionError(f"workers={workers} must be at least 1.")
    directory = open_directory(out_dir)
    _check_config(directory)
    pairs = _pairs(directory)
    for pair in pairs:
        unless_claimed(pair.lock_path, pair.discard_damage)
    tracer = _Tracer(directory, data, device_of_rank(device), progress=progress)
    done = ((pair.fork_epoch, pair.epoch) for pair in pairs if pair.is_done())
    try:
        if any(not pair.is_done() for pair in tracer.pairs):
            tracer.check()
            with helpers(workers - 1, _help, directory, data, device):
                tracer.trace_all()
    except BaseException:
        # The error is what there is to tell, whatever becomes of the tables.
        with contextlib.suppress(OSError, LMCCurvatureError):
            write_tables(directory, done)
        raise
    traces = write_tables(directory, done)
    _report(directory, pairs, tracer.failures)
    return traces


def _help(directory: ForkDirectory, data: str | None, device: torch.device | str) -> None:
    _Tracer(directory, data, device_of_rank(device), progress=False).trace_all()


@dataclasses.dataclass(frozen=True)
class _Pair:
    """The first two siblings of a fork at an epoch, and the files about them."""

    directory: ForkDirectory
    fork_epoch: int
    epoch: int

    @property
    def path(self) -> Path:
        return self.directory.trace_path(self.fork_epoch, self.epoch)

    @property
    def title(self) -> str:
        return f"fork {self.fork_epoch}, epoch {self.epoch}"

    @property
    def lock_path(self) -> Path:
        """Path of the lock that whoever writes the files holds."""
        return self.directory.lock_path(f"trace {self.title}")

    @property
    def sets(self) -> tuple[bool, bool]:
        """Whether layers, and cumulative sets of layers, are measured at this epoch."""
        trace = self.directory.config.trace
        return self._is_chosen(trace.layers), self._is_chosen(trace.cumulative)

    def _is_chosen(self, when: When) -> bool:
        return when == "all" or (when == "last" and self.epoch == self.directory.config.training.epochs)

    def files(self) -> Iterator[tuple[Path, type[Traced]]]:
        """The files, in the order in which they are written."""
        yield self.path / "predicted.safetensors", BarrierPrediction
        yield self.path / "geometry.safetensors", SiblingGeometry
        yield self.path / "train.safetensors", BarrierMeasurement
        if self.directory.config.trace.test:
            yield self.path / "test.safetensors", BarrierMeasurement
        if any(self.sets):
            yield self.path / "sets.safetensors", BarrierMeasurement

    def is_done(self) -> bool:
        return all(path.is_file() for path, _ in self.files())

    def missing(self) -> list[Path]:
        """The snapshots that it takes and that are not there."""
        directory, last = self.directory, self.directory.config.training.epochs
        siblings = [directory.child(self.fork_epoch, child) for child in (0, 1)]
        needed = [directory.parent.snapshot_path(self.fork_epoch)]
        needed += [run.snapshot_path(epoch) for run in siblings for epoch in sorted({self.epoch, last})]
        return [path for path in needed if not path.is_file()]

    def discard_damage(self) -> None:
        """Remove files that cannot be read, with a warning that names each, and unfinished files.

        Raises:
            NewerVersionError: A file was written by another release; it is left alone.
        """
        remove_partial_files(self.path)
        for path, kind in self.files():
            discard_if_damaged(path, kind.load)


class _Tracer:
    """What tracing every pair of a directory needs: the data, the device and a progress bar; and what failed."""

    def __init__(self, directory: ForkDirectory, data: str | None, device: torch.device, *, progress: bool):
        self.directory = directory
        self.data = data
        self.config = directory.config.trace
        self.device = device
        self.progress = progress and is_first_rank()
        self.bar = tqdm(disable=True)
        self.pairs = [pair for pair in _pairs(directory) if pair.is_done() or not pair.missing()]
        self.failures: dict[str, NonFiniteError | CheckpointError] = {}

    def loader(self, split: Split) -> Batches:
        """The examples of a split that are traced: of those trained on, for the training split."""
        return self._train if split == "train" else self._test

    @functools.cached_property
    def _train(self) -> Batches:
        return self._load("train")

    @functools.cached_property
    def _test(self) -> Batches:
        return self._load("test")

    def _load(self, split: Split) -> Batches:
        data = load_split(self.directory, split, self.data, progress=self.progress)
        check_examples(self.config, data, split)
        data = data if self.config.examples is None else data.subset(self.config.examples)
        return data.to(self.device).batches(self.config.batch_size)

    @functools.cached_property
    def objective(self) -> Objective:
        """One for all pairs, so that the network is captured once. It is evaluated at their states, not at its own."""
        model = initial_model(self.directory.config).to(self.device).eval()
        return Objective(model, self.loader("train"), batch_norm=self.config.batch_norm)

    def child(self, fork_epoch: int, child: int, epoch: int) -> nn.Module:
        return load_child(self.directory.path, fork_epoch, child, epoch).to(self.device)

    def check(self) -> None:
        """Load the data and cut the network into layers, before anything is started."""
        self.loader("train")
        if self.config.test:
            self.loader("test")
        check_layers(self.directory.config)

    def trace_all(self) -> None:
        """Trace all pairs whose networks are there, together with whatever other processes are at it."""
        pairs = self.pairs
        with (
            cpu_threads(self.directory.config.threads),
            tqdm(total=len(pairs), desc="tracing", unit="epoch", disable=not self.progress) as self.bar,
        ):

            def look() -> None:
                self.bar.update(sum(pair.is_done() for pair in pairs) - self.bar.n)

            share([_Tracing(self, pair) for pair in pairs], on_turn=look)


@dataclasses.dataclass(frozen=True)
class _Tracing:
    """The task of tracing one pair."""

    tracer: _Tracer
    pair: _Pair

    @property
    def lock_path(self) -> Path:
        return self.pair.lock_path

    def is_done(self) -> bool:
        return self.pair.is_done() or self.pair.title in self.tracer.failures

    def is_ready(self) -> bool:
        return True

    def run(self) -> None:
        self.tracer.bar.set_description(f"tracing {self.pair.title}")
        remove_partial_files(self.pair.path)
        try:
            siblings = self._siblings()
            for path, _ in self.pair.files():
                if not path.is_file():
                    self._compute(path.stem, siblings).save(path)
        except (NonFiniteError, CheckpointError) as error:
            self.tracer.failures[self.pair.title] = error

    def _siblings(self) -> tuple[nn.Module, nn.Module]:
        first, second = (self.tracer.child(self.pair.fork_epoch, child, self.pair.epoch) for child in (0, 1))
        return first, second

    def _compute(self, name: str, siblings: tuple[nn.Module, nn.Module]) -> Traced:
        tracer, config = self.tracer, self.tracer.config
        if name == "predicted":
            segment = Segment(*siblings, layers=config.partition, batch_norm=config.batch_norm)
            return predict_on_segment(tracer.objective, segment, memory_gib=_MEMORY_GIB, progress=False)
        if name == "geometry":
            return self._geometry(siblings)
        if name == "sets":
            return self._measure_sets(siblings)
        loader = tracer.loader("test" if name == "test" else "train")
        return measure_barrier(*siblings, loader, alphas=config.alphas, batch_norm=config.batch_norm, progress=False)

    def _geometry(self, siblings: tuple[nn.Module, nn.Module]) -> SiblingGeometry:
        tracer, fork = self.tracer, self.pair.fork_epoch
        last = tracer.directory.config.training.epochs
        networks = [
            *siblings,
            load_parent(tracer.directory.path, fork).to(tracer.device),
            *(tracer.child(fork, child, last) for child in (0, 1)),
        ]
        return SiblingGeometry.of(*(dict(network.named_parameters()) for network in networks))

    def _measure_sets(self, siblings: tuple[nn.Module, nn.Module]) -> BarrierMeasurement:
        config = self.tracer.config
        layers, cumulative = self.pair.sets
        names = LayerPartition.of(siblings[0], config.partition, batch_norm=config.batch_norm).names
        sets = [(name,) for name in names] if layers else []
        if cumulative:
            sets += [members for _, _, members in cumulative_sets(names) if members not in sets]
        return measure_barrier(
            *siblings,
            self.tracer.loader("train"),
            layers=config.partition,
            sets=sets,
            alphas=config.layer_alphas,
            batch_norm=config.batch_norm,
            metrics=("loss",),
            progress=False,
        )


def _pairs(directory: ForkDirectory) -> list[_Pair]:
    """Every fork and epoch to trace, without forks of which a sibling will never be trained to the end."""
    failed = _failed_siblings(directory)
    return [
        _Pair(directory, fork, epoch)
        for fork in directory.config.fork_epochs
        if not any(directory.child(fork, child).title in failed for child in (0, 1))
        for epoch in directory.config.child_epochs(fork)
    ]


def _failed_siblings(directory: ForkDirectory) -> dict[str, str]:
    titles = {directory.child(fork, child).title for fork in directory.config.fork_epochs for child in (0, 1)}
    return {title: reason for title, reason in directory.failures().items() if title in titles}


def _report(directory: ForkDirectory, pairs: list[_Pair], failures: Mapping[str, Exception]) -> None:
    """Raise an error that names all that was not traced, if anything was not."""
    reasons = _failed_siblings(directory) | {title: str(error) for title, error in failures.items()}
    problems = [f"{title}: {reason}" for title, reason in reasons.items()]
    missing = {path: None for pair in pairs if not pair.is_done() for path in pair.missing()}
    late = [pair for pair in pairs if not (pair.is_done() or pair.missing() or pair.title in failures)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        problems.append(
            f"{next(iter(missing))}{more} missing: run_forks(config, {os.fspath(directory.path)!r}), or lmc-curvature "
            f"fork CONFIG --out {directory.path}, makes them."
        )
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
    try:
        stored = TraceConfig(**read_json(path, _VERSION))
    except ConfigurationError as error:
        raise ConfigurationError(
            f"{path} has keys or values that this release does not know:\n{error}\nUse the release that wrote it, or "
            f"move {path.parent} away."
        ) from error
    except NewerVersionError:
        raise
    except FileFormatError as error:
        raise ConfigurationError(
            f"{error} Remove it if the traces are those that the configuration asks for now, else {path.parent}."
        ) from error
    changes = differences(stored, config)
    if changes:
        raise ConfigurationError(
            f"{path.parent} holds traces of another configuration:\n" + "\n".join(changes) + f"\nMove {path.parent} "
            "away, or use the same configuration."
        )
