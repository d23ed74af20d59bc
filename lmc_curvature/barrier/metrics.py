"""The metrics of a batch that a measurement takes: the loss, and the classification error."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from lmc_curvature.errors import OptionError, check_choice
from lmc_curvature.objective.batches import Batch, describe
from lmc_curvature.objective.losses import BatchLoss, LossFunction

Metric = Literal["loss", "error"]
METRICS: tuple[Metric, ...] = get_args(Metric)


def check_metrics(metrics: Sequence[Metric], loss_fn: LossFunction | None) -> None:
    """Refuse unknown metrics, and the error where there is no output to compare with a target.

    Raises:
        OptionError: A metric is unknown, there is none, or the error is asked for with a `BatchLoss`.
    """
    if isinstance(metrics, str):
        raise OptionError(f"metrics={metrics!r}: expected several, such as ({metrics!r},).")
    if not metrics:
        raise OptionError(f"No metric was asked for; choose from {METRICS}.")
    for metric in metrics:
        check_choice("metrics", metric, METRICS)
    if "error" in metrics and isinstance(loss_fn, BatchLoss):
        raise OptionError("A BatchLoss yields a loss only, so metric 'error' is unknown: pass metrics=('loss',).")


def metric_values(
    metrics: Sequence[Metric], loss: Float[Tensor, ""], output: Any, target: Any, batch: Batch
) -> Float[Tensor, " metrics"]:
    """The metrics of one batch, on its device.

    Raises:
        OptionError: The error is asked for, and output and target are not those of a classifier.
    """
    return torch.stack([loss.double() if metric == "loss" else _error(output, target, batch) for metric in metrics])


def _error(output: Any, target: Any, batch: Batch) -> Float[Tensor, ""]:
    """Share of examples (or of positions, for dense outputs) whose largest output is not the target's class."""
    if isinstance(output, Tensor) and isinstance(target, Tensor):
        if output.shape == target.shape and _are_probabilities(target):
            return (output.argmax(1) != target.argmax(1)).double().mean()
        if output.ndim == target.ndim + 1 and not target.is_floating_point() and output.shape[0] == target.shape[0]:
            return (output.argmax(1) != target).double().mean()
    raise OptionError(
        f"Metric 'error' needs outputs (n, classes, …) with class indices (n, …) or class probabilities; batch "
        f"{batch.index} has {describe(output)} with {describe(target)}. Pass metrics=('loss',)."
    )


def _are_probabilities(target: Tensor) -> bool:
    if not target.is_floating_point() or target.ndim < 2:
        return False
    sums = target.sum(dim=1)
    return bool((target >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), rtol=1e-2)
