"""Metrics of training as TensorBoard events, for whoever watches an experiment while it runs."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from lmc_curvature.forking.state import EpochMetrics


@contextlib.contextmanager
def event_log(directory: str | os.PathLike[str] | None, run: Path) -> Iterator[Callable[[EpochMetrics], None]]:
    """Within the block, let the yielded function log the metrics of a run, a scalar each.

    Args:
        directory: What `tensorboard --logdir` is to be given; None to log nothing.
        run: Path of the run's own files below it.
    """
    if directory is None:
        yield lambda metrics: None
        return
    from torch.utils.tensorboard.writer import SummaryWriter

    writers: list[SummaryWriter] = []

    def log(metrics: EpochMetrics) -> None:
        if not writers:
            # A run that was killed has perhaps logged this epoch and later ones: those are hidden.
            writers.append(SummaryWriter(str(Path(directory) / run), purge_step=metrics.epoch))
        for name, value in dataclasses.asdict(metrics).items():
            if name != "epoch":
                writers[0].add_scalar(name, value, metrics.epoch)

    try:
        yield log
    finally:
        for writer in writers:
            writer.close()
