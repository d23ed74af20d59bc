"""The matrix of one batch whose graph and whose products are replayed as CUDA graphs.

The graph of the derivatives is made while a graph of CUDA is recorded, and kept: replayed for another batch, it holds
the other batch's numbers. So do products, which are recorded on it.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_flatten

from lmc_curvature.curvature.products.matrix import BatchMatrix
from lmc_curvature.objective.batches import Batch, attributes_of, map_tensors, tensors_in
from lmc_curvature.objective.network import State
from lmc_curvature.objective.risk import Objective
from lmc_curvature.replay import Replays

Make = Callable[[Objective, State, Batch, Sequence[str]], BatchMatrix]


def replayed_matrix(
    make: Make, objective: Objective, state: State, batch: Batch, entries: Sequence[str]
) -> BatchMatrix:
    """The matrix of a batch, replayed where batches of its kind come again, and nothing but tensors tells them apart.

    What is replayed holds until the next matrix is.

    Args:
        make: `make(objective, state, batch, entries)` makes the matrix.
        objective: The loss, whose replays are used.
        state: Where to differentiate.
        batch: The examples.
        entries: Entries to differentiate in.
    """
    replays = objective.replays
    leaves, structure = tree_flatten(batch.data)
    if not replays.records or not all(isinstance(leaf, Tensor) and not attributes_of(leaf) for leaf in leaves):
        return make(objective, state, batch, entries)
    given = (dict(state), batch.data)

    def build(tensors: Sequence[Tensor]) -> tuple[list[Tensor], BatchMatrix]:
        following = iter(tensors)
        at, data = map_tensors(lambda _: next(following), given)
        matrix = make(objective, at, dataclasses.replace(batch, data=data), entries)
        return [matrix.loss], matrix

    shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    cast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    key = (make, tuple(entries), str(structure), shapes, cast)
    (loss,), matrix = replays(key, build, tensors_in(given))
    return ReplayedMatrix(matrix, loss, replays) if replays.holds(key) else matrix


class ReplayedMatrix:
    """The matrix of one batch whose products are replayed.

    Args:
        matrix: The matrix that was recorded.
        loss: The batch's mean loss.
        replays: What has recorded it.

    Attributes:
        loss: The batch's mean loss, a scalar tensor without graph.
    """

    def __init__(self, matrix: BatchMatrix, loss: Tensor, replays: Replays):
        self._matrix, self._replays = matrix, replays
        self.loss = loss

    @property
    def operations(self) -> Hashable:
        """A value that differs between matrices whose products are computed by other operations."""
        return self._matrix.operations

    def product(self, direction: State, rows: Sequence[str] | None = None) -> dict[str, Tensor]:
        """The product with a sparse direction: entry name to tensor, for the entries in `rows` (default: all)."""
        if _get_current_dispatch_mode() is not None:
            # Whoever looks at the operations is to see them.
            return self._matrix.product(direction, rows)
        shapes: dict[str, torch.Size] = {}

        def one(*tensors: Tensor) -> Tensor:
            found = self._matrix.product(dict(zip(direction, tensors, strict=True)), rows)
            shapes.update({name: tensor.shape for name, tensor in found.items()})
            # One tensor to copy in place of one an entry.
            return torch.cat([tensors[0].new_zeros(0), *(tensor.flatten() for tensor in found.values())])

        def replayed(tensors: Sequence[Tensor], count: int | None) -> Tensor:
            function = one if count is None else torch.vmap(one)
            key = (self._matrix, tuple(direction), None if rows is None else tuple(rows), count)
            outcome = self._replays(key, lambda given: ([function(*given)], shapes), list(tensors), at_once=True)
            shapes.update(outcome[1])
            return outcome[0][0]

        tensors = direction.values()
        is_mapped = torch._C._are_functorch_transforms_active()
        flat = _Mapped.apply(replayed, *tensors) if is_mapped else replayed(list(tensors), None)
        parts = flat.split([shape.numel() for shape in shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


class _Mapped(torch.autograd.Function):
    """Products that `torch.func.vmap` maps: all at once are one replay, which it need not look into."""

    @staticmethod
    def forward(replayed: Any, *tensors: Tensor) -> Tensor:
        return replayed(tensors, None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple[Tensor, int]:
        replayed, *tensors = inputs
        return replayed(tensors, info.batch_size), 0
