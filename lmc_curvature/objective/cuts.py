"""A loss whose mean over the data depends on how they are cut into batches: noticed by its halves, and warned of."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lmc_curvature.agreement import near
from lmc_curvature.objective.batches import Batch, map_tensors, tensors_in
from lmc_curvature.objective.losses import BatchLoss, NetworkLoss
from lmc_curvature.objective.network import State
from lmc_curvature.objective.normalization import tracked_modules
from lmc_curvature.objective.sight import Sight

_REMEDY = (
    "Pass loss_fn=BatchLoss(fn, size=...) with what it divides by, or torch's nn.CrossEntropyLoss(weight=..., "
    "ignore_index=...), itself or in a function that returns its value for all targets unchanged."
)


def warn_of_cuts(network_loss: NetworkLoss, state: State, batch: Batch, output: Any, target: Any) -> None:
    """Warn if the loss of a batch is not the mean of its halves' losses, weighed as batches are.

    The halves are random ones. A loss of an output is evaluated on one output of the network, and a `BatchLoss` with
    the network. Nothing is said where there are no halves, or the loss does not take them; cross-entropy and its like
    are weighed by what they divide by.

    Args:
        network_loss: The network and its loss.
        state: All entries of the network.
        batch: The batch.
        output: The network's output; None for a `BatchLoss`.
        target: The targets; None for a `BatchLoss`.
    """
    if network_loss.class_loss is not None or network_loss.is_cut:
        return
    if not isinstance(network_loss.loss_fn, BatchLoss):
        _compare_on(network_loss, output, target, batch.index)
    # By the statistics of a batch, its halves are normalised by others.
    elif not any(tracked_modules(network_loss.network)):

        def evaluate(rows: list[int]) -> tuple[Tensor, float]:
            data = batch.rows(rows)
            return network_loss.at(state, data, batch.index)[0], network_loss.count(data, batch.index)[1]

        _compare(network_loss, evaluate, batch.size, 1.0, _rounding(batch.data), batch.index)


def watch_cuts(network_loss: NetworkLoss, state: State, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Pass on the batches of one pass, and warn, once, of one whose loss is not weighed by what it divides by.

    A loss of an output is compared with its halves' without the network: on rows of the output that its first examples
    had. Where the targets of an example are more or fewer than those of the first, that is warned of instead. Of a
    `BatchLoss` it is seen, with the network, what the batches 0, 1, 2, 4, 8, … are divided by.
    """
    ratio: float | None = None
    for batch in batches:
        sight = network_loss.sight
        of_batch = isinstance(network_loss.loss_fn, BatchLoss)
        if not (network_loss.is_cut or network_loss.class_loss is not None):
            # What is seen within a function is what its batches weigh by.
            if of_batch and (sight is None or sight.class_loss is None):
                if batch.is_first or (ratio is not None and batch.index.bit_count() == 1):
                    ratio = _watch_divisor(network_loss, state, batch, ratio)
            elif sight is not None and sight.output is not None:
                _watch_batch(network_loss, sight, batch)
        yield batch


def _watch_divisor(network_loss: NetworkLoss, state: State, batch: Batch, before: float | None) -> float | None:
    """What the loss of a batch divides by, relative to the batch's weight; it should be as before."""
    divisor = network_loss.sight_of(state, batch.data, batch.size).divisor
    if not divisor or not batch.weight:
        return before
    ratio = divisor / batch.weight
    rounding = torch.finfo(torch.float32).eps
    if before is not None and not near("halves of a batch", ratio, before, rounding=rounding, scale=before):
        network_loss.is_cut = True
        warnings.warn(
            f"The loss of batch {batch.index} divides by {divisor:.6g} where the batch weighs {batch.weight:.6g}, "
            f"{ratio:.6g} to one, and the first batch {before:.6g} to one: its value depends on how the data are "
            f"cut into batches. {_REMEDY}",
            stacklevel=3,
        )
    return ratio


