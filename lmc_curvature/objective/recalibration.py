"""Running statistics of batch normalisation, re-estimated from data, and what that does to the loss."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Real
from torch import Tensor, nn

from lmc_curvature.averages import GroupMeans, add_batch, standard_error, weighted_mean
from lmc_curvature.errors import OptionError
from lmc_curvature.objective.batches import Batch
from lmc_curvature.objective.loaders import check_loader, refuse_iterator
from lmc_curvature.objective.losses import finite_loss
from lmc_curvature.objective.normalization import BatchNormPolicy, Normalization, statistic_names, tracked_modules

if TYPE_CHECKING:
    from lmc_curvature.objective.network import State
    from lmc_curvature.objective.risk import Objective

_RISE = 0.1


@dataclass(frozen=True)
class Recalibration:
    """What re-estimated statistics do to the loss of a network.

    Attributes:
        before: Mean loss by the statistics that the network had.
        after: Mean loss by re-estimated ones.
        error: Standard error of the difference, from the spread between batches; NaN for a single batch.
    """

    before: float
    after: float
    error: float

    @classmethod
    def of(
        cls,
        before: Float[np.ndarray, " batches"],
        after: Float[np.ndarray, " batches"],
        weights: Real[np.ndarray, " batches"],
    ) -> "Recalibration":
        """Compare the losses of each batch."""
        first, second = (float(weighted_mean(values, weights)) for values in (before, after))
        return cls(first, second, float(standard_error(after - before, weights)))

    @property
    def is_worse(self) -> bool:
        """Whether the loss has risen by more than a tenth, and by more than batches differ in it, or by itself."""
        rise = self.after - self.before
        return rise > _RISE * abs(self.before) and (not rise <= 2 * self.error or rise > abs(self.before))

    def __str__(self) -> str:
        return f"loss {self.before:.4g} by its own statistics, {self.after:.4g} by re-estimated ones"


def check_recalibration(loader: Iterable[Any] | None, batch_norm: BatchNormPolicy, max_batches: int | None) -> None:
    """Refuse a loader to re-estimate statistics on where none are, or one that yields no batches.

    Raises:
        OptionError: The policy is not `"recalibrate"`.
        LoaderError: It cannot be iterated over, or is a data set of single examples.
    """
    if loader is not None:
        if batch_norm != "recalibrate":
            raise OptionError(
                f"recalibration is a loader for batch_norm='recalibrate' alone; with batch_norm={batch_norm!r} no "
                "statistics are re-estimated. Leave it out, or choose 'recalibrate'."
            )
        check_loader(loader, max_batches)


def running_statistics(network: nn.Module) -> dict[str, Tensor]:
    """Entry name to each running mean and variance of a network."""
    names = [entry for name, _ in tracked_modules(network) for entry in statistic_names(name)]
    return {name: network.get_buffer(name) for name in names}


def recalibrated_statistics(
    objective: "Objective", states: "Sequence[State]", normalization: Normalization, *, progress: bool | None = None
) -> list[dict[str, Tensor]]:
    """Running statistics of a network at each state, re-estimated on its objective's loader for it, in one pass.

    A statistic is the mean over the batches, weighted by examples, of the batch's mean or unbiased variance
    (what `torch.optim.swa_utils.update_bn` computes when all batches have one size).

    Args:
        objective: The objective.
        states: The states; they are asked for anew with every batch, so they may be made on demand.
        normalization: The statistics that the objective's network uses.
        progress: Show a progress bar over batches; None shows it on a terminal and in notebooks.

    Returns:
        For each state, entry name to statistic.

    Raises:
        LoaderError: The loader is an iterator, which could not be visited again afterwards.
        NonFiniteError: The loss of a batch is infinite or not a number.
    """

    def evaluate(state: "State", batch: Batch) -> None:
        # Statistics that are not finite would spoil the mean over all batches: here the batch is still known.
        loss = objective.batch_loss(state, batch)
        if batch.weight:
            finite_loss(loss, batch, ", while statistics are re-estimated")

    if objective.recalibration is None:
        refuse_iterator(objective.loader, "batch_norm='recalibrate' visits the loader twice")
    visit_all = objective.one_pass(
        progress=progress, description="recalibrating", weightless=True, loader=objective.recalibration
    )
    with torch.no_grad(), visit_all as batches:
        means = normalization.mean_statistics(states, batches, evaluate, objective.ranks.gather)
    return [{entry: value.to(objective.dtype) for entry, value in statistics.items()} for statistics in means]


def recalibrate(
    objective: "Objective", states: "Sequence[State]", *, progress: bool | None = None
) -> tuple[list[dict[str, Tensor]], list[Recalibration]]:
    """Re-estimate the statistics at states that hold their own, and compare the losses: a pass for each.

    Args:
        objective: The objective, under `"recalibrate"`.
        states: The states, on its device, with running statistics.
        progress: Show progress bars over batches; None shows them on a terminal and in notebooks.

    Returns:
        For each state, entry name to statistic; and what they do to the loss.
    """
    found = objective.recalibrated(states, progress=progress)
    points = [
        point for state, statistics in zip(states, found, strict=True) for point in (state, {**state, **statistics})
    ]
    groups: list[GroupMeans] = []
    with torch.no_grad(), objective.measuring(), objective.one_pass(progress=progress) as batches:
        for batch in batches:
            losses = np.array([finite_loss(objective.batch_loss(point, batch), batch) for point in points])
            add_batch(groups, GroupMeans(batch.index, batch.size, np.array(batch.weight), (losses,)))
        groups = objective.ranks.merge(groups)
    losses, counts = np.stack([group.values[0] for group in groups]), np.array([group.weights for group in groups])
    firsts = range(0, len(points), 2)
    return found, [Recalibration.of(losses[:, first], losses[:, first + 1], counts) for first in firsts]


def warn_of_worse(recalibration: Recalibration, owner: str, *, stacklevel: int) -> None:
    """Warn of statistics that make the loss of a network larger than its own do, at the line of a caller.

    Args:
        recalibration: What they do to its loss.
        owner: The network, for the message.
        stacklevel: As for `warnings.warn`, where 1 is the caller of this function.
    """
    if recalibration.is_worse:
        warnings.warn(
            f"Re-estimated statistics of batch normalisation make {owner} worse: {recalibration}. The images on which "
            "they are estimated are not like those it was trained on, augmentation included: pass a loader of such "
            "images as recalibration=…, or choose batch_norm='interpolate'.",
            stacklevel=stacklevel + 1,
        )
