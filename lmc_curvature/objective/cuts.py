"""A loss whose mean over the data depends on how they are cut into batches: noticed by its halves, and warned of."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lmc_curvature.agreement import near
from lmc_curvature.objective.batches import Batch, tensors_in
from lmc_curvature.objective.explanations import quoted
from lmc_curvature.objective.forms import form_of
from lmc_curvature.objective.losses import BatchLoss, NetworkLoss
from lmc_curvature.objective.network import State
from lmc_curvature.objective.normalization import Normalization, normalizes_by_batch
from lmc_curvature.objective.parts import REMEDY, compare_on, compare_with_network, concatenate, less_sure, rows_of
from lmc_curvature.objective.sight import Sight
from lmc_curvature.objective.sorting import targets_of


def warn_of_cuts(
    network_loss: NetworkLoss, state: State, batch: Batch, output: Any, target: Any, normalization: Normalization
) -> None:
    """Warn if the loss of a batch is not the mean of its halves' losses, weighed as batches are.

    The halves are random ones, several times. A loss of an output is evaluated on one output of the network, as it is
    and nearer to zero, if that has one row for each example, and else, as a `BatchLoss`, with the network. Where
    neither can be done, that is warned of. Cross-entropy and its like are weighed by what they divide by.

    Args:
        network_loss: The network and its loss.
        state: All entries of the network.
        batch: The batch.
        output: The network's output; None for a `BatchLoss`.
        target: The targets; None for a `BatchLoss`.
        normalization: The statistics that the network uses; for its halves, whose own are others, the running ones.
    """
    if network_loss.class_loss is not None or network_loss.is_cut:
        return
    of_batch, mixes = isinstance(network_loss.loss_fn, BatchLoss), _mixes(network_loss)
    if of_batch and mixes:
        return
    failure: Exception | None = None
    if not of_batch and (_has_rows(output, batch.size) or mixes):
        found, failure = _attempt(lambda: compare_on(network_loss, output, target, batch.size, batch.index))
        if failure is None:
            # Only where the network is not sure may something be left out.
            found = found or _attempt(lambda: _compare_less_sure(network_loss, output, target, batch))[0]
            _warn(network_loss, found)
            return
    if not mixes:
        with normalization.by("running"):
            found, failure = _attempt(lambda: compare_with_network(network_loss, state, batch))
        _warn(network_loss, found)
    # What is seen within a function is what its batches weigh by.
    if failure is not None and (network_loss.sight is None or network_loss.sight.class_loss is None):
        cause = failure.__cause__ or failure
        warnings.warn(
            f"The loss of batch {batch.index} could not be compared with its halves: {quoted(cause)}. "
            "So nothing tells whether it is a mean over the examples, by whose number batches weigh.",
            stacklevel=2,
        )


def _compare_less_sure(network_loss: NetworkLoss, output: Any, target: Any, batch: Batch) -> str:
    among = " with outputs nearer to zero"
    return compare_on(network_loss, less_sure(output, batch.size), target, batch.size, batch.index, among=among)


def _attempt(compare: Callable[[], str]) -> tuple[str, Exception | None]:
    """What a comparison has to say, and what kept it from being made."""
    try:
        return compare(), None
    except Exception as error:  # noqa: BLE001 - a loss may make anything of a part of a batch
        return "", error


def _warn(network_loss: NetworkLoss, message: str) -> None:
    if message:
        network_loss.is_cut = True
        warnings.warn(message, stacklevel=3)


def watch_cuts(
    network_loss: NetworkLoss,
    state: State,
    batches: Iterator[Batch],
    normalization: Normalization,
    gather: Callable[[Any], list[Any]] = lambda found: [found],
) -> Iterator[Batch]:
    """Pass on the batches of one pass, and warn, once, of one whose loss is not weighed by what it divides by.

    A loss of an output is compared with its halves' without the network: on rows of the output that its first examples
    had. Where the targets of an example are more or fewer than those of the first, that is warned of instead. A
    `BatchLoss`, or a loss of an output that has no rows, is looked at with the network: on every batch, if it is seen
    what it divides by, and else on the batches 0, 1, 2, 4, 8, … and on those whose examples have shapes of their own.
    """
    ratio: float | None = None
    first: Batch | None = None
    kinds: set[tuple[torch.Size, ...]] = set()
    for batch in batches:
        sight = network_loss.sight
        of_batch = isinstance(network_loss.loss_fn, BatchLoss)
        if not (network_loss.is_cut or network_loss.class_loss is not None):
            kind = _example_shapes(batch)
            looked = batch.is_first or batch.index.bit_count() == 1 or kind not in kinds
            kinds.add(kind)
            first = batch if first is None else first
            if not of_batch and sight is not None and _has_rows(sight.output, sight.examples):
                _watch_batch(network_loss, sight, batch)
            # What is seen within a function is what its batches weigh by.
            elif sight is None or sight.class_loss is None:
                if batch.is_first or ratio is not None:
                    ratio = _watch_divisor(network_loss, state, batch, ratio)
                if looked and ratio is None and not batch.is_first:
                    with normalization.by("running"):
                        _watch_with_network(network_loss, state, first, batch)
        yield batch
    ratios = [each for each in gather(ratio) if each]
    if not network_loss.is_cut and ratios and not _same_ratio(max(ratios), min(ratios)):
        network_loss.is_cut = True
        warnings.warn(
            f"The losses of two batches divide by {max(ratios):.6g} and {min(ratios):.6g} relative to what the batches "
            f"weigh: its value depends on how the data are cut into batches. {REMEDY}",
            stacklevel=3,
        )


def _same_ratio(first: float, second: float) -> bool:
    rounding = torch.finfo(torch.float32).eps
    return bool(near("halves of a batch", first, second, rounding=rounding, scale=second))


def _mixes(network_loss: NetworkLoss) -> bool:
    """Whether the network has no other statistics than those of a batch, of which halves have others."""
    return normalizes_by_batch(network_loss.network, "running")


def _example_shapes(batch: Batch) -> tuple[torch.Size, ...]:
    return tuple(tensor.shape[1:] for tensor in tensors_in(batch.data))


def _has_rows(data: Any, examples: int) -> bool:
    """Whether all tensors have one row for each example, and there are any."""
    return {len(tensor) if tensor.ndim else -1 for tensor in tensors_in(data)} == {examples}


def _watch_divisor(network_loss: NetworkLoss, state: State, batch: Batch, before: float | None) -> float | None:
    """What the loss of a batch divides by, relative to the batch's weight; it should be as before."""
    divisor = network_loss.sight_of(state, batch.data, batch.size).divisor
    if not divisor or not batch.weight:
        return before
    ratio = divisor / batch.weight
    if before is not None and not _same_ratio(ratio, before):
        network_loss.is_cut = True
        warnings.warn(
            f"The loss of batch {batch.index} divides by {divisor:.6g} where the batch weighs {batch.weight:.6g}, "
            f"{ratio:.6g} to one, and the first batch {before:.6g} to one: its value depends on how the data are "
            f"cut into batches. {REMEDY}",
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
            f"the data are cut into batches. {REMEDY}",
            stacklevel=3,
        )
    elif first == found and batch.index > 0:
        generator = torch.Generator().manual_seed(batch.index)
        rows = torch.randint(sight.examples, (batch.size,), generator=generator).tolist()
        output = rows_of(sight.output, sight.examples, rows)
        # What a loss makes of a part is nobody's concern, where it was said of the first batch.
        found, _ = _attempt(lambda: compare_on(network_loss, output, target, batch.size, batch.index))
        if not found:
            found, _ = _attempt(lambda: _compare_with_first(network_loss, sight, rows, target, batch))
        _warn(network_loss, found)


