"""Batches of any form: their examples are counted, their tensors found and brought to a device."""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace, UnionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmc_curvature.errors import LoaderError


@dataclass(frozen=True)
class Batch:
    """One batch on the objective's device.

    Attributes:
        index: Its place in the loader.
        size: Its number of examples.
        data: Its data.
        weight: What it counts for in means over the data; by default its number of examples.
        skipped: How many batches before it count for nothing.
    """

    index: int
    size: int
    data: Any
    weight: float = math.nan
    skipped: int = 0

    def __post_init__(self) -> None:
        if math.isnan(self.weight):
            object.__setattr__(self, "weight", float(self.size))

    @property
    def is_first(self) -> bool:
        """Whether it is the first in the loader that counts for anything."""
        return self.index == self.skipped

    def rows(self, chosen: Sequence[int]) -> Any:
        """Data of some of its examples: rows of every dense tensor that has as many as the batch has examples."""
        rows = list(chosen)

        def cut(tensor: Tensor) -> Tensor:
            return tensor[rows] if tensor.layout is torch.strided and tensor.shape[:1] == (self.size,) else tensor

        return map_tensors(cut, self.data)

    @property
    def kind(self) -> tuple[Any, ...]:
        """Shapes of all tensors in it: batches of the same kind cost the same. Its place, if it holds no tensor."""
        return tuple(tensor.shape for tensor in tensors_in(self.data)) or (self.index,)


def map_tensors(function: Callable[[Tensor], Any], data: Any) -> Any:
    """Apply a function to every tensor in nested mappings, lists, tuples, dataclasses and namespaces.

    What they are is kept, with the attributes that tensors and instances of users' classes have. Mappings that cannot
    be filled and have no attributes become plain dicts.

    Raises:
        LoaderError: A list, or a mapping with attributes, is of a class that cannot be copied and filled.
    """
    if isinstance(data, Tensor):
        return _with_attributes(function(data), data)
    if isinstance(data, (Mapping, list, tuple)):
        return _filled(data, {key: map_tensors(function, value) for key, value in parts_of(data)})
    changed = {name: map_tensors(function, value) for name, value in fields_of(data).items()}
    if all(changed[name] is getattr(data, name) for name in changed):
        return data
    filled = copy.copy(data)
    for name, value in changed.items():
        # Also of what is frozen.
        object.__setattr__(filled, name, value)
    return filled


def attributes_of(tensor: Tensor) -> dict[str, Any]:
    """Attributes that were set on a tensor from outside, by name."""
    # Those of classes that take apart operations themselves are their own business.
    plain = getattr(type(tensor), "__torch_dispatch__", None) is getattr(Tensor, "__torch_dispatch__", None)
    return dict(vars(tensor)) if plain else {}


def _with_attributes(result: Any, tensor: Tensor) -> Any:
    if isinstance(result, Tensor) and result is not tensor:
        for name, value in attributes_of(tensor).items():
            setattr(result, name, value)
    return result


def _filled(data: Any, parts: dict[Any, Any]) -> Any:
    """A copy of a mapping, list or tuple with other parts, and with its own attributes where it has any.

    Attributes that are parts, or hold them, such as those of the outputs of transformers, get the others, too.
    """
    kind = type(data)
    if kind is dict:
        return parts
    if isinstance(data, tuple) and not hasattr(data, "__dict__"):
        return kind(*parts.values()) if hasattr(data, "_fields") else kind(parts.values())
    if kind is list:
        return list(parts.values())
    try:
        filled = tuple.__new__(kind, parts.values()) if isinstance(data, tuple) else copy.copy(data)
        others = {id(value): parts[key] for key, value in parts_of(data)}
        for name, value in list(getattr(data, "__dict__", {}).items()):
            # Around a class's own way to set attributes, which may refuse it.
            vars(filled)[name] = _exchanged(value, others)
        if isinstance(data, (dict, list)):
            # Around a class's own way to put items, which may change them once more.
            put: Any = dict.__setitem__ if isinstance(data, dict) else list.__setitem__
            for key, value in parts.items():
                put(filled, key, value)
        elif any(filled[key] is not value for key, value in parts.items()):
            filled.update(parts)
    except Exception as error:
        if isinstance(data, Mapping) and not getattr(data, "__dict__", None):
            return parts
        raise LoaderError(
            f"A {kind.__name__} cannot be copied with other tensors in it: make it a plain dict, list or tuple, or a "
            "dataclass."
        ) from error
    return filled


