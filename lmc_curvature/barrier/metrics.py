"""The metrics of a batch that a measurement takes: the loss, and the classification error."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lmc_curvature.barrier.margins import call_within, uses_labels
from lmc_curvature.errors import OptionError, check_choice
from lmc_curvature.objective import Batch, BatchLoss, LossFunction
from lmc_curvature.objective.batches import describe, map_tensors, tensors_in
from lmc_curvature.objective.calls import LossCall, LossCalls
from lmc_curvature.objective.classification import are_probabilities

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
    """What a batch's targets say is right, and how outputs are read: as the loss does in its one call of torch.

    Attributes:
        classes: The right class of each position: an example, or a part of one.
        counted: Whether each position counts.
        read: From an output of the network to what the loss compares with the targets.
        threshold: Above this, one column says class 1; None where the classes are along the second axis.
    """

    classes: Tensor
    counted: Tensor
    read: Callable[[Any], Tensor]
    threshold: float | None = None

    @classmethod
    def of(cls, loss_fn: LossFunction, output: Any, target: Any, batch: Batch) -> "Truth":
        """The truth of a batch, by the one classification loss of torch that its loss is or calls.

        Raises:
            OptionError: There is none or there are several, or it is not of one class for each position.
        """
        copy = map_tensors(torch.clone, output)
        call = call_within(loss_fn, copy, target)
        # Such as a margin for the right class, which is taken off in training: outputs then say what they say plainly.
        plainly = call is not None and call.input is not copy and uses_labels(loss_fn, copy, target, call)
        if call is not None and plainly and not (isinstance(output, Tensor) and output.shape == call.input.shape):
            raise OptionError(
                f"Metric 'error' is unknown: what loss_fn compares with the targets of batch {batch.index} depends on "
                f"them, as a margin does, and {describe(output)} has no column for each class. Pass metrics=('loss',)."
            )
        # What a loss has written into its output is no longer what the network said.
        if call is not None and not any(tensor._version for tensor in tensors_in(copy)):

            def read(output: Any) -> Tensor:
                if plainly or call.input is copy:
                    return output
                again = call_within(loss_fn, output, target)
                if again is None:
                    raise OptionError(
                        f"Metric 'error' is unknown: loss_fn calls one loss of torch on an output of batch "
                        f"{batch.index}, and none or several on another. Pass metrics=('loss',)."
                    )
                return again.input

            truth, counted = _read_signs(call, read) or _read_classes(call, read), _counted(loss_fn, call, copy, target)
            if truth is not None and counted is not None:
                return dataclasses.replace(truth, counted=truth.counted & counted)
        raise OptionError(
            "Metric 'error' needs a loss_fn that is, or calls once and no other, torch's cross_entropy, nll_loss or "
            "multi_margin_loss of outputs (n, classes, …) with class indices (n, …) or class probabilities, or its "
            "binary cross-entropy of one column with targets 0 and 1, to read outputs as it does, writes into none and "
            "leaves out the same positions whatever they are; "
            f"batch {batch.index} has {describe(output)} with {describe(target)}. Pass metrics=('loss',), or --metrics "
            "loss on the command line."
        )

    @property
    def weight(self) -> float:
        """The number of positions that count."""
        return float(self.counted.sum())

    def error(self, output: Any) -> Float[Tensor, ""]:
        """Share of the positions that count of which an output says another class; 0 where none counts.

        It is not a number if the output of such a position is none.
        """
        compared = self.read(output)
        unknown, said = compared.isnan(), compared
        if self.threshold is None:
            unknown, said = unknown.any(1), compared.argmax(1)
        else:
            said = compared > self.threshold
        share = ((said != self.classes) & self.counted).sum().double() / self.counted.sum().clamp(min=1)
        return torch.where((unknown & self.counted).any(), torch.nan, share)


def metric_values(
    metrics: Sequence[Metric], loss: Float[Tensor, ""], output: Any, truth: Truth | None
) -> Float[Tensor, " metrics"]:
    """The metrics of one batch, on its device."""
    return torch.stack([loss.double() if truth is None or name == "loss" else truth.error(output) for name in metrics])


def metric_weights(metrics: Sequence[Metric], batch: Batch, truth: Truth | None) -> list[float]:
    """What one batch counts for in the mean of each metric."""
    return [batch.weight if truth is None or name == "loss" else truth.weight for name in metrics]


def _counted(loss_fn: Any, call: LossCall, output: Any, target: Any) -> Tensor | None:
    """Whether each position has a part in the loss, of a shape that broadcasts; None if that hangs on the output.

    A loss may leave positions out after its call of torch, which then has a value for each, or by weights within it.
    """
    weight = call.arguments["weight"] if call.function in _THRESHOLDS else None
    counted = torch.ones((), dtype=torch.bool) if weight is None else weight.expand_as(call.target) != 0
    counted = counted.to(call.input.device)
    if call.arguments["reduction"] != "none":
        return counted
    # Random outputs tell a mask from what depends on them, such as the hardest positions alone.
    first, second = (_parts(loss_fn, output, target, seed) for seed in range(2))
    return None if first is None or second is None or not torch.equal(first, second) else first & counted


def _parts(loss_fn: Any, output: Any, target: Any, seed: int) -> Tensor | None:
    """Whether the loss of each position has a part in the loss, for random outputs."""
    generator = torch.Generator().manual_seed(seed)

    def random(tensor: Tensor) -> Tensor:
        drawn = torch.rand(tensor.shape, generator=generator).to(tensor)
        return drawn.requires_grad_() if drawn.is_floating_point() else tensor

    with torch.inference_mode(False), torch.enable_grad(), LossCalls() as seen:
        loss = loss_fn(map_tensors(random, output), map_tensors(torch.clone, target))
        call = seen.only
        if call is None or not call.result.requires_grad or not loss.requires_grad:
            return None
        (slope,) = torch.autograd.grad(loss, call.result, allow_unused=True)
    return None if slope is None else slope != 0


_THRESHOLDS = {F.binary_cross_entropy_with_logits: 0.0, F.binary_cross_entropy: 0.5}


def _read_signs(call: LossCall, read: Callable[[Any], Tensor]) -> Truth | None:
    """One column under binary cross-entropy: a logit above 0, or a probability above ½, says 1."""
    input, target = call.input, call.target
    one_column = input.shape == target.shape and (input.ndim == 1 or (input.ndim > 1 and input.shape[1] == 1))
    if call.function not in _THRESHOLDS or not one_column or not bool(((target == 0) | (target == 1)).all()):
        return None
    return Truth(target == 1, torch.ones_like(target, dtype=torch.bool), read, _THRESHOLDS[call.function])


def _read_classes(call: LossCall, read: Callable[[Any], Tensor]) -> Truth | None:
    """Class indices or probabilities, with the classes along the second axis."""
    input, target = call.input, call.target
    if call.function in _THRESHOLDS or input.ndim < 2 or input.shape[1] == 1:
        return None
    if not target.is_floating_point():
        # Of an unsigned type, a label may equal the index that is left out modulo 256.
        labels = target.long()
        return Truth(labels, labels != call.arguments.get("ignore_index", torch.nan), read)
    if target.shape != input.shape or not are_probabilities(target):
        return None
    classes = target.argmax(1)
    return Truth(classes, torch.ones_like(classes, dtype=torch.bool), read)