def _compare_with_first(network_loss: NetworkLoss, sight: Sight, rows: list[int], target: Any, batch: Batch) -> str:
    """Compare the loss of the first examples and those of a batch with the losses of both."""
    if form_of(sight.target) != form_of(target):
        return ""
    output = rows_of(sight.output, sight.examples, [*range(sight.examples), *rows])
    joined = concatenate(sight.target, target, sight.examples, batch.size)
    return compare_on(network_loss, output, joined, sight.examples + batch.size, batch.index, joined=sight.examples)


def _watch_with_network(network_loss: NetworkLoss, state: State, first: Batch, batch: Batch) -> None:
    """Compare the loss of a later batch with its halves' or, joined with the first, with those of both."""
    loss_fn = network_loss.loss_fn
    shapes, before = _example_shapes(batch), _example_shapes(first)
    varies = [now != then for now, then in zip(shapes, before, strict=True)] if len(shapes) == len(before) else []
    weighs_by_rows = not (isinstance(loss_fn, BatchLoss) and loss_fn.size is not None)
    if varies and weighs_by_rows and (all(varies) or _targets_vary(batch, first)):
        network_loss.is_cut = True
        warnings.warn(
            f"{'All tensors' if all(varies) else 'Targets'} of batch {batch.index} have other shapes than in the first "
            f"batch, {list(map(tuple, shapes))} and {list(map(tuple, before))} for an example: batches weigh by their "
            f"number of examples, so if the loss is a mean over parts of them, its value depends on how the data are "
            f"cut into batches. {REMEDY}",
            stacklevel=3,
        )
    # What a loss makes of a part is nobody's concern, where it was said of the first batch.
    elif not _mixes(network_loss):
        found, _ = _attempt(lambda: compare_with_network(network_loss, state, batch, None if any(varies) else first))
        _warn(network_loss, found)


def _targets_vary(batch: Batch, first: Batch) -> bool:
    """Whether the targets of an example have other shapes in a batch than in the first: by place, or else by name."""
    found = [targets_of(each.data) for each in (batch, first)]
    shapes, before = ([tensor.shape[1:] for tensor in tensors_in(each)] for each in found)
    return shapes != before


def _positions(target: Any, examples: int) -> list[int]:
    """How many numbers each tensor among the targets has for an example."""
    return [t.numel() // examples for t in tensors_in(target) if t.ndim and len(t) == examples]
