"""A loss whose mean over the data depends on how they are cut into batches: noticed by its halves, and warned of."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lmc_curvature.agreement import near
from lmc_curvature.objective.batches import Batch, map_tensors, tensors_in
from lmc_curvature.objective.losses import BatchLoss, NetworkLoss
from lmc_curvature.objective.network import State
from lmc_curvature.objective.normalization import tracked_modules


def warn_of_cuts(network_loss: NetworkLoss, state: State, batch: Batch, output: Any, target: Any) -> None:
    """Warn if the loss of a batch is not the mean of its halves' losses, weighed as batches are.

    A loss of an output is evaluated on one output of the network, and a `BatchLoss` with the network. Nothing is said
    where there are no halves, or the loss does not take them; cross-entropy and its like are weighed by what they
    divide by.

    Args:
        network_loss: The network and its loss.
        state: All entries of the network.
        batch: The batch.
        output: The network's output; None for a `BatchLoss`.
        target: The targets; None for a `BatchLoss`.
    """
    loss_fn = network_loss.loss_fn
    if network_loss.class_loss is not None:
        return
    if isinstance(loss_fn, BatchLoss):
        # By the statistics of a batch, its halves are normalised by others.
        if any(tracked_modules(network_loss.network)):
            return
        size, typical, rounding = batch.size, 1.0, _rounding(batch.data)

        def evaluate(start: int, stop: int) -> tuple[Tensor, float]:
            data = batch.rows(range(start, stop))
            return network_loss.at(state, data, batch.index)[0], network_loss.count(data, batch.index)[1]

    else:
        size = next((len(tensor) for tensor in tensors_in(output) if tensor.ndim), 0)
        typical, rounding = _typical(output), _rounding(output)

        def evaluate(start: int, stop: int) -> tuple[Tensor, float]:
            def rows(tensor: Tensor) -> Tensor:
                # A copy: a loss may write into what it is given.
                return (tensor[start:stop] if tensor.ndim and len(tensor) == size else tensor).detach().clone()

            return loss_fn(map_tensors(rows, output), map_tensors(rows, target)), float(stop - start)

    if size > 1:
        _compare(evaluate, size, typical, rounding)


def _compare(evaluate: Callable[[int, int], tuple[Tensor, float]], size: int, typical: float, rounding: float) -> None:
    middle = size // 2
    try:
        with torch.no_grad():
            found = [evaluate(start, stop) for start, stop in ((0, size), (0, middle), (middle, size))]
    except Exception:  # noqa: BLE001 - what a loss makes of a half is nobody's concern
        return
    (whole, _), *halves = ((loss.item(), weight) for loss, weight in found)
    mean = sum(loss * weight for loss, weight in halves) / sum(weight for _, weight in halves)
    # In whatever precision a loss computes, it is at least that of float32, or says so by its type.
    rounding = max(torch.finfo(found[0][0].dtype).eps, rounding)
    scale = max(abs(whole), *(abs(loss) for loss, _ in halves))
    # Terms of both signs, as large as the outputs, may cancel.
    if not near("halves of a batch", whole, mean, rounding=rounding, scale=scale, floor=8 * rounding * typical):
        warnings.warn(
            f"The loss of the first batch is {whole:.6g}, and the mean of its halves' losses {mean:.6g}: its value "
            "depends on how the data are cut into batches, because it is no mean over their examples (weights, ignored "
            "targets, a sum, statistics of the batch?). Pass loss_fn=BatchLoss(fn, size=...) with what it divides by, "
            "or torch's nn.CrossEntropyLoss(weight=..., ignore_index=...) itself, not inside a function.",
            stacklevel=2,
        )


def _rounding(data: Any) -> float:
    dtypes = {tensor.dtype for tensor in tensors_in(data) if tensor.is_floating_point()} | {torch.float32}
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _typical(output: Any) -> float:
    """A typical size of an output's numbers; some may be masked by very large ones."""
    sizes = [tensor.detach().abs().double().flatten() for tensor in tensors_in(output) if tensor.is_floating_point()]
    return float(torch.cat(sizes).nanmedian()) if sizes else 0.0
