"""The data of a batch as a captured graph takes them: tensors, and the structure around them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, NoReturn

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from lmc_curvature.errors import CaptureError
from lmc_curvature.objective.batches import attributes_of, map_tensors, tensors_in


@dataclass(frozen=True)
class BatchTree:
    """The tensors in some data, and the structure around them.

    Attributes:
        tensors: In the order in which a walk through the structure meets them.
        structure: The data: tensors in nested mappings, lists and tuples, beside values of other types.
    """

    tensors: list[Tensor]
    structure: Any

    @classmethod
    def of(cls, data: Any) -> "BatchTree":
        """Data of any form that batches may have."""
        tensors: list[Tensor] = []
        map_tensors(tensors.append, data)
        return cls(tensors, data)

    def rebuilt(self, tensors: Iterable[Tensor]) -> Any:
        """The structure with other tensors in it."""
        following = iter(tensors)
        return map_tensors(lambda _: next(following), self.structure)

    @property
    def signature(self) -> tuple[str, str]:
        """Types and shapes of the tensors with the values beside and on them, and these values alone.

        Raises:
            CaptureError: There is something in the data whose value cannot be told from its looks.
        """
        shapes = _text(self.structure, lambda tensor: f"{tensor.dtype} {tuple(tensor.shape)}")
        return shapes, _text(self.structure, lambda _: repr(...))

    def rows(self, start: int, stop: int, size: int) -> "BatchTree":
        """The part of the data that belongs to some examples of a batch of `size`."""
        if (start, stop) == (0, size):
            return self
        return self._mapped(lambda tensor: tensor[start:stop], size)

    def chosen(self, numbers: Int[Tensor, " examples"], size: int) -> "BatchTree":
        """The examples of a batch of `size` that have the given numbers, in that order."""
        return self._mapped(lambda tensor: tensor[numbers.to(tensor.device)], size)

    def _mapped(self, function: Callable[[Tensor], Tensor], size: int) -> "BatchTree":
        """The data with a function applied to every tensor that has `size` rows, one an example."""
        parts = [function(tensor) if tensor.ndim and tensor.shape[0] == size else tensor for tensor in self.tensors]
        return BatchTree(parts, self.rebuilt(parts))

    def laid_out(self) -> "BatchTree":
        """Images with channels last on a CPU, where single-precision convolutions are faster so."""

        def lay(tensor: Tensor) -> Tensor:
            images = (
                tensor.ndim == 4 and tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.bfloat16)
            )
            return tensor.contiguous(memory_format=torch.channels_last) if images else tensor

        return BatchTree([lay(tensor) for tensor in self.tensors], self.structure)


# Types whose `repr` tells any two values apart; a class made of one of them may have any `repr`.
_PLAIN = (str, bytes, int, float, complex, bool, type(None), np.str_, np.float64)


def _text(data: Any, describe: Callable[[Tensor], str]) -> str:
    """A text that differs between any two data whose tensors or values differ, as far as `describe` tells tensors."""
    kind = type(data)
    name = "" if kind in (dict, list, tuple) else f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(data, Tensor):
        attributes = attributes_of(data)
        # Tensors among these are no inputs of a graph.
        return describe(data) + (f" with {_text(attributes, _refuse)}" if attributes else "")
    if isinstance(data, (Mapping, list, tuple)):
        name += _beside_items(data)
    if isinstance(data, Mapping):
        items = (f"{_text(key, describe)}: {_text(value, describe)}" for key, value in data.items())
        return f"{name}{{{', '.join(items)}}}"
    if isinstance(data, (list, tuple)):
        parts = ", ".join(_text(part, describe) for part in data)
        return f"{name}[{parts}]" if isinstance(data, list) else f"{name}({parts})"
    if kind in _PLAIN:
        return repr(data)
    if isinstance(data, Enum) and isinstance(data, (str, int, float)):
        return f"{name}{_text((data.name, data.value), describe)}"
    return _refuse(data)


def _beside_items(data: Any) -> str:
    """A text of the attributes of a mapping, list or tuple, such as a class made of one of them may have.

    Private ones may be of any kind, where no other tensor is in them: encoded sentences keep whole objects there.
    """
    items = {id(tensor) for tensor in tensors_in(data)}

    def describe(tensor: Tensor) -> str:
        return "an item" if id(tensor) in items else _refuse(tensor, "an attribute of the batch")

    told, factory = {}, getattr(data, "default_factory", None)
    if not (factory is None or isinstance(factory, type)):
        _refuse(factory)
    for name, value in getattr(data, "__dict__", {}).items():
        if value is data:
            continue
        try:
            told[name] = _text(value, describe)
        except CaptureError:
            if not name.startswith("_") or any(id(tensor) not in items for tensor in tensors_in(value)):
                raise
    return f"<{told}>" if told else ""


def _refuse(value: Any, what: str = "an attribute of a tensor") -> NoReturn:
    where = f", {what}," if isinstance(value, Tensor) else ","
    raise CaptureError(
        f"The loss cannot be captured as a graph: the batch holds a {type(value).__name__}{where} which may change "
        "from batch to batch. Make it a tensor of the batch."
    )
