"""A loss whose mean over the data depends on how they are cut into batches: noticed by its halves, and warned of."""

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lmc_curvature.agreement import near
from lmc_curvature.objective.batches import Batch, are_of_examples, map_tensors, tensors_in
from lmc_curvature.objective.explanations import quoted
from lmc_curvature.objective.forms import form_of
from lmc_curvature.objective.losses import BatchLoss, NetworkLoss
from lmc_curvature.objective.network import State
from lmc_curvature.objective.normalization import tracked_modules
from lmc_curvature.objective.precisions import precisions_met
from lmc_curvature.objective.sight import FEW, Sight

Halves = tuple[list[int], list[int]]
"""The examples of a batch in two parts."""

_REMEDY = (
    "Pass loss_fn=BatchLoss(fn, size=...) with what it divides by, or torch's nn.CrossEntropyLoss(weight=..., "
    "ignore_index=...), itself or in a function that returns its value for all targets unchanged."
)


def warn_of_cuts(network_loss: NetworkLoss, state: State, batch: Batch, output: Any, target: Any) -> None:
    """Warn if the loss of a batch is not the mean of its halves' losses, weighed as batches are.

    The halves are random ones, several times. A loss of an output is evaluated on one output of the network, if that
    has one row for each example, and else, as a `BatchLoss`, with the network. Where neither can be done, that is
    warned of. Cross-entropy and its like are weighed by what they divide by.

    Args:
        network_loss: The network and its loss.
        state: All entries of the network.
        batch: The batch.
        output: The network's output; None for a `BatchLoss`.
        target: The targets; None for a `BatchLoss`.
    """
    if network_loss.class_loss is not None or network_loss.is_cut:
        return
    of_batch = isinstance(network_loss.loss_fn, BatchLoss)
    # By the statistics of a batch, its halves are normalised by others.
    normalizes = any(tracked_modules(network_loss.network))
    if of_batch and normalizes:
        return
    failure: Exception | None = None
    if not of_batch and (_has_rows(output, batch.size) or normalizes):
        found, failure = _attempt(lambda: _compare_on(network_loss, output, target, batch.size, batch.index))
        if failure is None:
            _warn(network_loss, found)
            return
    if not normalizes:
        found, failure = _attempt(lambda: _compare_with_network(network_loss, state, batch))
        _warn(network_loss, found)
    # What is seen within a function is what its batches weigh by.
    if failure is not None and (network_loss.sight is None or network_loss.sight.class_loss is None):
        cause = failure.__cause__ or failure
        warnings.warn(
            f"The loss of batch {batch.index} could not be compared with its halves: {quoted(cause)}. "
            "So nothing tells whether it is a mean over the examples, by whose number batches weigh.",
            stacklevel=2,
        )


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


def watch_cuts(network_loss: NetworkLoss, state: State, batches: Iterator[Batch]) -> Iterator[Batch]:
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
                    _watch_with_network(network_loss, state, first, batch)
        yield batch


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
        generator = torch.Generator().manual_seed(batch.index)
        rows = torch.randint(sight.examples, (batch.size,), generator=generator).tolist()
        output = _rows(sight.output, sight.examples, rows)
        # What a loss makes of a part is nobody's concern, where it was said of the first batch.
        found, _ = _attempt(lambda: _compare_on(network_loss, output, target, batch.size, batch.index))
        if not found:
            found, _ = _attempt(lambda: _compare_with_first(network_loss, sight, rows, target, batch))
        _warn(network_loss, found)


def _compare_with_first(network_loss: NetworkLoss, sight: Sight, rows: list[int], target: Any, batch: Batch) -> str:
    """Compare the loss of the first examples and those of a batch with the losses of both."""
    if form_of(sight.target) != form_of(target):
        return ""
    output = _rows(sight.output, sight.examples, [*range(sight.examples), *rows])
    joined = _joined(sight.target, target, sight.examples, batch.size)
    return _compare_on(network_loss, output, joined, sight.examples + batch.size, batch.index, joined=sight.examples)


