"""The metrics of a measurement, evaluated batch by batch at all its points."""

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int

from lmc_curvature.averages import GroupMeans, add_batch, standard_error, weighted_mean
from lmc_curvature.barrier.metrics import Metric, Truth, metric_values, metric_weights
from lmc_curvature.errors import NonFiniteError, OptionError, counted
from lmc_curvature.objective import Batch, Objective, State
from lmc_curvature.objective.extent import Extent
from lmc_curvature.objective.recalibration import Recalibration, warn_of_worse
from lmc_curvature.segment import StatePoints


@torch.no_grad()
def evaluate_points(
    objective: Objective,
    points: StatePoints,
    metrics: Sequence[Metric],
    *,
    own_statistics: Sequence[State] = (),
    of_interest: Callable[[Float[np.ndarray, "batches points"]], Float[np.ndarray, " batches"]] = lambda of: of[:, 0],
    tolerance: float | int | None = None,
    keep_partial: bool = False,
    progress: bool | None,
) -> tuple[
    Int[np.ndarray, " batches"],
    Float[np.ndarray, "batches metrics"] | None,
    Float[np.ndarray, "batches metrics points"],
    Extent,
]:
    """Evaluate the metrics of every batch at every point, in one pass; `"recalibrate"` needs one more before.

    Args:
        objective: The loss.
        points: The states.
        metrics: What to evaluate.
        own_statistics: Under `"recalibrate"`, the running statistics of the networks themselves: if the loss of one is
            larger by those re-estimated, it is warned of.
        of_interest: From the first metric's values, the number of every batch whose standard error is looked at.
        tolerance: The standard error to read as many batches for as it takes; None for all batches.
        keep_partial: Return what the batches before an interruption came to.
        progress: Show a progress bar over batches.

    Returns:
        The batches' sizes; what each counts for in the mean of each metric, None where that is its size; the values;
        how far the pass went.

    Raises:
        OptionError: The error is asked for, and cannot be told from outputs and targets.
        NonFiniteError: A value is infinite or not a number.
    """
    places: list[tuple[int, State]] = [(number, {}) for number in range(len(points))]
    if objective.batch_norm == "recalibrate":
        if "error" in metrics:
            # Before the long pass: what the error is of can be told from one evaluation.
            with objective.measuring(), objective.one_pass(progress=False, alone=True) as batches:
                batch = next(batches)
                Truth.of(objective.loss_fn, *objective.batch_evaluation(points[0], batch)[1:], batch)
        places = list(enumerate(objective.recalibrated(points, progress=progress)))
        places += zip(points.networks, own_statistics, strict=False)
    groups: list[GroupMeans] = []

    def estimate() -> tuple[float, float]:
        _, weights, values = _stacked(objective.ranks.merge(groups))
        numbers = of_interest(values[:, 0])
        return float(weighted_mean(numbers, weights[:, 0])), float(standard_error(numbers, weights[:, 0]))

    extent = Extent(estimate, tolerance, keep_partial=keep_partial)
    visit = objective.one_pass(progress=progress, description="measuring", weightless=True, extent=extent)
    with objective.measuring(), visit as batches:
        for batch in batches:
            of_batch, of_metrics = _batch_values(objective, points, places, batch, metrics)
            add_batch(groups, GroupMeans(batch.index, batch.size, np.array(of_metrics, dtype=float), (of_batch,)))
        groups = objective.ranks.merge(groups)
    sizes, weights, values = _stacked(groups)
    found, own = np.split(values, [len(points)], axis=2)
    if "loss" in metrics:
        index = list(metrics).index("loss")
        for number, before in zip(points.networks, np.moveaxis(own[:, index], 1, 0), strict=False):
            after = found[:, index, number]
            recalibration = Recalibration.of(before, after, weights[:, index])
            # Between here and the user is measure_barrier, with torch's wrappers around both.
            warn_of_worse(recalibration, points.describe(number), stacklevel=5)
    return sizes, None if (weights == sizes[:, None]).all() else weights, found, extent


def _stacked(groups: Sequence[GroupMeans]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sizes, weights and values of groups of batches."""
    return (
        np.array([group.size for group in groups]),
        np.stack([group.weights for group in groups]),
        np.stack([group.values[0] for group in groups]),
    )


def _batch_values(
    objective: Objective,
    points: StatePoints,
    places: Sequence[tuple[int, State]],
    batch: Batch,
    metrics: Sequence[Metric],
) -> tuple[Float[np.ndarray, "metrics places"], list[float]]:
    """Return every metric of one batch at points, each with statistics of its own, and its weight in each mean."""
    columns, truth = [], None
    for number, extra in places:
        loss, output, target = objective.batch_evaluation({**points[number], **extra}, batch)
        if truth is None and "error" in metrics:
            truth = Truth.of(objective.loss_fn, output, target, batch)
        columns.append(metric_values(metrics, loss, output, truth))
    # Copied to the host once a batch: each copy waits for the device.
    values = torch.stack(columns, dim=1).double().cpu().numpy()
    weights = metric_weights(metrics, batch, truth)
    # The mean over no target is 0/0.
    values[np.array(weights) == 0] = 0
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        metric, point = (int(position) for position in bad[0])
        raise NonFiniteError(
            f"The {metrics[metric]} is {values[metric, point]} at batch {batch.index} "
            f"({counted(batch.size, 'example')}), at {points.describe(places[point][0])}. "
            "Check the data of that batch and the scale of the networks' parameters."
        )
    return values, weights


def chord(
    alphas: Float[np.ndarray, " n"], first: Float[np.ndarray, "*shape"], second: Float[np.ndarray, "*shape"]
) -> np.ndarray:
    """The chord (1−α) first + α second, without rounding at its ends and where they are equal."""
    gap = second - first
    return np.where(alphas < 0.5, first + alphas * gap, second - (1 - alphas) * gap)


class ErrorWatch:
    """Classification errors at several states, of every batch that it is called with; nothing for other losses.

    The networks are normalised as they are differentiated, under `"recalibrate"` by the batch.

    Args:
        objective: The loss.
        states: The states, on the objective's device; one is asked for at a time.
    """

    def __init__(self, objective: Objective, states: Mapping[str, State]):
        self._objective, self._states = objective, states
        # None where the loss is not one of classes.
        self._total: GroupMeans | None = GroupMeans(0, 0, np.zeros(()), (np.zeros(len(states)),))
        if not objective.has_output:
            self._total = None

    @torch.no_grad()
    def __call__(self, batch: Batch) -> None:
        """Evaluate a batch at all states."""
        if self._total is None:
            return
        try:
            with self._objective.numerics.exact():
                evaluations = (self._objective.batch_evaluation(self._states[name], batch)[1:] for name in self._states)
                output, target = next(evaluations)
                truth = Truth.of(self._objective.loss_fn, output, target, batch)
                values = [truth.error(output), *(truth.error(other) for other, _ in evaluations)]
        except OptionError:
            self._total = None
            return
        if truth.weight:
            found = torch.stack(values).double().cpu().numpy()
            self._total = self._total.joined(GroupMeans(batch.index, batch.size, np.array(truth.weight), (found,)))

    def errors(self) -> Float[np.ndarray, " states"] | None:
        """The share of examples, or of positions that count, that is classified wrongly at each state.

        All ranks ask for it.
        """
        with self._objective.ranks.together():
            found = self._objective.ranks.gather(self._total)
        totals = [total for total in found if total is not None]
        if len(totals) < len(found):
            return None
        total = functools.reduce(GroupMeans.joined, totals)
        return total.values[0] if total.weights else None
