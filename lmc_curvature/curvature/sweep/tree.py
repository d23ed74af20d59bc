"""The data of a batch as a captured graph takes them: tensors, and the structure around them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lmc_curvature.errors import CaptureError
from lmc_curvature.objective.batches import map_tensors


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
        """Types and shapes of the tensors with the values beside them, and these values alone.

        Raises:
            CaptureError: There is something in the data whose value cannot be told from its looks.
        """
        shapes = map_tensors(lambda tensor: f"{tensor.dtype} {tuple(tensor.shape)}", self.structure)
        _check_plain(shapes)
        return repr(shapes), repr(map_tensors(lambda _: ..., self.structure))

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


def _check_plain(structure: Any) -> None:
    if isinstance(structure, Mapping):
        structure = [*structure, *structure.values()]
    if isinstance(structure, (list, tuple)):
        for part in structure:
            _check_plain(part)
    elif not isinstance(structure, (str, int, float, bool, type(None))):
        raise CaptureError(
            f"The loss cannot be captured as a graph: the batch holds a {type(structure).__name__}, which may change "
            "from batch to batch. Make it a tensor."
        )