def _watch_batch(network_loss: NetworkLoss, sight: Sight, batch: Batch) -> None:
    target = batch.data[1]
    first, found = _positions(sight.target, sight.examples), _positions(target, batch.size)
    if first != found and sight.class_loss is None:
        network_loss.is_cut = True
        warnings.warn(
            f"An example of batch {batch.index} has {found} targets, and of the first batch {first}: batches weigh by "
            "their number of examples, so if the loss is a mean over all targets of a batch, its value depends on how "
            f"the data are cut into batches. {_REMEDY}",
            stacklevel=3,
        )
    elif first == found and batch.index > 0:
        rows = torch.randint(sight.examples, (batch.size,), generator=_generator(batch.index)).tolist()
        output = map_tensors(lambda t: t[rows] if t.ndim and len(t) == sight.examples else t, sight.output)
        _compare_on(network_loss, output, target, batch.index)


def _positions(target: Any, examples: int) -> list[int]:
    """How many numbers each tensor among the targets has for an example."""
    return [t.numel() // examples for t in tensors_in(target) if t.ndim and len(t) == examples]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _compare_on(network_loss: NetworkLoss, output: Any, target: Any, index: int) -> None:
    """Compare the loss of an output with those of its halves."""
    size = next((len(tensor) for tensor in tensors_in(output) if tensor.ndim), 0)
    loss_fn: Any = network_loss.loss_fn

    def evaluate(chosen: list[int]) -> tuple[Tensor, float]:
        def rows(tensor: Tensor) -> Tensor:
            # A copy: a loss may write into what it is given.
            return (tensor[chosen] if tensor.ndim and len(tensor) == size else tensor).detach().clone()

        part = map_tensors(rows, target)
        sight = network_loss.sight
        weight = float(len(chosen)) if sight is None else sight.weight_of(part, len(chosen))
        return loss_fn(map_tensors(rows, output), part), weight

    _compare(network_loss, evaluate, size, _typical(output), _rounding(output), index)


def _compare(
    network_loss: NetworkLoss,
    evaluate: Callable[[list[int]], tuple[Tensor, float]],
    size: int,
    typical: float,
    rounding: float,
    index: int,
) -> None:
    if size < 2:
        return
    order = torch.randperm(size, generator=_generator(index)).tolist()
    halves = sorted(order[: size // 2]), sorted(order[size // 2 :])
    try:
        with torch.no_grad():
            found = [evaluate(rows) for rows in (list(range(size)), *halves)]
    except Exception:  # noqa: BLE001 - what a loss makes of a half is nobody's concern
        return
    # Where nothing counts, the mean is 0/0.
    (whole, total), *parts = ((loss.item(), weight) for loss, weight in found)
    parts = [(loss, weight) for loss, weight in parts if weight]
    if not total or not parts:
        return
    mean = sum(loss * weight for loss, weight in parts) / sum(weight for _, weight in parts)
    # In whatever precision a loss computes, it is at least that of float32, or says so by its type.
    rounding = max(torch.finfo(found[0][0].dtype).eps, rounding)
    scale = max(abs(whole), *(abs(loss) for loss, _ in parts))
    # Terms of both signs, as large as the outputs, may cancel.
    if not near("halves of a batch", whole, mean, rounding=rounding, scale=scale, floor=8 * rounding * typical):
        network_loss.is_cut = True
        warnings.warn(
            f"The loss of batch {index} is {whole:.6g}, and the mean of its halves' losses {mean:.6g}: its value "
            "depends on how the data are cut into batches, because it is no mean over their examples (weights, ignored "
            f"targets, a sum, statistics of the batch?). {_REMEDY}",
            stacklevel=2,
        )


def _rounding(data: Any) -> float:
    dtypes = {tensor.dtype for tensor in tensors_in(data) if tensor.is_floating_point()} | {torch.float32}
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _typical(output: Any) -> float:
    """A typical size of an output's numbers; some may be masked by very large ones."""
    sizes = [tensor.detach().abs().double().flatten() for tensor in tensors_in(output) if tensor.is_floating_point()]
    return float(torch.cat(sizes).nanmedian()) if sizes else 0.0
