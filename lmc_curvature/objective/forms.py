"""The form of a batch: which tensors and plain values it holds, and where."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lmc_curvature.errors import LoaderError
from lmc_curvature.objective.batches import describe, parts_of, places_in


def form_of(data: Any) -> int:
    """A number that is the same for data of one form.

    Such data hold tensors with as many axes, floating-point or not, and the same plain values (numbers, texts), in the
    same places. The precision has no part in it: it changes as a batch is brought to a device.
    """
    kinds = Tensor | bool | int | float | complex | str | bytes
    parts = (
        (place, part.is_floating_point(), part.ndim) if isinstance(part, Tensor) else (place, part)
        for place, part in places_in(data, kinds=kinds)
    )
    return hash(tuple(parts))


def lengths_of_lists(data: Any, place: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], int]:
    """How many tensors each list or tuple in data holds, by its place: of those whose tensors are of one kind."""
    if isinstance(data, Tensor):
        return {}
    if isinstance(data, (list, tuple)) and data and all(isinstance(each, Tensor) for each in data):
        return {place: len(data)} if len({(each.dtype, each.ndim) for each in data}) == 1 else {}
    return {
        key: length for name, part in parts_of(data) for key, length in lengths_of_lists(part, (*place, name)).items()
    }


def check_lengths_of_lists(data: Any, first: Mapping[tuple[Any, ...], int], index: int) -> None:
    """Refuse a batch whose lists hold more or fewer tensors than in the first: each may be an example then.

    Raises:
        LoaderError: Says how many there are.
    """
    for place, length in lengths_of_lists(data).items():
        if length != first.get(place, length):
            raise LoaderError(
                f"Batch {index} of the loader is {describe(data)}, in which a list holds {length} tensors; the first "
                f"batch's held {first[place]}. If each is an example, their rows do not count them. Pass "
                "loss_fn=BatchLoss(fn, size=...) with size(batch) -> what fn(model, batch) divides by."
            )
