"""Loaders: whether something yields batches, how many, whether again; and a visit to all of them."""

import contextlib
import operator
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from tqdm.auto import tqdm

from lmc_curvature.errors import LoaderError, OptionError, RankError
from lmc_curvature.objective.batches import Batch, describe, map_tensors, tensors_in
from lmc_curvature.objective.extent import Extent
from lmc_curvature.objective.randomness import global_rng_preserved, host_states, set_host_states
from lmc_curvature.objective.ranks import Ranks, yields_a_share
from lmc_curvature.objective.sorting import warn_of_sorted_data

# Numbers of a tensor by which batches are told apart.
_DIGEST = 64


@contextlib.contextmanager
def visit(
    loader: Iterable[Any],
    *,
    max_batches: int | None,
    progress: bool | None,
    description: str,
    ranks: Ranks,
    extent: Extent | None = None,
    **options: Any,
) -> Iterator[Iterator[Batch]]:
    """Within the block, the batches of one pass over a loader; see `_batches` for the options.

    The global random number generators, which may shuffle or augment, begin alike on all ranks, and are as before when
    the block ends. A progress bar is shown on a terminal and in a notebook, unless `progress` says otherwise. With an
    extent, the block ends without an error when it is interrupted after whole batches.
    """
    total, hidden = loader_length(loader, max_batches), None if progress is None else not progress
    bar = tqdm(total=total, desc=description, disable=hidden, leave=False)
    try:
        with global_rng_preserved(), ranks.together(), bar:
            set_host_states(ranks.gather(host_states())[0])
            yield _batches(loader, max_batches=max_batches, bar=bar, ranks=ranks, extent=extent, **options)
    except (KeyboardInterrupt, Exception) as error:
        # The other ranks have ended by now.
        if extent is None or ranks.size > 1 or not extent.keeps(error):
            raise


def _batches(
    loader: Iterable[Any],
    *,
    max_batches: int | None,
    count: Callable[[Any, int], tuple[int, float]],
    weightless: bool,
    place: Callable[[Tensor], Tensor],
    bar: tqdm,
    ranks: Ranks,
    extent: Extent | None,
) -> Iterator[Batch]:
    """Yield this rank's batches of a loader, placed on a device; warn if its data come in the order of their classes.

    Every rank goes through the whole loader, which has to yield the same on all, and takes its share; a loader with a
    `DistributedSampler` yields each its share already.

    Args:
        loader: Yields the data of batches.
        max_batches: Visit only this many; None for all.
        count: Number of examples and weight of a batch, from its data as the loader yields them and its place.
        weightless: Whether batches of weight zero are yielded, too.
        place: Brings a tensor to the device.
        bar: A progress bar, moved with every batch.
        ranks: The processes that share the batches.
        extent: How far to go, if not to the end.

    Raises:
        LoaderError: The loader yields nothing, nothing in it counts, or a batch is not of the form that the loss
            expects.
        OptionError: The extent is not the end, and the loader yields each rank a share of its own.
        RankError: Another rank has failed or vanished, or has other batches.
    """
    index, found, counts, skipped = -1, 0, False, None
    is_share = yields_a_share(loader, ranks)
    if is_share and extent is not None and extent.tolerance is not None:
        raise OptionError("tolerance: ranks end together, and by a DistributedSampler they have not as many batches.")
    batches = _without_nested(_noting_place(islice(loader, max_batches), extent))
    for index, data in enumerate(warn_of_sorted_data(batches)):
        ranks.check()
        size, weight = count(data, index)
        number = index * ranks.size + ranks.rank if is_share else index
        if ranks.has(number):
            if weight or weightless:
                yield Batch(number, size, map_tensors(place, data), weight, number if skipped is None else skipped)
            skipped = number if weight and skipped is None else skipped
        counts |= bool(weight)
        found = digest(data, found) if ranks.size > 1 else 0
        bar.update()
        if extent is not None and extent.is_enough(index + 1, bar):
            break
    said = ranks.gather((index, found, counts))
    if is_share:
        index, counts = max(index for index, _, _ in said), any(counts for _, _, counts in said)
    elif len(set(said)) > 1:
        lengths = ", ".join(str(index + 1) for index, _, _ in said)
        raise RankError(
            f"The ranks' loaders yield different batches ({lengths} of them): every rank takes its share of the same "
            "ones. Seed what shuffles them alike on every rank, or give the DataLoader a DistributedSampler."
        )
    if index < 0:
        refuse_iterator(loader, "The loader yielded no batch: it may have been used up by an earlier pass")
        raise LoaderError("The loader yielded no batch; expected at least one.")
    if not counts:
        raise LoaderError(
            "No target of the loader counts: each is left out by the loss (ignore_index), of a class of weight zero, "
            "or in a batch of which the size of the BatchLoss is 0."
        )


def digest(data: Any, before: int = 0) -> int:
    """A number that tells batches apart, and what came before them: of some numbers of every dense tensor."""
    for tensor in tensors_in(data):
        if tensor.layout is torch.strided:
            spread = tensor.detach().flatten()[:: max(1, tensor.numel() // _DIGEST)]
            before = zlib.crc32(str((tuple(tensor.shape), spread.tolist())).encode(), before)
    return before


def _noting_place(batches: Iterable[Any], extent: Extent | None) -> Iterator[Any]:
    """Yield the batches, and note on an error of the loader's own at which it was raised."""
    count = 0
    try:
        for data in batches:
            yield data
            count += 1
    except Exception as error:
        error.add_note(f"batch {count} of the loader")
        if extent is not None:
            extent.note_failure(error)
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
