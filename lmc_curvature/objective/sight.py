"""What a loss that is a function makes of its targets, seen by evaluating it on a few examples."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lmc_curvature.agreement import near
from lmc_curvature.errors import LossError
from lmc_curvature.objective.batches import places_in, tensors_in
from lmc_curvature.objective.calls import LossCalls
from lmc_curvature.objective.classification import ClassLoss
from lmc_curvature.objective.forms import form_of

_ROUNDING = torch.finfo(torch.float32).eps
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
        # Not by `tensors_in`: where annotations are checked, a list that is returned draws a random number.
        return [tensor for _, tensor in places_in(tensors)][self.root].long()


def see(evaluate: Callable[[], tuple[Any, Any, Any]], tensors: Any, examples: int) -> Sight:
    """Look into a loss.

    Args:
        evaluate: Evaluates loss, network output and target.
        tensors: What the loss takes its targets from, as `evaluate` gives it to the loss.
        examples: Their number.

    Raises:
        LossError: It calls cross-entropy with class weights by whose sum nothing can be divided.
    """
    with torch.no_grad(), LossCalls().follow(tensors_in(tensors)) as seen:
        try:
            loss, output, target = evaluate()
        except Exception:  # noqa: BLE001 - what is wrong is said where the whole batch is evaluated
            return Sight()
    sight = Sight(output=output, target=target, examples=examples)
    call = seen.only
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


class Sights:
    """What is seen within a loss in the batches of a loader, by their form: which tensors and plain values they hold.

    Attributes:
        first: What is seen in the first batch; None before that.
    """

    def __init__(self) -> None:
        self.first: Sight | None = None
        self._by_form: dict[int, Sight] = {}
        self._looked_at: set[int] = set()

    def of(self, targets: Any) -> Sight:
        """What is seen in the batches of a form, that of a target or, for a `BatchLoss`, of a batch."""
        return self._by_form.get(form_of(targets), Sight()) if self._by_form else Sight()

    def look(self, see: Callable[[], Sight], targets: Any, index: int) -> None:
        """Look into the loss of a batch that is the first of its form, or in the place 1, 2, 4, 8, and so on.

        Args:
            see: Looks.
            targets: Its target or, for a `BatchLoss`, its data.
            index: Its place in the loader.

        Raises:
            LossError: Its loss is not the mean that an earlier batch weighs by.
        """
        form = form_of(targets)
        before = self._by_form.get(form)
        if before is not None and (index.bit_count() != 1 or index in self._looked_at):
            return
        self._looked_at.add(index)
        # Where the first batch does not tell, all batches weigh by their examples.
        sight = see() if self.first is None or self.first.class_loss is not None else self.first
        self.first = self.first or sight
        _check(before or self.first, sight, index, is_form=before is not None)
        self._by_form[form] = before or sight

    @contextlib.contextmanager
    def watch(self, targets: Any) -> Iterator[None]:
        """Within the block a loss is evaluated, of a form that was looked at: see that it divides by what it weighs.

        Which labels count may be decided by a batch's values, as where a mask is left out that hides nothing.

        Raises:
            LossError: It divides by something else.
        """
        sight = self.of(targets)
        labels = None if sight.class_loss is None else sight.labels_in(targets)
        # Captured operations have no values; a CUDA device would have to be waited for.
        if sight.class_loss is None or labels is None or labels.is_cuda or _get_current_dispatch_mode() is not None:
            yield
            return
        weight = sight.class_loss.weight_of(labels)
        with LossCalls() as seen:
            yield
        call = seen.only
        found = None if call is None else ClassLoss.of_call(call)
        divisor = math.nan if call is None or found is None else found.weight_of(call.target)
        if not near("divisors", divisor, weight, rounding=_ROUNDING, scale=weight):
            raise LossError(_refusal("of a batch", "is another mean, over other labels"))


def _check(before: Sight, found: Sight, index: int, *, is_form: bool) -> None:
    # Where the loss fails, it says so itself when the whole batch is evaluated.
    if before.class_loss is None or not found.examples:
        return
    if found.class_loss is None:
        what = "is no such mean over labels of the batch"
    elif is_form and not (found.root == before.root and found.class_loss.weighs_as(before.class_loss)):
        what = "has other labels, weights of classes or an `ignore_index` of its own"
    else:
        return
    raise LossError(_refusal(f"of batch {index}", what))


def _refusal(of: str, what: str) -> str:
    return (
        f"The loss of an earlier batch is a mean cross-entropy, which tells what batches weigh. That {of} {what}. Pass "
        "BatchLoss(fn, size=…), where size(batch) is what fn divides by."
    )
