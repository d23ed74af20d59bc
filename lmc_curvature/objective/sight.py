"""What a loss that is a function makes of its targets, seen by evaluating it on a few examples."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmc_curvature.errors import LossError
from lmc_curvature.objective.batches import tensors_in
from lmc_curvature.objective.calls import LossCalls, only_call
from lmc_curvature.objective.classification import ClassLoss

FEW = 8
"""How many examples a function is looked through on."""


@dataclass(frozen=True, eq=False)
class Sight:
    """What is seen within a loss that is a function, on a few examples.

    Attributes:
        class_loss: The loss of torch whose mean over one tensor it returns; None if there is none.
        root: Place of that tensor among those of the target or, for a `BatchLoss`, of the batch.
        classes: The number of classes; None if it may change with the batch.
        output: The network's output for these examples; None for a `BatchLoss`, or where it has failed.
        target: Their targets, likewise.
        examples: Their number.
        divisor: What the loss divides by for them, if it returns a mean that one of torch takes; None if unknown.
    """

    class_loss: ClassLoss | None = None
    root: int = 0
    classes: int | None = None
    output: Any = None
    target: Any = None
    examples: int = 0
    divisor: float | None = None

    def weight_of(self, tensors: Any, examples: int) -> float:
        """What a batch of so many examples counts for, by its target or, for a `BatchLoss`, by its data."""
        return float(examples) if self.class_loss is None else self.class_loss.weight_of(self.labels_in(tensors))

    def labels_in(self, tensors: Any) -> Tensor:
        """The class indices among the tensors of a target or batch."""
        return tensors_in(tensors)[self.root].long()


def see(evaluate: Callable[[], tuple[Any, Any, Any]], tensors: Any, examples: int) -> Sight:
    """Look into a loss.

    Args:
        evaluate: Evaluates loss, network output and target.
        tensors: What the loss takes its targets from, as `evaluate` gives it to the loss.
        examples: Their number.

    Raises:
        LossError: It calls cross-entropy with class weights by whose sum nothing can be divided.
    """
    with torch.no_grad(), LossCalls(tensors_in(tensors)) as seen:
        try:
            loss, output, target = evaluate()
        except Exception:  # noqa: BLE001 - what is wrong is said where the whole batch is evaluated
            return Sight()
    sight = Sight(output=output, target=target, examples=examples)
    call = only_call(seen.calls)
    class_loss = None if call is None or call.result is not loss else ClassLoss.of_call(call)
    if call is None or class_loss is None:
        return sight
    sight = dataclasses.replace(sight, divisor=class_loss.weight_of(call.target))
    if call.root is None:
        return sight
    shape = call.input.shape
    # As many classes as examples: the examples may be the classes, as in a contrastive loss.
    classes = shape[1] if len(shape) > 1 and shape[0] != shape[1] else None
    return dataclasses.replace(sight, class_loss=class_loss, root=call.root, classes=classes)


def check_form(first: Sight, other: Sight, index: int) -> None:
    """Check that batches of another form than the first are weighed by the same loss.

    Raises:
        LossError: Their loss is another.
    """
    if first.class_loss is None or not other.examples or other.class_loss is not None:
        return
    raise LossError(
        f"Batch {index} holds other tensors than the first batch does. The first one's loss is a mean cross-entropy, "
        "which tells what batches weigh; this one's is no such mean over labels of the batch. Pass "
        "BatchLoss(fn, size=…), where size(batch) is what fn divides by."
    )
