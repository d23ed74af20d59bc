"""Forking: train a parent, and from its states at chosen epochs children that differ by their data order alone.

Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis" (2020), section 3, spawn children
so.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from lmc_curvature.errors import CheckpointError, ConfigurationError, NonFiniteError
from lmc_curvature.forking.data import ImageDataset, load_data
from lmc_curvature.forking.directory import (
    ForkConfig,
    ForkDirectory,
    create_directory,
    initial_model,
    write_metrics,
)
from lmc_curvature.forking.training import EpochMetrics, TrainingState, capture_state, train

Report = Callable[[EpochMetrics], None]


def run_forks(
    config: ForkConfig,
    out_dir: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> ForkDirectory:
    """Train the parent to the end, and the children of every fork to the same epoch.

    A child starts from the parent's network and momentum at its fork epoch. What the directory already holds
    is kept, so the same call continues where an earlier one stopped, and ends with the same bits on the same
    machine with as many threads. A damaged snapshot is computed again, with a warning that names it.

    Args:
        config: The experiment.
        out_dir: Where to write; made if need be.
        device: Where to train.
        progress: Show one bar of epochs for the whole experiment.

    Returns:
        The directory. `load_child(out_dir, fork_epoch, child)` rebuilds a network from it.

    Raises:
        ConfigurationError: The directory belongs to another configuration, or the network does not fit the
            data.
        DataError: The data set is missing or is not what it should be.
        NonFiniteError: The parent diverged; or children did, after all others were trained. The message says
            which.
    """
    directory = create_directory(out_dir, config)
    parent = [epoch for epoch in config.parent_epochs if not _is_complete_parent(directory, epoch)]
    children = [
        (epoch, child)
        for epoch in config.fork_epochs
        for child in range(config.children)
        if not _is_complete_child(directory, epoch, child)
    ]
    if not parent and not children:
        return directory
    data = load_data(config.data, limit=config.limit, progress=progress).to(device)
    model = initial_model(config)
    check_fit(model, data, config)
    model = model.to(device)
    total = _parent_work(config, parent) + sum(config.training.epochs - epoch for epoch, _ in children)
    with cpu_threads(config.threads), tqdm(total=total, unit="epoch", disable=not progress) as bar:
        if parent:
            _train_parent(directory, model, data, missing=parent, bar=bar)
        _train_children(directory, model, data, missing=children, bar=bar)
    return directory


def check_fit(model: nn.Module, data: ImageDataset, config: ForkConfig) -> None:
    """Check that the network takes the images and has an output for each class.

    Raises:
        ConfigurationError: It does not.
    """
    x, _ = next(iter(data.subset(1).to("cpu").batches(1)))
    model.eval()
    try:
        with torch.no_grad():
            logits = model(x)
    except RuntimeError as error:
        raise ConfigurationError(
            f"model: {config.model!r} cannot take images of shape {tuple(x.shape[1:])} from {config.data!r} ({error}). "
            "Choose another network, or set its input channels in model_options."
        ) from error
    expected = (1, len(data.class_names))
    if not isinstance(logits, torch.Tensor) or logits.shape != expected:
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ConfigurationError(
            f"model_options: {config.model!r} gives {got} for one image of {config.data!r}; expected {expected}. Set "
            f"num_classes to {len(data.class_names)}."
        )


def _train_parent(
    directory: ForkDirectory, model: nn.Module, data: ImageDataset, *, missing: list[int], bar: tqdm
) -> None:
    config = directory.config
    state = capture_state(model)
    for epoch in config.parent_epochs:
        path = directory.parent_path(epoch)
        if epoch not in missing:
            state = TrainingState.load(path)
            continue
        bar.set_description("parent")
        state = train(
            model,
            data,
            config.training,
            order_seed=config.order_seed,
            start=state,
            until=epoch,
            on_epoch=_reporter(bar),
            progress=False,
        )
        state.save(path)
    # The last state knows the whole history, also when only an earlier one was missing.
    write_metrics(directory.parent_metrics_path(), state.history)


def _train_children(
    directory: ForkDirectory,
    model: nn.Module,
    data: ImageDataset,
    *,
    missing: list[tuple[int, int]],
    bar: tqdm,
) -> None:
    diverged = []
    for fork_epoch, child in missing:
        bar.set_description(f"fork {fork_epoch}, child {child}")
        try:
            _train_child(directory, model, data, fork_epoch, child, _reporter(bar))
        except NonFiniteError as error:
            diverged.append(f"Fork {fork_epoch}, child {child}: {error}")
    if diverged:
        raise NonFiniteError("\n".join(diverged))


def _train_child(
    directory: ForkDirectory,
    model: nn.Module,
    data: ImageDataset,
    fork_epoch: int,
    child: int,
    report: Report,
) -> None:
    config = directory.config
    state = train(
        model,
        data,
        config.training,
        order_seed=config.order_seed + 1 + child,
        start=TrainingState.load(directory.parent_path(fork_epoch)),
        on_epoch=report,
        progress=False,
    )
    state.save(directory.child_path(fork_epoch, child))
    write_metrics(directory.child_metrics_path(fork_epoch, child), state.history[fork_epoch:])


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Within the block, let torch use so many CPU threads; as many as before for None."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _reporter(bar: tqdm) -> Report:
    def report(metrics: EpochMetrics) -> None:
        bar.update()
        bar.set_postfix(loss=f"{metrics.loss:.3g}", accuracy=f"{metrics.accuracy:.1%}")

    return report


def _parent_work(config: ForkConfig, missing: list[int]) -> int:
    stored = config.parent_epochs
    return sum(epoch - before for before, epoch in zip([0, *stored], stored, strict=False) if epoch in missing)


def _is_complete_parent(directory: ForkDirectory, epoch: int) -> bool:
    state = _stored_state(directory.parent_path(epoch))
    path = directory.parent_metrics_path()
    if state is not None and epoch == directory.config.training.epochs and not path.is_file():
        write_metrics(path, state.history)
    return state is not None


def _is_complete_child(directory: ForkDirectory, fork_epoch: int, child: int) -> bool:
    state = _stored_state(directory.child_path(fork_epoch, child))
    path = directory.child_metrics_path(fork_epoch, child)
    if state is not None and not path.is_file():
        write_metrics(path, state.history[fork_epoch:])
    return state is not None


def _stored_state(path: Path) -> TrainingState | None:
    if not path.exists():
        return None
    try:
        return TrainingState.load(path)
    except CheckpointError as error:
        warnings.warn(f"{error} It is computed again.", stacklevel=2)
        return None
