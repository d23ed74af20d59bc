"""The loss of a batch beside those of its parts, or of a batch and another: whether it is a mean over the examples."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lmc_curvature.agreement import near
from lmc_curvature.objective.batches import Batch, are_of_examples, map_tensors, tensors_in
from lmc_curvature.objective.forms import form_of
from lmc_curvature.objective.losses import BatchLoss, NetworkLoss
from lmc_curvature.objective.network import State
from lmc_curvature.objective.precisions import precisions_met
from lmc_curvature.objective.sight import FEW

Halves = tuple[list[int], list[int]]
"""The examples of a batch in two parts."""

# What to do about a loss that is no mean, at the end of a warning.
REMEDY = (
    "Pass loss_fn=BatchLoss(fn, size=...) with what it divides by, or torch's nn.CrossEntropyLoss(weight=..., "
    "ignore_index=...), itself or in a function that returns its value for all targets unchanged."
)


def rows_of(data: Any, size: int, chosen: Sequence[int]) -> Any:
    """Copies of the rows chosen of every tensor that has `size` rows, and of other tensors as they are."""
    rows = list(chosen)
    # A copy: a loss may write into what it is given.
    return map_tensors(lambda t: (t[rows] if t.ndim and len(t) == size else t).detach().clone(), data)


def less_sure(data: Any, size: int) -> Any:
    """Tensors of `size` rows that were computed from entries, each row up to a thousand times nearer to zero."""
    shares = 10 ** (-3 * torch.rand(size, generator=torch.Generator().manual_seed(0)))

    def nearer(tensor: Tensor) -> Tensor:
        # Masks are passed through.
        if not (tensor.requires_grad and tensor.is_floating_point() and tensor.ndim and len(tensor) == size):
            return tensor
        return tensor.detach() * shares.to(tensor).reshape(-1, *(1,) * (tensor.ndim - 1))

    return map_tensors(nearer, data)


def concatenate(first: Any, second: Any, examples: int, others: int) -> Any:
    """Data of two batches of one form as one: tensors with a row for each of their examples one below the other."""
    earlier = iter(tensors_in(first))

    def join(tensor: Tensor) -> Tensor:
        before = next(earlier)
        of_examples = tensor.ndim and len(tensor) == others and len(before) == examples
        return torch.cat([before, tensor]) if of_examples else tensor

    return map_tensors(join, second)


def compare_on(
    network_loss: NetworkLoss,
    output: Any,
    target: Any,
    size: int,
    index: int,
    *,
    joined: int | None = None,
    among: str = "",
) -> str:
    """Compare the loss of an output with those of its halves, or of the first so many examples and the others.

    What the output is, if it is not the network's, is said by `among`.

    Returns:
        A sentence about their difference; nothing where they agree.
    """

    def evaluate(chosen: list[int]) -> tuple[Tensor, float]:
        part = rows_of(target, size, chosen)
        weight = network_loss.sights.of(part).weight_of(part, len(chosen))
        return network_loss.of_output(rows_of(output, size, chosen), part), weight

    halves = _halves(size, index, 3) if joined is None else [_parts(size, joined)]
    return _compare(
        evaluate,
        halves,
        index,
        rounding=_rounding(output),
        typical=_typical(output),
        joined=joined is not None,
        among=among,
    )


def compare_with_network(network_loss: NetworkLoss, state: State, batch: Batch, first: Batch | None = None) -> str:
    """Compare the loss of a batch with those of its halves, by the network; or of a few of its examples and the first.

    Returns:
        A sentence about their difference; nothing where they agree.

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
        parts = rows_of(first.data, before, range(few)), rows_of(data, size, range(others))
        data, size = concatenate(*parts, few, others), few + others
        halves = [_parts(size, few)]

    def evaluate(chosen: list[int]) -> tuple[Tensor, float]:
        part = rows_of(data, size, chosen)
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
    among: str = "",
) -> str:
    """What is to be said of the losses of a batch and of its parts; nothing where they agree."""
    if not halves:
        return ""
    with torch.no_grad():
        loss, total = evaluate(sorted([*halves[0][0], *halves[0][1]]))
        found = [[(part.item(), weight) for part, weight in map(evaluate, both)] for both in halves]
    whole, rounding, is_coarsest = loss.item(), max(torch.finfo(loss.dtype).eps, rounding), False
    # By running statistics that were never estimated, a network of many layers overflows.
    found = found if math.isfinite(whole) else []
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
            among, whose = (" with examples of the first", "both") if joined else (among, "its halves'")
            is_sum = agree(sum(value for value, _ in parts), **limits)
            cure = "It is the sum of theirs, and a mean is expected: reduction='mean'. " if is_sum else ""
            return (
                f"The loss of batch {index}{among} is {whole:.6g}, and the mean of {whose} losses {mean:.6g}: its "
                "value depends on how the data are cut into batches, because it is no mean over their examples "
                f"(weights, ignored targets, a sum, statistics of the batch?). {cure}{REMEDY}"
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
