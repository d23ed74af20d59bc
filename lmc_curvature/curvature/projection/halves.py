"""A batch whose sweep as a whole does not fit memory, projected as the mean of its halves.

Of a loss of the whole batch the engine sees no examples. But where it is a mean over examples or tokens, it is the mean
of the losses of the batch's halves, each weighed as batches are in means over the data; and so are its derivatives.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from lmc_curvature.agreement import all_near, near
from lmc_curvature.curvature.problem import BatchValues, Point, Problem
from lmc_curvature.curvature.projection.by_products import product_of_combination
from lmc_curvature.curvature.sweep import state_near
from lmc_curvature.errors import SweepError, UnsupportedModelError
from lmc_curvature.objective.batches import Batch, map_tensors, tensors_in
from lmc_curvature.objective.network import State
from lmc_curvature.objective.normalization import normalizes_by_batch


@dataclass(frozen=True, eq=False)
class _Half:
    """Half of a batch as a batch of its own, and its share of the mean over the batch."""

    rows: slice
    batch: Batch
    share: float


# Examples of a batch on which derivatives are compared: the whole of it would take the memory that there is not.
_FEW = 4


def is_mean_of_halves(problem: Problem, point: Point, batch: Batch) -> bool:
    """Whether the loss of a batch is the mean of its halves', at a state and near it, and so are its derivatives."""
    statistics = "running" if problem.objective.batch_norm == "interpolate" else "batch"
    if normalizes_by_batch(problem.objective.network, statistics):
        return False
    try:
        halves = _halves(problem, batch)
        near_by = Point(state_near(problem, point), point.place)
        if not halves or not all(_is_mean(problem, each.state, batch, halves) for each in (point, near_by)):
            return False
        # A loss may hide what its derivatives show.
        apart = _are_outputs_apart if problem.objective.has_output else _are_derivatives_means
        return apart(problem, near_by, batch)
    except Exception:  # noqa: BLE001 - a network or a loss may make anything of a part of a batch
        return False


def project_halves(
    problem: Problem, point: Point, batch: Batch, project: Callable[[Problem, Point, Batch], BatchValues]
) -> BatchValues:
    """Loss, slopes and curvature of a batch, from those of its halves.

    Raises:
        SweepError: This batch's loss is not the mean of its halves', by so little that it may be rounding.
        UnsupportedModelError: It is not, by more.
    """
    halves = _halves(problem, batch)
    found = [project(problem, point, half.batch) for half in halves]
    if not _is_mean(problem, point.state, batch, halves, [loss for loss, _, _ in found]):
        said = f"The loss of batch {batch.index} is not the mean of the losses of its halves"
        # What rounding makes of a loss that all but vanishes is left to products.
        if _is_mean(problem, point.state, batch, halves, [loss for loss, _, _ in found], least=1.0):
            raise SweepError(f"{said}.")
        raise UnsupportedModelError(
            f"{said}, as those of batches before were, which were therefore swept in halves. Their numbers cannot be "
            "trusted: choose method='hvp', or a larger memory_gib."
        )
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
        batches += [(part, Batch(batch.index, size, data, weight))] if weight else []
    total = sum(half.weight for _, half in batches)
    return [_Half(part, half, half.weight / total) for part, half in batches]


def _is_mean(
    problem: Problem,
    state: State,
    batch: Batch,
    halves: list[_Half],
    losses: list[float] | None = None,
    least: float = 0.0,
) -> bool:
    """Whether the batch's loss at a state is the mean of its halves', which may be known."""
    objective = problem.objective
    with objective.numerics.differentiating(), torch.no_grad():
        whole = objective.batch_loss(state, batch).item()
        losses = losses or [objective.batch_loss(state, half.batch).item() for half in halves]
    mean = sum(half.share * loss for half, loss in zip(halves, losses, strict=True))
    return bool(near("captured values", mean, whole, rounding=objective.rounding, scale=max(abs(whole), least)))


def _are_outputs_apart(problem: Problem, point: Point, batch: Batch) -> bool:
    """Whether the network's outputs for a half of a batch are those for the whole."""
    objective = problem.objective
    with objective.numerics.differentiating(), torch.no_grad():
        whole = tensors_in(objective.output(point.state, batch))
        rows = len(tensors_in(batch.data)[0])
        if not all(tensor.is_floating_point() and tensor.shape[:1] == (rows,) for tensor in whole):
            return _are_derivatives_means(problem, point, batch)
        for half in _halves(problem, batch):
            found = tensors_in(objective.output(point.state, half.batch))
            for one, other in zip(found, whole, strict=True):
                if not all_near("mixing", one, other[half.rows], rounding=objective.rounding):
                    return False
    return True


def _are_derivatives_means(problem: Problem, point: Point, batch: Batch) -> bool:
    """Whether slopes and a product with the Hessian of some examples are the means of those of their halves."""
    # The size of a batch may be of tokens.
    rows = len(tensors_in(batch.data)[0])
    chosen = torch.linspace(0, rows - 1, min(rows, _FEW)).round().long()
    data = map_tensors(lambda tensor: tensor[chosen.to(tensor.device)], batch.data)
    size, weight = problem.objective.network_loss.count(data, batch.index)
    if not weight:
        return False
    part = Batch(batch.index, size, data, weight)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], len(problem.directions))
    halves = _halves(problem, part)
    whole = np.stack(product_of_combination(problem, point, part, signs))
    found = [half.share * np.stack(product_of_combination(problem, point, half.batch, signs)) for half in halves]
    scale = np.abs(found).sum(axis=0)
    scale += scale.mean(axis=1, keepdims=True)
    return bool(near("sweep", np.sum(found, axis=0), whole, rounding=problem.objective.rounding, scale=scale).all())