def _watch_with_network(network_loss: NetworkLoss, state: State, first: Batch, batch: Batch) -> None:
    """Compare the loss of a later batch with its halves' or, joined with the first, with those of both."""
    loss_fn = network_loss.loss_fn
    shapes, before = _example_shapes(batch), _example_shapes(first)
    varies = [now != then for now, then in zip(shapes, before, strict=True)] if len(shapes) == len(before) else []
    if varies and all(varies) and isinstance(loss_fn, BatchLoss) and loss_fn.size is None:
        network_loss.is_cut = True
        warnings.warn(
            f"All tensors of batch {batch.index} have other shapes than in the first batch, {list(map(tuple, shapes))} "
            f"and {list(map(tuple, before))} for an example: batches weigh by their number of examples, so if the loss "
            f"is a mean over parts of them, its value depends on how the data are cut into batches. {_REMEDY}",
            stacklevel=3,
        )
    # What a loss makes of a part is nobody's concern, where it was said of the first batch.
    elif not any(tracked_modules(network_loss.network)):
        found, _ = _attempt(lambda: _compare_with_network(network_loss, state, batch, None if any(varies) else first))
        _warn(network_loss, found)


def _positions(target: Any, examples: int) -> list[int]:
    """How many numbers each tensor among the targets has for an example."""
    return [t.numel() // examples for t in tensors_in(target) if t.ndim and len(t) == examples]


def _rows(data: Any, size: int, chosen: Sequence[int]) -> Any:
    """Copies of rows of the tensors that have so many."""
    rows = list(chosen)
    # A copy: a loss may write into what it is given.
    return map_tensors(lambda t: (t[rows] if t.ndim and len(t) == size else t).detach().clone(), data)


def _joined(first: Any, second: Any, examples: int, others: int) -> Any:
    """Data of the same form and of one batch, where those of examples are of both."""
    earlier = iter(tensors_in(first))

    def join(tensor: Tensor) -> Tensor:
        before = next(earlier)
        of_examples = tensor.ndim and len(tensor) == others and len(before) == examples
        return torch.cat([before, tensor]) if of_examples else tensor

    return map_tensors(join, second)


def _compare_on(
    network_loss: NetworkLoss, output: Any, target: Any, size: int, index: int, *, joined: int | None = None
) -> str:
    """Compare the loss of an output with those of its halves, or of the first so many examples and the others."""

    def evaluate(chosen: list[int]) -> tuple[Tensor, float]:
        part = _rows(target, size, chosen)
        weight = network_loss.sights.of(part).weight_of(part, len(chosen))
        return network_loss.of_output(_rows(output, size, chosen), part), weight

    halves = _halves(size, index, 3) if joined is None else [_parts(size, joined)]
    return _compare(
        evaluate, halves, index, rounding=_rounding(output), typical=_typical(output), joined=joined is not None
    )


def _compare_with_network(network_loss: NetworkLoss, state: State, batch: Batch, first: Batch | None = None) -> str:
    """Compare the loss of a batch with those of its halves, by the network; or of a few of its examples and the first.

    Raises:
        ValueError: The batch has no halves, because some tensor has other rows.
    """
    of_batch = isinstance(network_loss.loss_fn, BatchLoss)
    size = _leading(batch) if of_batch else batch.size
    if not are_of_examples(batch.data, size):
        if of_batch:
            # As a graph with its edges: it was said what counts, or it was seen.
            return ""
        raise ValueError("its tensors do not all have one row for each example")
    data, halves = batch.data, _halves(size, batch.index, 2)
    first = first if first is not None and form_of(first.data) == form_of(batch.data) else None
    if first is not None:
        before = _leading(first) if of_batch else first.size
        few, others = min(before, FEW), min(size, FEW)
        parts = _rows(first.data, before, range(few)), _rows(data, size, range(others))
        data, size = _joined(*parts, few, others), few + others
        halves = [_parts(size, few)]

    def evaluate(chosen: list[int]) -> tuple[Tensor, float]:
        part = _rows(data, size, chosen)
        return network_loss.at(state, part, batch.index)[0], network_loss.count(part, batch.index)[1]

    return _compare(evaluate, halves, batch.index, rounding=_rounding(data), typical=1.0, joined=first is not None)


def _leading(batch: Batch) -> int:
    """Rows of the first tensor: the size of a `BatchLoss` may be of tokens, or a sum of weights."""
    return next((len(tensor) for tensor in tensors_in(batch.data) if tensor.ndim), 0)


def _halves(size: int, seed: int, number: int) -> list[Halves]:
    """So many random halves of a batch; none if it has none."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(size, generator=generator).tolist() for _ in range(number)]
    return [(sorted(order[: size // 2]), sorted(order[size // 2 :])) for order in orders if size > 1]


def _parts(size: int, first: int) -> Halves:
    return list(range(first)), list(range(first, size))


def _compare(
    evaluate: Callable[[list[int]], tuple[Tensor, float]],
    halves: Sequence[Halves],
    index: int,
    *,
    rounding: float,
    typical: float,
    joined: bool = False,
) -> str:
    """What is to be said of the losses of a batch and of its parts; nothing where they agree."""
    if not halves:
        return ""
    with torch.no_grad():
        loss, total = evaluate(sorted([*halves[0][0], *halves[0][1]]))
        found = [[(part.item(), weight) for part, weight in map(evaluate, both)] for both in halves]
    whole, rounding, is_coarsest = loss.item(), max(torch.finfo(loss.dtype).eps, rounding), False
    for parts in found:
        # Where nothing counts, the mean is 0/0.
        parts = [(value, weight) for value, weight in parts if weight]
        weights = sum(weight for _, weight in parts)
        # A size that no part of a batch has of its own says nothing of parts.
        if not total or not math.isclose(weights, total, rel_tol=1e-3):
            continue
        mean = sum(value * weight for value, weight in parts) / weights
        scale = max(abs(whole), *(abs(value) for value, _ in parts))
        agree = functools.partial(near, "halves of a batch", whole, scale=scale)
        if not (is_coarsest or agree(mean, rounding=rounding, floor=8 * rounding * typical)):
            # A loss may compute in a lower precision than that of its value.
            is_coarsest, rounding = True, max(rounding, _coarsest_rounding(lambda: evaluate(halves[0][0])))
        # Terms of both signs, as large as the outputs, may cancel.
        limits = {"rounding": rounding, "floor": 8 * rounding * typical}
        if not agree(mean, **limits):
            among, whose = (" with examples of the first", "both") if joined else ("", "its halves'")
            is_sum = agree(sum(value for value, _ in parts), **limits)
            cure = "It is the sum of theirs, and a mean is expected: reduction='mean'. " if is_sum else ""
            return (
                f"The loss of batch {index}{among} is {whole:.6g}, and the mean of {whose} losses {mean:.6g}: its "
                "value depends on how the data are cut into batches, because it is no mean over their examples "
                f"(weights, ignored targets, a sum, statistics of the batch?). {cure}{_REMEDY}"
            )
    return "" if joined else _ignored_rows(halves, found, whole, total, index, rounding)


def _ignored_rows(halves: Any, found: Any, whole: float, total: float, index: int, rounding: float) -> str:
    """What is to be said of a loss that is a mean over rows, where half of the rows have no less of a size."""
    rows = len(halves[0][0]) + len(halves[0][1])
    for both, parts in zip(halves, found, strict=True):
        mean = (parts[0][0] * len(both[0]) + parts[1][0] * len(both[1])) / rows
        agree = near("halves of a batch", whole, mean, rounding=rounding, scale=abs(whole))
        # What both halves have in common, as a penalty on weights, tells nothing of rows.
        if not agree or parts[0][0] == parts[1][0] or min(weight for _, weight in parts) < total:
            return ""
    return (
        f"The loss of batch {index} is the mean over its {rows} rows, and its size {total:.6g}, which is that of "
        "half of the rows as well: batches weigh by their size. Leave size out, or return what the loss divides by."
    )


def _rounding(data: Any) -> float:
    dtypes = {tensor.dtype for tensor in tensors_in(data) if tensor.is_floating_point()} | {torch.float32}
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _coarsest_rounding(run: Callable[[], Any]) -> float:
    with torch.no_grad():
        _, met = precisions_met(nn.Module(), run)
    return max((torch.finfo(dtype).eps for dtype in met), default=0.0)


def _typical(output: Any) -> float:
    """A typical size of an output's numbers; some may be masked by very large ones."""
    sizes = [tensor.detach().abs().double().flatten() for tensor in tensors_in(output) if tensor.is_floating_point()]
    return float(torch.cat(sizes).nanmedian()) if sizes else 0.0
