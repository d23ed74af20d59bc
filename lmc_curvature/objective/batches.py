"""Loaders and batches of any form: their examples are counted, their tensors found and brought to a device."""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from tqdm.auto import tqdm

from lmc_curvature.errors import LoaderError


@dataclass(frozen=True)
class Batch:
    """One batch on the objective's device: its place in the loader, its number of examples, its data."""

    index: int
    size: int
    data: Any

    @property
    def kind(self) -> tuple[Any, ...]:
        """Shapes of all tensors in it: batches of the same kind cost the same. Its place, if it holds no tensor."""
        return tuple(tensor.shape for tensor in tensors_in(self.data)) or (self.index,)


def map_tensors(function: Callable[[Tensor], Any], data: Any) -> Any:
    """Apply a function to every tensor in nested mappings, lists and tuples; mappings become plain dicts."""
    if isinstance(data, Tensor):
        return function(data)
    if isinstance(data, Mapping):
        return {key: map_tensors(function, value) for key, value in data.items()}
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(map_tensors(function, value) for value in data))
    if isinstance(data, (list, tuple)):
        return type(data)(map_tensors(function, value) for value in data)
    return data


def tensors_in(data: Any) -> list[Tensor]:
    """All tensors in nested mappings, lists and tuples, in their order."""
    tensors: list[Tensor] = []
    map_tensors(tensors.append, data)
    return tensors


def visit(
    loader: Iterable[Any],
    *,
    max_batches: int | None,
    pairs: bool,
    size: Callable[[Any], int] | None,
    place: Callable[[Tensor], Tensor],
    bar: tqdm,
) -> Iterator[Batch]:
    """Yield the batches of a loader, placed on a device.

    Args:
        loader: Yields the data of batches.
        max_batches: Yield only this many; None for all.
        pairs: Whether batches must be (x, y) pairs.
        size: Counts the examples of a batch; by default the leading dimension of the first tensor.
        place: Brings a tensor to the device.
        bar: A progress bar, moved with every batch.

    Raises:
        LoaderError: The loader yields nothing, or a batch is not of the form that the loss expects.
    """
    index = -1
    for index, data in enumerate(_noting_place(islice(loader, max_batches))):
        yield Batch(index, count_examples(data, index, any_form=not pairs, size=size), map_tensors(place, data))
        bar.update()
    if index < 0:
        refuse_iterator(loader, "The loader yielded no batch: it may have been used up by an earlier pass")
        raise LoaderError("The loader yielded no batch; expected at least one.")


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


def count_examples(data: Any, index: int, *, any_form: bool = False, size: Callable[[Any], int] | None = None) -> int:
    """Number of examples in a batch: the leading dimension of its first tensor, or what `size` counts.

    Args:
        data: The batch.
        index: Its place in the loader, for errors.
        any_form: Whether the batch need not be an (x, y) pair.
        size: Counts the examples of a batch.

    Raises:
        LoaderError: The batch is not a pair, holds no example, or nothing in it can be counted.
    """
    if not any_form and not (isinstance(data, (tuple, list)) and len(data) == 2):
        raise LoaderError(
            f"Batch {index} of the loader is {describe(data)}; expected an (x, y) pair. "
            "For batches of another form pass loss_fn=BatchLoss(fn) with fn(model, batch) -> scalar mean."
        )
    tensors = tensors_in(data)
    if size is None and (not tensors or tensors[0].ndim == 0):
        raise LoaderError(
            f"Batch {index} of the loader is {describe(data)}, without a tensor whose leading dimension counts the "
            "examples; pass loss_fn=BatchLoss(fn, size=...) to count them."
        )
    count = len(tensors[0]) if size is None else int(size(data))
    if count < 1:
        raise LoaderError(f"Batch {index} of the loader holds {count} examples; expected at least one.")
    return count


def describe(data: Any) -> str:
    """Say in a few words what an object is, for an error message."""
    if isinstance(data, Tensor):
        return f"a tensor of shape {tuple(data.shape)} and type {data.dtype}"
    if isinstance(data, Mapping):
        return f"a mapping with keys {', '.join(map(repr, list(data)[:6]))}"
    if isinstance(data, (list, tuple)):
        return f"a {type(data).__name__} of length {len(data)}"
    return f"an object of type {type(data).__name__}"


def check_loader(loader: Any) -> None:
    """Refuse what does not yield batches.

    Raises:
        LoaderError: It cannot be iterated over, or is a data set of single examples.
    """
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise LoaderError(f"The loader is {describe(loader)}; expected an iterable of batches, such as a DataLoader.")
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise LoaderError(
            f"The loader is a data set ({type(loader).__name__}), which yields examples; expected batches: pass "
            "DataLoader(dataset, batch_size=...)."
        )


def loader_length(loader: Iterable[Any], max_batches: int | None) -> int | None:
    """Number of batches a visit will yield, or None when the loader does not say."""
    limits = [limit for limit in (operator.length_hint(loader), max_batches) if limit]
    return min(limits, default=None)


def refuse_iterator(loader: Iterable[Any], reason: str) -> None:
    """Raise `LoaderError` with `reason` if the loader can be visited only once."""
    # Not iter(loader) is loader: starting a DataLoader draws a seed and may start processes.
    if isinstance(loader, Iterator):
        raise LoaderError(f"{reason}, and an iterator can be visited only once: pass a list or a DataLoader.")


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Move a tensor to a device, and a floating-point one to the given type."""
    moved = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
    # What was made in inference mode cannot take part in differentiation; a copy can.
    return moved.clone() if moved.is_inference() else moved
