"""One pair of siblings at one epoch: what is computed of it, and the files that keep it.

traces/fork-0004/epoch-0010/predicted.safetensors  `BarrierPrediction` on the training split
                            geometry.safetensors   `SiblingGeometry`: distance, angles, solution plane
                            train.safetensors      `BarrierMeasurement` of the whole network, loss and error
                            test.safetensors       the same on the test split
                            sets.safetensors       `BarrierMeasurement` of layers, and of the first and last k layers
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lmc_curvature.barrier.measure import measure_barrier
from lmc_curvature.barrier.measurement import BarrierMeasurement
from lmc_curvature.barrier.predict import predict_on_segment
from lmc_curvature.barrier.prediction import BarrierPrediction
from lmc_curvature.forking import ForkDirectory, load_child, load_parent
from lmc_curvature.forking.configuration import When
from lmc_curvature.geometry import SiblingGeometry
from lmc_curvature.objective.memo import Memo
from lmc_curvature.objective.risk import Objective
from lmc_curvature.segment.partition import LayerPartition
from lmc_curvature.segment.segment import Segment
from lmc_curvature.sources import Batches
from lmc_curvature.storage import discard_if_damaged, remove_partial_files

# Not what a device happens to have free: how a batch is cut into tiles decides the last bits of a prediction.
_MEMORY_GIB = 4.0

Result = BarrierPrediction | BarrierMeasurement | SiblingGeometry
_KINDS: Mapping[str, type[Result]] = {"predicted": BarrierPrediction, "geometry": SiblingGeometry}


@dataclasses.dataclass(frozen=True)
class Pair:
    """The first two siblings of a fork at an epoch."""

    directory: ForkDirectory
    fork_epoch: int
    epoch: int

    @property
    def path(self) -> Path:
        """Path of the directory of its files."""
        return self.directory.trace_path(self.fork_epoch, self.epoch)

    @property
    def title(self) -> str:
        """The name that messages and progress bars give it."""
        return f"fork {self.fork_epoch}, epoch {self.epoch}"

    @property
    def lock_path(self) -> Path:
        """Path of the lock that whoever writes the files holds."""
        return self.directory.lock_path(f"trace {self.title}")

    def is_chosen(self, when: When) -> bool:
        """Return whether the epoch is one of those at which sets of layers are measured."""
        return when == "all" or (when == "last" and self.epoch == self.directory.config.training.epochs)

    def files(self) -> list[Path]:
        """Return the path of each file, in the order in which they are written."""
        trace = self.directory.config.trace
        names = ["predicted", "geometry", "train"]
        if trace.test:
            names.append("test")
        if self.is_chosen(trace.layers) or self.is_chosen(trace.cumulative):
            names.append("sets")
        return [self.path / f"{name}.safetensors" for name in names]

    def is_done(self) -> bool:
        """Return whether every file is there."""
        return all(path.is_file() for path in self.files())

    def missing(self) -> list[Path]:
        """Return the snapshots that it takes and that are not there."""
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
        for path in self.files():
            discard_if_damaged(path, _KINDS.get(path.stem, BarrierMeasurement).load)


def trace_pair(pair: Pair, objective: Objective, loaders: Mapping[str, Batches]) -> None:
    """Compute what is not there of a pair, and write a file of each result.

    Args:
        pair: The siblings.
        objective: The training loss, of any network of the experiment's architecture.
        loaders: The examples of each split on which barriers are measured, and under `"recalibrate"` those on which
            statistics are re-estimated.

    Raises:
        CheckpointError: A snapshot is missing or damaged.
        NonFiniteError: A network or something between the two is infinite or not a number.
    """
    remove_partial_files(pair.path)
    siblings = _siblings(pair, pair.epoch, objective)
    for path in pair.files():
        if not path.is_file():
            _compute(path.stem, pair, siblings, objective, loaders).save(path)


def _compute(
    name: str, pair: Pair, siblings: list[nn.Module], objective: Objective, loaders: Mapping[str, Batches]
) -> Result:
    config = pair.directory.config.trace
    first, second = siblings
    statistics = {"batch_norm": config.batch_norm, "recalibration": loaders.get("recalibration")}
    measure = partial(measure_barrier, first, second, **statistics, keep_partial=False, progress=False)
    if name == "predicted":
        segment = Segment(first, second, layers=config.partition, batch_norm=config.batch_norm)
        options: dict[str, Any] = {"memory_gib": _MEMORY_GIB, "progress": False}
        return predict_on_segment(objective, segment, anchors=config.anchors, **options)
    if name == "geometry":
        fork, last = _compared_with(pair, objective)
        return SiblingGeometry.of(*(dict(network.named_parameters()) for network in (*siblings, fork, *last)))
    if name == "sets":
        sets, alphas = _sets(pair, first), config.layer_alphas
        return measure(loaders["train"], layers=config.partition, sets=sets, alphas=alphas, metrics=("loss",))
    return measure(loaders["test" if name == "test" else "train"], alphas=config.alphas)


def _compared_with(pair: Pair, objective: Objective) -> tuple[nn.Module, list[nn.Module]]:
    """The fork and the last siblings, on the device: every epoch of a fork is compared with the same."""

    def read() -> tuple[nn.Module, list[nn.Module]]:
        fork = load_parent(pair.directory.path, pair.fork_epoch).to(objective.device)
        return fork, _siblings(pair, pair.directory.config.training.epochs, objective)

    return objective.memo("ends of a fork", lambda: Memo(most=1))((pair.directory.path, pair.fork_epoch), read)


def _siblings(pair: Pair, epoch: int, objective: Objective) -> list[nn.Module]:
    path = pair.directory.path
    return [load_child(path, pair.fork_epoch, child, epoch).to(objective.device) for child in (0, 1)]


def _sets(pair: Pair, network: nn.Module) -> list[tuple[str, ...]]:
    """Return the sets of layers that are measured at the epoch of a pair."""
    config = pair.directory.config.trace
    names = LayerPartition.of(network, config.partition, batch_norm=config.batch_norm).names
    sets = [(name,) for name in names] if pair.is_chosen(config.layers) else []
    if pair.is_chosen(config.cumulative):
        sets += [members for _, _, members in cumulative_sets(names) if members not in sets]
    return sets


def cumulative_sets(layers: Sequence[str]) -> Iterator[tuple[str, int, tuple[str, ...]]]:
    """Yield side, number and names of the first and of the last k layers, for every k (Adilova et al. 2023)."""
    for count in range(1, len(layers) + 1):
        yield "first", count, tuple(layers[:count])
        yield "last", count, tuple(layers[len(layers) - count :])