def _exchanged(value: Any, others: Mapping[int, Any]) -> Any:
    """A value, or plain dicts, lists and tuples with it inside, with others in place of what has their identity."""
    if id(value) in others:
        return others[id(value)]
    if type(value) is dict:
        return {key: _exchanged(part, others) for key, part in value.items()}
    return type(value)(_exchanged(part, others) for part in value) if type(value) in (list, tuple) else value


def fields_of(data: Any) -> dict[str, Any]:
    """Name to value of the fields of a dataclass or namespace; none of anything else."""
    if isinstance(data, SimpleNamespace):
        return dict(vars(data))
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        return {
            field.name: getattr(data, field.name) for field in dataclasses.fields(data) if hasattr(data, field.name)
        }
    return {}


def tensors_in(data: Any) -> list[Tensor]:
    """All tensors in nested mappings, lists, tuples, dataclasses and namespaces, in their order."""
    return [tensor for _, tensor in places_in(data)]


def parts_of(data: Any) -> Any:
    """Keys, numbers or names of the parts of a mapping, list, tuple, dataclass or namespace, and the parts."""
    if isinstance(data, (list, tuple)):
        return enumerate(data)
    return data.items() if isinstance(data, Mapping) else fields_of(data).items()


def places_in(
    data: Any, place: tuple[Any, ...] = (), kinds: type | UnionType = Tensor
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every tensor in data, or every value of other kinds, after its place: the keys, numbers and names on the way."""
    if isinstance(data, kinds):
        yield place, data
        return
    for key, value in parts_of(data):
        yield from places_in(value, (*place, key), kinds)


def first_rows(data: Any, examples: int, count: int) -> tuple[Any, int]:
    """A batch of the first examples alone, and their number; the whole batch where a tensor in it has other rows.

    Such a tensor may hold indices into the others, as the edges of a graph do.
    """
    if not all(tensor.ndim and len(tensor) == examples for tensor in tensors_in(data)):
        return data, examples
    return map_tensors(lambda tensor: tensor[:count], data), min(examples, count)


def count_examples(data: Any, index: int, *, any_form: bool = False) -> int:
    """Number of examples in a batch: the leading dimension of its first tensor.

    Args:
        data: The batch.
        index: Its place in the loader, for errors.
        any_form: Whether the batch need not be an (x, y) pair.

    Raises:
        LoaderError: The batch is not a pair, its x and y have not as many examples, it holds no example, or nothing in
            it can be counted.
    """
    if not any_form and not (isinstance(data, (tuple, list)) and len(data) == 2):
        raise LoaderError(
            f"Batch {index} of the loader is {describe(data)}; expected an (x, y) pair. "
            "For batches of another form pass loss_fn=BatchLoss(fn) with fn(model, batch) -> scalar mean."
        )
    tensors = tensors_in(data)
    parts = data.values() if isinstance(data, Mapping) else data if isinstance(data, (tuple, list)) else [data]
    if not (any_form and tensors) and any(isinstance(part, np.ndarray) for part in parts):
        raise LoaderError(
            f"Batch {index} of the loader holds NumPy arrays; expected tensors: make them with torch.from_numpy, or "
            "pass a DataLoader, which does."
        )
    if not tensors or tensors[0].ndim == 0:
        raise LoaderError(
            f"Batch {index} of the loader is {describe(data)}, without a tensor whose leading dimension counts the "
            "examples; pass loss_fn=BatchLoss(fn, size=...) to count them."
        )
    if not any_form:
        _check_first_axes(data, index)
    if not len(tensors[0]):
        raise LoaderError(f"Batch {index} of the loader holds 0 examples; expected at least one.")
    return len(tensors[0])


def _check_first_axes(pair: Any, index: int) -> None:
    first, second = (next(iter(tensors_in(part)), None) for part in pair)
    # A target without axes belongs to all examples.
    if first is None or second is None or not second.ndim or len(first) == len(second):
        return
    raise LoaderError(
        f"Batch {index} of the loader has x of shape {tuple(first.shape)} and y of shape {tuple(second.shape)}: their "
        "first axes should be the examples. Move that axis to the front (batch_first=True), or pass "
        "loss_fn=BatchLoss(fn, size=...) with fn(model, batch) -> scalar mean and size(batch) -> what that divides by."
    )


def check_first_axes(data: Any, index: int) -> None:
    """Refuse a batch of any form whose tensors have different first axes: which one counts examples is unknown.

    Tensors without axes and square ones over an axis of the examples, such as masks, belong to all examples.

    Raises:
        LoaderError: Names the shapes.
    """
    if not are_of_examples(data, len(tensors_in(data)[0])):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(data)[:6])
        raise LoaderError(
            f"Batch {index} of the loader is {describe(data)}, with tensors of shapes {shapes}: their first axes "
            "differ, so what it counts for is unknown. Pass loss_fn=BatchLoss(fn, size=...) with size(batch) -> what "
            "fn(model, batch) divides by."
        )


def are_of_examples(data: Any, examples: int) -> bool:
    """Whether each tensor has one row for each of so many examples, or belongs to all of them, as far as shapes tell.

    Those without axes do, and those that begin with an axis of length 1, or are square, over an axis of an example.
    """
    tensors = tensors_in(data)
    of_examples = [tensor for tensor in tensors if tensor.ndim and len(tensor) == examples]
    lengths = {length for tensor in of_examples for length in tensor.shape[1:]} - {1}

    def belongs_to_all(tensor: Tensor) -> bool:
        shape = list(tensor.shape)
        while shape and shape[0] == 1:
            shape.pop(0)
        shared = len(shape) < tensor.ndim or (len(shape) == 2 and shape[0] == shape[1])
        return not tensor.ndim or (shared and bool(shape) and lengths.issuperset(shape))

    return bool(of_examples) and all(
        (tensor.ndim and len(tensor) == examples) or belongs_to_all(tensor) for tensor in tensors
    )


def check_size(size: Any, index: int) -> float:
    """What a user's function says that a batch counts for, as a number.

    Raises:
        LoaderError: It is not a number, negative, or not finite.
    """
    try:
        weight = float(size)
    except (TypeError, ValueError) as error:
        raise LoaderError(
            f"The size of batch {index} of the loader is {describe(size)}; expected a number, 0 or more."
        ) from error
    if not (math.isfinite(weight) and weight >= 0):
        raise LoaderError(
            f"Batch {index} of the loader holds {weight:g} examples by the size of the BatchLoss; expected a number of "
            "examples, or the sum of their weights: 0 or more."
        )
    return weight


def describe(data: Any) -> str:
    """Say in a few words what an object is, for an error message."""
    if isinstance(data, Tensor):
        return f"a tensor of shape {tuple(data.shape)} and type {data.dtype}"
    if isinstance(data, Mapping):
        return f"a mapping with keys {', '.join(map(repr, list(data)[:6]))}"
    if isinstance(data, (list, tuple)):
        return f"a {type(data).__name__} of length {len(data)}"
    return f"an object of type {type(data).__name__}"


# Of the differences between examples, float32 must not lose this part.
_LOSS_OF_DIGITS = 1e-3


def place_data(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Move a tensor of a batch to a device, and a floating-point one to the given type.

    Raises:
        LoaderError: It is of a finer type, and the other one loses what tells its examples apart.
    """
    if tensor.dtype == torch.float64 and dtype == torch.float32 and tensor.numel():
        columns = tensor.reshape(len(tensor), -1) if tensor.ndim else tensor.reshape(1, 1)
        columns = columns.where(columns.isfinite(), 0)
        lost = (columns - columns.to(dtype)).abs()
        whole = (columns == columns.round()).all(0)
        spread = columns.amax(0) - columns.amin(0)
        bad = (lost > 0) & (whole | ((spread > 0) & (lost > _LOSS_OF_DIGITS * spread)))
        if bad.any():
            value = columns[bad][0].item()
            raise LoaderError(
                f"A batch of the loader holds {value!r} in float64, which {str(dtype).removeprefix('torch.')} makes "
                f"{torch.tensor(value, dtype=dtype).item()!r}: whole numbers or differences between examples get lost. "
                "Compute in dtype=torch.float64, or bring the data to whole-number types or a moderate scale in the "
                "loader."
            )
    return to_device(tensor, device, dtype)


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Move a tensor to a device, and a floating-point one to the given type."""
    moved = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
    # What was made in inference mode cannot take part in differentiation; a copy can.
    return moved.clone() if moved.is_inference() else moved
