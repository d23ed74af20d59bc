"""A batch whose sweep as a whole does not fit memory, projected as the mean of its halves.

Of a loss of the whole batch the engine sees no examples. But where it is a mean over examples or tokens, it is the mean
of the losses of the batch's halves, each weighed as batches are in means over the data; and so are its derivatives.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from lmc_curvature.agreement import near
from lmc_curvature.curvature.problem import BatchValues, Point, Problem
from lmc_curvature.curvature.sweep import state_near
from lmc_curvature.errors import SweepError
from lmc_curvature.objective.batches import Batch, map_tensors, tensors_in
from lmc_curvature.objective.network import State
from lmc_curvature.objective.normalization import normalizes_by_batch


@dataclass(frozen=True, eq=False)
class _Half:
    """Half of a batch as a batch of its own, and its share of the mean over the batch."""

    batch: Batch
    share: float


def is_mean_of_halves(problem: Problem, point: Point, batch: Batch) -> bool:
    """Whether the loss of a batch is the mean of its halves', at a state and near it."""
    statistics = "running" if problem.objective.batch_norm == "interpolate" else "batch"
    if normalizes_by_batch(problem.objective.network, statistics):
        return False
    try:
        halves = _halves(problem, batch)
        states = (point.state, state_near(problem, point))
        return bool(halves) and all(_is_mean(problem, state, batch, halves) for state in states)
    except Exception:  # noqa: BLE001 - a network or a loss may make anything of a part of a batch
        return False


def project_halves(
    problem: Problem, point: Point, batch: Batch, project: Callable[[Problem, Point, Batch], BatchValues]
) -> BatchValues:
    """Loss, slopes and curvature of a batch, from those of its halves.

    Raises:
        SweepError: This batch's loss is not the mean of its halves'.
    """
    halves = _halves(problem, batch)
    found = [project(problem, point, half.batch) for half in halves]
    if not _is_mean(problem, point.state, batch, halves, [loss for loss, _, _ in found]):
        raise SweepError(f"The loss of batch {batch.index} is not the mean of the losses of its halves.")
    shares = [half.share for half in halves]
    loss, slopes, curvature = (np.tensordot(shares, np.stack(values), 1) for values in zip(*found, strict=True))
    return float(loss), slopes, curvature


def _halves(problem: Problem, batch: Batch) -> list[_Half]:
    """Those that count for something; none if some tensor has other rows than the examples."""
    rows = {len(tensor) if tensor.ndim else 0 for tensor in tensors_in(batch.data)}
    if len(rows) != 1 or max(rows) < 2:
        return []
    middle = max(rows) // 2
    batches = []
    for part in (slice(0, middle), slice(middle, None)):
        data = map_tensors(lambda tensor, part=part: tensor[part], batch.data)
        size, weight = problem.objective.network_loss.count(data, batch.index)
        batches += [Batch(batch.index, size, data, weight)] if weight else []
    total = sum(half.weight for half in batches)
    return [_Half(half, half.weight / total) for half in batches]


def _is_mean(
    problem: Problem, state: State, batch: Batch, halves: list[_Half], losses: list[float] | None = None
) -> bool:
    """Whether the batch's loss at a state is the mean of its halves', which may be known."""
    objective = problem.objective
    with objective.numerics.differentiating(), torch.no_grad():
        whole = objective.batch_loss(state, batch).item()
        losses = losses or [objective.batch_loss(state, half.batch).item() for half in halves]
    mean = sum(half.share * loss for half, loss in zip(halves, losses, strict=True))
    # Not even a small loss: what rounding makes of one that all but vanishes is left to products.
    return bool(near("captured values", mean, whole, rounding=objective.rounding, scale=abs(whole)))
