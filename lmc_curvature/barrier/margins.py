"""Whether what a loss compares with targets depends on them, as where the right class has a margin."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lmc_curvature.objective import BatchLoss, LossFunction
from lmc_curvature.objective.batches import map_tensors, tensors_in
from lmc_curvature.objective.calls import LossCall, LossCalls

_POSITIONS = 6


def call_within(loss_fn: LossFunction, output: Any, target: Any) -> LossCall | None:
    """The only call of a classification loss of torch that a loss makes; None if it makes none, or several."""
    assert not isinstance(loss_fn, BatchLoss)
    with torch.no_grad(), LossCalls() as seen:
        # A copy: a loss may write into what it is given.
        loss_fn(output, map_tensors(torch.clone, target))
    return seen.only


def uses_labels(loss_fn: LossFunction, output: Any, target: Any, call: LossCall) -> bool:
    """Whether a loss makes something else of an output where the label of one position is another.

    It does not if some such change leaves what is compared with the labels as it is: others may move a mask.

    Args:
        loss_fn: The loss.
        output: Output of the network.
        target: Target of the batch.
        call: The only call of a classification loss of torch that the loss makes of these.
    """
    compared = False
    for changed in _other_labels(target, call.input.shape[1] if call.input.ndim > 1 else 2):
        again = None
        # A loss need not bear labels that are none.
        with contextlib.suppress(Exception):
            again = call_within(loss_fn, map_tensors(torch.clone, output), changed)
        if again is None or not _is_relabelled(call.target, again.target):
            continue
        if again.input.shape == call.input.shape and _equal(again.input, call.input):
            return False
        compared = True
    return compared


def _other_labels(target: Any, classes: int) -> Iterator[Any]:
    """Targets in which the label of one position is another."""
    for tensor in tensors_in(target):
        if tensor.dtype == torch.bool or not tensor.numel():
            continue
        for changed in _changed(tensor, classes):

            def exchange(each: Tensor, tensor: Tensor = tensor, changed: Tensor = changed) -> Tensor:
                return changed if each is tensor else each

            yield map_tensors(exchange, target)


def _changed(tensor: Tensor, classes: int) -> Iterator[Tensor]:
    # Indices are anywhere, numbers may be a row for each example.
    units = tensor if tensor.is_floating_point() and tensor.ndim else tensor.flatten()
    for place in torch.linspace(0, len(units) - 1, _POSITIONS).long().unique().tolist():
        changed = units.clone()
        if tensor.is_floating_point():
            several = tensor.ndim > 1 and tensor.shape[1] > 1
            changed[place] = units[place].roll(1, 0) if several else 1 - units[place]
            yield changed.view(tensor.shape)
            continue
        for other in (int(units[place]) + 1, int(units[place]) - 1):
            if 0 <= other < classes and units[place] >= 0:
                changed[place] = other
                yield changed.clone().view(tensor.shape)


def _is_relabelled(before: Tensor, after: Tensor) -> bool:
    """Whether one position has another label: more are no labels, but lengths, say."""
    if before.shape != after.shape:
        return False
    differ = before != after
    if before.is_floating_point() and before.ndim > 1:
        differ = differ.any(1)
    return int(differ.sum()) == 1


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
