"""The matrix of one batch: what any has, its block diagonal, and its products with many directions."""

import functools
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from lmc_curvature.curvature.products.directions import Directions
from lmc_curvature.curvature.products.vectorization import Vectorizer
from lmc_curvature.objective.batches import Batch
from lmc_curvature.objective.network import State


@runtime_checkable
class BatchMatrix(Protocol):
    """The matrix of one batch, kept ready for products.

    Attributes:
        loss: The batch's mean loss, a scalar tensor without graph.
    """

    loss: Tensor

    @property
    def operations(self) -> Hashable:
        """A value that differs between matrices whose products are computed by other operations."""
        ...

    def product(self, direction: State, rows: Sequence[str] | None = None) -> dict[str, Tensor]:
        """The product with a sparse direction: entry name to tensor, for the entries in `rows` (default: all).

        Entries whose rows are zero in all columns of the direction may be left out.
        """
        ...


class BlockDiagonal:
    """The matrix of one batch without what is between groups of entries.

    Args:
        matrix: The whole matrix.
        groups: Names of the entries of each group.

    Attributes:
        loss: The batch's mean loss, a scalar tensor without graph.
    """

    def __init__(self, matrix: BatchMatrix, groups: Collection[Collection[str]]):
        self._matrix, self._groups = matrix, groups
        self.loss = matrix.loss

    @property
    def operations(self) -> Hashable:
        """A value that differs between matrices whose products are computed by other operations."""
        return self._matrix.operations

    def product(self, direction: State, rows: Sequence[str] | None = None) -> dict[str, Tensor]:
        """The product with a sparse direction, for the entries in `rows` that share a group with one of its entries."""
        product: dict[str, Tensor] = {}
        for group in self._groups:
            part = {name: tensor for name, tensor in direction.items() if name in group}
            if part:
                product |= self._matrix.product(part, [name for name in group if rows is None or name in rows])
        return product


@dataclass(frozen=True)
class BatchProducts:
    """Products of one batch's matrix with many directions.

    Attributes:
        matrix: The matrix.
        batch: The batch.
        vectorizer: Makes several products at once.
    """

    matrix: BatchMatrix
    batch: Batch
    vectorizer: Vectorizer

    def of(
        self, directions: Directions, rows: Sequence[str]
    ) -> Iterator[tuple[slice, dict[str, Float[Tensor, "k n"]]]]:
        """Multiply each direction.

        Args:
            directions: The directions.
            rows: Names of the entries to compute of the products.

        Yields:
            A range of the directions, in order, and for each entry the products with them, as rows; entries that are
            zero in all of them may be left out.
        """
        multiply = functools.partial(self.matrix.product, rows=rows)
        for done, products in self.vectorizer.map(multiply, directions, self._key(directions, rows)):
            count = done.stop - done.start
            yield done, {name: product.reshape(count, -1) for name, product in products.items()}

    def fit_together(self, directions: Directions, rows: Sequence[str]) -> bool:
        """Whether `of` multiplies all of the directions at once, but for the first."""
        multiply = functools.partial(self.matrix.product, rows=rows)
        return self.vectorizer.at_once(multiply, directions, self._key(directions, rows)) >= len(directions)

    def _key(self, directions: Directions, rows: Sequence[str]) -> Hashable:
        """A value that differs between products of another cost, or by other operations."""
        if len(directions) == 1:
            return None
        return (self.batch.kind, self.matrix.operations, directions.entries, tuple(rows))
