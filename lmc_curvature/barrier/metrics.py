"""The metrics of a batch that a measurement takes: the loss, and the classification error."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lmc_curvature.errors import OptionError, check_choice
from lmc_curvature.objective import Batch, BatchLoss, LossFunction
from lmc_curvature.objective.batches import describe
from lmc_curvature.objective.classification import ClassLoss, are_probabilities, torch_function

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


@dataclass(frozen=True, eq=False)
class Truth:
    """What a batch's targets say is right, and how outputs are read.

    Attributes:
        classes: The right class of each position: an example, or a part of one.
        counted: Whether each position counts.
        decide: From an output to the class that it says of each position.
    """

    classes: Tensor
    counted: Tensor
    decide: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, loss_fn: LossFunction, output: Any, target: Any, batch: Batch) -> "Truth":
        """The truth of a batch, by the shapes of its outputs and targets and by what the loss takes them for.

        Raises:
            OptionError: They are not those of a classifier, or could be read in two ways.
        """
        if isinstance(output, Tensor) and isinstance(target, Tensor) and output.ndim:
            for read in (_read_signs, _read_probabilities, _read_classes):
                truth = read(loss_fn, output, target)
                if truth is not None:
                    return truth
        raise OptionError(
            "Metric 'error' needs outputs (n, classes, …) with class indices (n, …) below the number of classes, or "
            "class probabilities, or one column of outputs with targets 0 and 1 and torch's binary cross-entropy; "
            f"batch {batch.index} has {describe(output)} with {describe(target)}. Pass metrics=('loss',)."
        )

    @property
    def weight(self) -> float:
        """The number of positions that count."""
        return float(self.counted.sum())

    def error(self, output: Tensor) -> Float[Tensor, ""]:
        """Share of the positions that count of which an output says another class; 0 where none counts."""
        wrong = (self.decide(output) != self.classes) & self.counted
        return wrong.sum().double() / self.counted.sum().clamp(min=1)


def metric_values(
    metrics: Sequence[Metric], loss: Float[Tensor, ""], output: Any, truth: Truth | None
) -> Float[Tensor, " metrics"]:
    """The metrics of one batch, on its device."""
    return torch.stack([loss.double() if truth is None or name == "loss" else truth.error(output) for name in metrics])


def metric_weights(metrics: Sequence[Metric], batch: Batch, truth: Truth | None) -> list[float]:
    """What one batch counts for in the mean of each metric."""
    return [batch.weight if truth is None or name == "loss" else truth.weight for name in metrics]


def _read_signs(loss_fn: LossFunction, output: Tensor, target: Tensor) -> Truth | None:
    """One column under binary cross-entropy: a logit above 0, or a probability above ½, says 1."""
    function, _ = torch_function(loss_fn)
    threshold = 0.0 if function is F.binary_cross_entropy_with_logits else 0.5
    of_signs = threshold == 0 or function is F.binary_cross_entropy
    one_column = output.shape == target.shape and (output.ndim == 1 or output.shape[1] == 1)
    if not of_signs or not one_column or not bool(((target == 0) | (target == 1)).all()):
        return None
    return Truth(target == 1, torch.ones_like(target, dtype=torch.bool), lambda output: output > threshold)


def _read_probabilities(_loss_fn: LossFunction, output: Tensor, target: Tensor) -> Truth | None:
    if output.shape != target.shape or output.ndim < 2 or output.shape[1] == 1 or not are_probabilities(target):
        return None
    classes = target.argmax(1)
    return Truth(classes, torch.ones_like(classes, dtype=torch.bool), lambda output: output.argmax(1))


def _read_classes(loss_fn: LossFunction, output: Tensor, target: Tensor) -> Truth | None:
    """Class indices, with the classes along the second axis of the output or, where only that fits, the last."""
    if target.is_floating_point() or target.is_complex() or output.ndim != target.ndim + 1:
        return None
    class_loss = ClassLoss.of(loss_fn)
    axes = [axis for axis in {1, output.ndim - 1} if output.movedim(axis, -1).shape[:-1] == target.shape]
    if class_loss is not None:
        # torch takes them so, whatever else fits.
        axes = [axis for axis in axes if axis == 1]
    if len(axes) != 1:
        return None
    (axis,) = axes
    classes = target.long()
    counted = torch.ones_like(classes, dtype=torch.bool) if class_loss is None else classes != class_loss.ignore_index
    beyond = counted & ((classes < 0) | (classes >= output.shape[axis]))
    if output.shape[axis] == 1 or bool(beyond.any()):
        return None
    return Truth(classes, counted, lambda output: output.argmax(axis))
