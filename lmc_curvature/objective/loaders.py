"""Loaders: whether something yields batches, how many, whether again; and a visit to all of them."""

import operator
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from tqdm.auto import tqdm

from lmc_curvature.errors import LoaderError, OptionError
from lmc_curvature.objective.batches import Batch, describe, map_tensors, tensors_in
from lmc_curvature.objective.sorting import warn_of_sorted_data


def visit(
    loader: Iterable[Any],
    *,
    max_batches: int | None,
    count: Callable[[Any, int], tuple[int, float]],
    weightless: bool,
    place: Callable[[Tensor], Tensor],
    bar: tqdm,
) -> Iterator[Batch]:
    """Yield the batches of a loader, placed on a device; warn if its data come in the order of their classes.

    Args:
        loader: Yields the data of batches.
        max_batches: Visit only this many; None for all.
        count: Number of examples and weight of a batch, from its data as the loader yields them and its place.
        weightless: Whether batches of weight zero are yielded, too.
        place: Brings a tensor to the device.
        bar: A progress bar, moved with every batch.

    Raises:
        LoaderError: The loader yields nothing, nothing in it counts, or a batch is not of the form that the loss
            expects.
    """
    index, skipped = -1, 0
    batches = _without_nested(_noting_place(islice(loader, max_batches)))
    for index, data in enumerate(warn_of_sorted_data(batches)):
        size, weight = count(data, index)
        if weight or weightless:
            yield Batch(index, size, map_tensors(place, data), weight, skipped)
        skipped += not weight
        bar.update()
    if index < 0:
        refuse_iterator(loader, "The loader yielded no batch: it may have been used up by an earlier pass")
        raise LoaderError("The loader yielded no batch; expected at least one.")
    if skipped > index:
        raise LoaderError(
            "No target of the loader counts: each is left out by the loss (ignore_index), of a class of weight zero, "
            "or in a batch of which the size of the BatchLoss is 0."
        )


def _noting_place(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches, and note on an error of the loader's own at which it was raised."""
    count = 0
    try:
        for data in batches:
            yield data
            count += 1
    except Exception as error:
        error.add_note(f"batch {count} of the loader")
        raise


def _without_nested(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches, and refuse one with nested tensors, whose examples are no rows."""
    for index, data in enumerate(batches):
        if any(tensor.is_nested for tensor in tensors_in(data)):
            raise LoaderError(
                f"Batch {index} of the loader holds nested tensors; expected tensors whose first axis is the examples: "
                "pad them (torch.nested.to_padded_tensor), beside a mask."
            )
        yield data


def check_loader(loader: Any, max_batches: int | None) -> None:
    """Refuse what does not yield batches.

    Raises:
        LoaderError: It cannot be iterated over, or is a data set of single examples or a single batch.
        OptionError: The number of batches to visit is not positive.
    """
    if max_batches is not None and (not isinstance(max_batches, int) or max_batches < 1):
        raise OptionError(f"max_batches={max_batches!r}: expected a whole number, at least 1 (or None for all).")
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise LoaderError(f"The loader is {describe(loader)}; expected an iterable of batches, such as a DataLoader.")
    if _is_pair(loader):
        raise LoaderError("The loader is a pair of tensors; a single batch? Put it into a list: [(x, y)].")
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise LoaderError(
            f"The loader is a data set ({type(loader).__name__}), which yields examples; expected batches: pass "
            "DataLoader(dataset, batch_size=...)."
        )


def _is_pair(loader: Any) -> bool:
    """Whether this is inputs with their targets: two tensors of as many rows, but not of one form, as batches are."""
    if not (isinstance(loader, tuple) and len(loader) == 2 and all(isinstance(part, Tensor) for part in loader)):
        return False
    x, y = loader
    return x.shape[:1] == y.shape[:1] and (x.shape, x.dtype) != (y.shape, y.dtype)


def loader_length(loader: Iterable[Any], max_batches: int | None) -> int | None:
    """Number of batches a visit will yield, or None when the loader does not say."""
    limits = [limit for limit in (operator.length_hint(loader), max_batches) if limit]
    return min(limits, default=None)


def refuse_iterator(loader: Iterable[Any], reason: str) -> None:
    """Raise `LoaderError` with `reason` if the loader can be visited only once."""
    # Not iter(loader) is loader: starting a DataLoader draws a seed and may start processes.
    if isinstance(loader, Iterator):
        raise LoaderError(f"{reason}, and an iterator can be visited only once: pass a list or a DataLoader.")
