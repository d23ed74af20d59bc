"""What all curvature matrices have in common as linear operators: rows, columns, layers, and one pass a product."""

import abc
import copy
import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, overload, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from lmc_curvature.curvature.products.derivatives import all_finite
from lmc_curvature.curvature.products.layout import in_best_layout
from lmc_curvature.curvature.products.vectorization import (
    UnitVectors,
    Vectorizer,
    stacked_units,
    unit_passes,
    units_within,
)
from lmc_curvature.errors import DirectionError, MemoryBudgetError, NonFiniteError, OperatorError
from lmc_curvature.objective.batches import Batch
from lmc_curvature.objective.losses import finite_loss
from lmc_curvature.objective.network import State, check_finite
from lmc_curvature.objective.risk import Objective
from lmc_curvature.segment.partition import LayerPartition, PartitionSpec, layer_indices

# Columns of a dense matrix that are computed in one pass over the loader, at least and at most, and how many numbers
# they may have together.
_COLUMNS = (64, 4096)
_ELEMENTS = 2**24

Share = tuple[Tensor, Tensor]
"""Part of a sum, and what a batch adds to it."""


@runtime_checkable
class BatchMatrix(Protocol):
    """The matrix of one batch, kept ready for products.

    Attributes:
        loss: The batch's mean loss, a scalar tensor without graph.
    """

    loss: Tensor

    @property
    def operations(self) -> Hashable:
        """What tells its products from those of a matrix that is computed by other operations."""
        ...

    def product(self, direction: State, rows: Sequence[str] | None = None) -> dict[str, Tensor]:
        """The product with a sparse direction: entry name to tensor, for the entries in `rows` (default: all)."""
        ...


class CurvatureOperator(abc.ABC):
    """A symmetric matrix of second derivatives over the entries of a state, or a block of it.

    The matrix is a mean over examples, so a product visits the loader once, whatever the number of vectors. Under
    `"interpolate"` the running statistics are among the coordinates.

    Args:
        objective: The loss and its data.
        state: Where to differentiate; the objective's own state by default.
        layers: Restrict rows and columns to a set of layers; None for the whole network.
        partition: How the network is cut into layers; see `LayerPartition.of`.

    Attributes:
        objective: The loss and its data.
        state: Where the matrix is taken, entry name to tensor.
        point: The same, with what else was given and does not move.
        partition: The layers.
        rows: Names of the entries that make up the rows, in the order of the state.
        columns: Likewise of the columns.

    Raises:
        PartitionError: `layers` names an unknown layer.
        DirectionError: The state has an unknown entry or a wrong shape.
        NonFiniteError: The state, a vector, the loss of a batch or a product is not finite; names the entry or batch.
    """

    _name = "curvature matrix"
    # Whether the matrix of a batch is made of torch's own differentiable operations only.
    _vectorizes = True

    def __init__(
        self,
        objective: Objective,
        state: State | None = None,
        *,
        layers: Iterable[str] | str | None = None,
        partition: PartitionSpec = "fused",
    ):
        self.objective = objective
        self.point = {**objective.state(), **objective.place(state or {})}
        check_finite(self.point, "the state")
        self.state = {name: self.point[name] for name in objective.state()}
        self.partition = LayerPartition.of(objective.network, partition, batch_norm=objective.batch_norm)
        self.rows = self.columns = self._entries_of(layers)
        self._layerwise = False
        self._vectorizer = Vectorizer(self.objective.rounding, enabled=self._vectorizes)

    @abc.abstractmethod
    def _on_batch(self, batch: Batch, entries: Sequence[str]) -> BatchMatrix:
        """The matrix of one batch, for directions and rows among some entries."""

    def block(self, rows: Iterable[str] | str, columns: Iterable[str] | str | None = None) -> "CurvatureOperator":
        """The block between two layers, or sets of layers; of one with itself when `columns` is None.

        Raises:
            PartitionError: Names a layer that the partition does not have.
        """
        row_entries = self._entries_of(rows)
        return self._restricted(row_entries, row_entries if columns is None else self._entries_of(columns))

    def block_diagonal(self) -> "CurvatureOperator":
        """The operator of the same shape that keeps the layers' own blocks and drops what is between layers.

        Still exact, and one pass over the loader a product; each vector costs a product for every layer, on one graph.
        """
        operator = self._restricted(self.rows, self.columns)
        operator._layerwise = True
        return operator

    def transposed(self) -> "CurvatureOperator":
        """The block with rows and columns exchanged, which is the transpose: the whole matrix is symmetric."""
        return self._restricted(self.columns, self.rows)

    def _entries_of(self, layers: Iterable[str] | str | None) -> tuple[str, ...]:
        if layers is None:
            return tuple(self.state)
        names = self.partition.names
        held = {entry for index in layer_indices(names, layers) for entry in self.partition.entries(names[index])}
        return tuple(name for name in self.state if name in held)

    def _restricted(self, rows: tuple[str, ...], columns: tuple[str, ...]) -> "CurvatureOperator":
        operator = copy.copy(self)
        operator.rows, operator.columns = rows, columns
        # Products of another part of the matrix have another cost.
        operator._vectorizer = Vectorizer(self.objective.rounding, enabled=self._vectorizes)
        return operator

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of rows and columns."""
        return self._count(self.rows), self._count(self.columns)

    @property
    def device(self) -> torch.device:
        """Where products are computed."""
        return self.objective.device

    def _count(self, entries: Iterable[str]) -> int:
        return sum(map(self._count_of, entries))

    def _count_of(self, entry: str) -> int:
        return self.state[entry].numel()

    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, other: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    def __matmul__(self, other: Any) -> Any:
        """The product with a flat vector (columns,), a matrix (columns, k), or a direction; of the same kind and type.

        Raises:
            DirectionError: The operand has a wrong shape, an unknown entry or a type that cannot move.
        """
        if isinstance(other, Mapping):
            outside = [name for name in other if name not in self.columns]
            if outside:
                raise DirectionError(f"The direction has entries outside the operator's columns: {outside[:5]}.")
            direction = {name: tensor.unsqueeze(0) for name, tensor in self.objective.place(other).items()}
            return self.unflatten(self._products(direction, 1)[0], self.rows)
        if not isinstance(other, Tensor) or other.ndim not in (1, 2) or other.shape[0] != self.shape[1]:
            found = tuple(other.shape) if isinstance(other, Tensor) else type(other).__name__
            raise DirectionError(
                f"Got an operand of shape {found}; expected ({self.shape[1]},) or ({self.shape[1]}, k)."
            )
        if not other.is_floating_point():
            raise DirectionError(f"Got an operand of type {other.dtype}; expected real floating-point numbers.")
        vectors = other.unsqueeze(1) if other.ndim == 1 else other
        return self.matmat(vectors).reshape(self.shape[0], *other.shape[1:]).to(other.device, other.dtype)

    def matmat(self, matrix: Float[Tensor, "columns k"]) -> Float[Tensor, "rows k"]:
        """The product with k vectors in one pass over the loader; float64, on the objective's device.

        Raises:
            NonFiniteError: A vector, the loss of a batch or a product is not finite.
        """
        if matrix.shape[1] == 0:
            return torch.zeros(self.shape[0], 0, dtype=torch.float64, device=self.device)
        return self._products(self.unflatten(matrix.T), matrix.shape[1]).T

    def _products(self, directions: State, count: int) -> Float[Tensor, "k rows"]:
        """The product with each of k directions, which are stacked along a first axis, as a row."""
        _check_finite_vectors(directions)
        total = torch.zeros(count, self.shape[0], dtype=torch.float64, device=self.device)
        rows = self._places(self.rows)

        def stacked(start: int, stop: int) -> dict[str, Tensor]:
            return {name: tensor[start:stop] for name, tensor in directions.items()}

        def multiply(matrix: BatchMatrix, batch: Batch) -> Iterator[Share]:
            key = self._key(matrix, batch, *directions) if count > 1 else ()
            for done, products in self._multiplied(matrix, rows, stacked, count, key):
                for name, found in products.items():
                    yield total[done, rows[name]], found

        return self._mean(total, self._add_up(multiply))

    def _add_up(self, compute: Callable[[BatchMatrix, Batch], Iterable[Share]]) -> int:
        """Sum over examples, in one pass over the loader.

        Args:
            compute: From the matrix of a batch, and the batch: parts of sums, and what to add to each.

        Returns:
            The number of examples.
        """
        entries = [name for name in self.state if name in {*self.rows, *self.columns}]

        def compute_on(batch: Batch) -> tuple[Tensor, list[Share]]:
            matrix = self._on_batch(batch, entries)
            finite_loss(matrix.loss, batch)
            return matrix.loss, list(compute(matrix, batch))

        examples = 0
        with self.objective.one_pass() as batches:
            for batch in batches:
                for part, values in self._lay_out(batch, compute_on):
                    part.add_(values, alpha=batch.size)
                examples += batch.size
        return examples

    def _mean(self, total: Float[Tensor, "*n"], examples: int) -> Float[Tensor, "*n"]:
        """What `_add_up` has summed, a mean over examples."""
        if not all_finite(total):
            raise NonFiniteError(
                f"The {self._name} has products that are not finite, although loss and vectors are. Does the network "
                "compute something without a second derivative (a square root at zero), or forget values that it "
                "computes again (torch.utils.checkpoint)?"
            )
        return total.div_(examples)

    def _lay_out(self, batch: Batch, compute: Callable[[Batch], tuple[Tensor, list[Share]]]) -> list[Share]:
        return in_best_layout(self.objective, self.point, batch, compute)

    def _multiplied(
        self,
        matrix: BatchMatrix,
        rows: Iterable[str],
        directions: Callable[[int, int], State],
        count: int,
        key: Hashable,
    ) -> Iterator[tuple[slice, dict[str, Float[Tensor, "k n"]]]]:
        """The product of one batch's matrix with each of some directions.

        Args:
            matrix: The matrix of the batch.
            rows: Names of the entries that are wanted.
            directions: See `Vectorizer.map`.
            count: Likewise.
            key: Likewise.

        Yields:
            Of which directions, in order, and for each entry the products with them as rows.
        """
        multiply = functools.partial(self._multiply, matrix, rows=rows)
        start = 0
        for products in self._vectorizer.map(multiply, directions, count, key):
            stop = start + len(next(iter(products.values()), range(count)))
            yield slice(start, stop), {name: found.reshape(stop - start, -1) for name, found in products.items()}
            start = stop

    def _multiply(self, matrix: BatchMatrix, direction: State, rows: Iterable[str]) -> dict[str, Tensor]:
        """The product of one batch's matrix with one direction, for some rows; those without an entry are zero."""
        product: dict[str, Tensor] = {}
        for part_rows, columns in self._parts():
            wanted = [name for name in part_rows if name in rows]
            part = {name: direction[name] for name in columns if name in direction}
            if wanted and part:
                product |= matrix.product(part, wanted)
        return product

    def _places(self, entries: Iterable[str]) -> dict[str, slice]:
        """Where each of some entries stands in a vector of all of them."""
        places, start = {}, 0
        for name in entries:
            places[name] = slice(start, start := start + self._count_of(name))
        return places

    def _parts(self) -> Iterator[tuple[list[str] | tuple[str, ...], list[str] | tuple[str, ...]]]:
        """Rows and columns of the parts that are not dropped."""
        if not self._layerwise:
            yield self.rows, self.columns
            return
        for members in self.partition.groups.values():
            rows, columns = ([name for name in members if name in side] for side in (self.rows, self.columns))
            if rows and columns:
                yield rows, columns

    def flatten(self, state: State) -> Float[Tensor, " n"]:
        """The entries of a state, in its order, as one vector."""
        return torch.cat([tensor.flatten() for tensor in state.values()])

    def unflatten(self, vector: Float[Tensor, "*k n"], entries: Sequence[str] | None = None) -> dict[str, Tensor]:
        """A vector as a direction over the operator's columns (or over `entries`), on the objective's device.

        Of several vectors, as rows, the directions are stacked along a first axis.
        """
        entries = self.columns if entries is None else entries
        vector = vector.to(self.device, self.objective.dtype).contiguous()
        parts = torch.split(vector, [self.state[name].numel() for name in entries], dim=-1)
        leading = vector.shape[:-1]
        return {name: part.view((*leading, *self.state[name].shape)) for name, part in zip(entries, parts, strict=True)}

    def to_dense(self, *, max_gib: float = 4.0) -> Float[Tensor, "rows columns"]:
        """The dense matrix, float64, on the objective's device; one pass over the loader per 64 to 4,096 columns.

        Many columns are computed at once where calls cost more than arithmetic; see `Vectorizer`.

        Raises:
            MemoryBudgetError: It would need more than `max_gib` GiB.
            NonFiniteError: The loss of a batch or an entry is not finite.
        """
        rows, columns = self.shape
        gib = rows * columns * 8 / 2**30
        if gib > max_gib:
            raise MemoryBudgetError(
                f"A dense {rows} × {columns} {self._name} takes {gib:.3g} GiB, more than max_gib={max_gib:g}. Use "
                "products (H @ v, H.to_scipy()), a layer's block (H.block(layer)), or raise max_gib."
            )
        # Columns are computed one after the other, so they are what lies together in memory.
        transposed = torch.zeros(columns, rows, dtype=torch.float64, device=self.device)
        row_places, column_places = self._places(self.rows), self._places(self.columns)
        symmetric = self.rows == self.columns
        # Of a symmetric matrix half is enough: each product for the entries that come no earlier, so that the largest
        # entries, which have the most products, need least of each.
        order = sorted(self.columns, key=self._count_of) if symmetric else self.columns
        later = {name: order[number:] if symmetric else self.rows for number, name in enumerate(order)}

        def multiply(matrix: BatchMatrix, batch: Batch, passed: Sequence[UnitVectors]) -> Iterator[Share]:
            for group in self._groups(matrix, batch, passed, later):
                directions, count = functools.partial(stacked_units, group), sum(map(len, group))
                key = self._key(matrix, batch, *(units.entry for units in group))
                found = self._multiplied(matrix, later[group[0].entry], directions, count, key)
                for done, products in found:
                    for units, vectors, coordinates in units_within(group, done.start, done.stop):
                        start = column_places[units.entry].start
                        columns = transposed[start + coordinates.start : start + coordinates.stop]
                        for name in later[units.entry]:
                            if name in products:
                                yield columns[:, row_places[name]], products[name][vectors]

        examples = 1
        for passed in self._unit_passes(order, rows):
            examples = self._add_up(functools.partial(multiply, passed=passed))
        if symmetric:
            for name in order:
                for other in later[name][1:]:
                    here, there = row_places[name], row_places[other]
                    transposed[there, here] = transposed[here, there].T
        return self._mean(transposed, examples).T

    def diagonal(self) -> Float[Tensor, " n"]:
        """The diagonal, exactly: one product for each coordinate, one pass over the loader per 4,096; float64.

        Raises:
            OperatorError: Rows and columns are of different layers.
            NonFiniteError: The loss of a batch or an entry is not finite.
        """
        if self.rows != self.columns:
            raise OperatorError(
                "A block between two layers has no diagonal: expected the same layers along rows and columns, as in "
                "H.block(layer)."
            )
        total = torch.zeros(self.shape[0], dtype=torch.float64, device=self.device)
        places = self._places(self.columns)

        def read_off(matrix: BatchMatrix, batch: Batch, passed: Sequence[UnitVectors]) -> Iterator[Share]:
            for units in passed:
                multiply = functools.partial(matrix.product, rows=[units.entry])
                key, number = self._key(matrix, batch, "diagonal", units.entry), units.start
                for products in self._vectorizer.map(multiply, units.stacked, len(units), key):
                    rows = products[units.entry].reshape(-1, units.tensor.numel())
                    start = places[units.entry].start + number
                    # A copy, so that only one of them is kept.
                    yield total[start : start + len(rows)], rows.diagonal(number).clone()
                    number += len(rows)

        examples = 1
        for passed in self._unit_passes(self.columns, 1):
            examples = self._add_up(functools.partial(read_off, passed=passed))
        return self._mean(total, examples)

    def _groups(
        self, matrix: BatchMatrix, batch: Batch, passed: Sequence[UnitVectors], rows: Mapping[str, Sequence[str]]
    ) -> Iterable[Sequence[UnitVectors]]:
        """Entries whose products are made together: all of a pass where they fit, else each for itself.

        An entry for itself takes less of the graph, and needs fewer rows.
        """
        if len(passed) == 1:
            return [passed]
        multiply = functools.partial(self._multiply, matrix, rows=rows[passed[0].entry])
        key = self._key(matrix, batch, *(units.entry for units in passed))
        fitting = self._vectorizer.at_once(multiply, functools.partial(stacked_units, passed), key)
        return [passed] if fitting >= sum(map(len, passed)) else [[units] for units in passed]

    def _key(self, matrix: BatchMatrix, batch: Batch, *names: str) -> Hashable:
        """What tells products apart that cost something else, or are made of other operations."""
        return (batch.kind, matrix.operations, *names)

    def _unit_passes(self, entries: Iterable[str], rows: int) -> Iterator[list[UnitVectors]]:
        """The unit vectors of some entries, as many at a time as share a pass over the loader."""
        least, most = _COLUMNS
        return unit_passes(
            {name: self.state[name] for name in entries}, max(least, min(most, _ELEMENTS // max(rows, 1)))
        )

    def to_scipy(self) -> LinearOperator:
        """The same operator for SciPy: NumPy in and out, float64, computed on the objective's device."""
        return _ScipyOperator(self)


def _check_finite_vectors(directions: State) -> None:
    """Refuse vectors with values that are not finite.

    Raises:
        NonFiniteError: Names the entry.
    """
    # One question to the device for all of them; which entry it is matters only when the answer is no.
    parts = [torch.isfinite(tensor).all() for tensor in directions.values()]
    if parts and not bool(torch.stack(parts).all()):
        check_finite(directions, "the vector")


class _ScipyOperator(LinearOperator):
    def __init__(self, operator: CurvatureOperator):
        super().__init__(np.dtype(np.float64), operator.shape)
        self._operator = operator

    def _matmat(self, X: np.ndarray) -> np.ndarray:
        return self._operator.matmat(torch.from_numpy(np.ascontiguousarray(X))).cpu().numpy()

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return self._matmat(x.reshape(-1, 1))[:, 0]

    def _rmatmat(self, X: np.ndarray) -> np.ndarray:
        return _ScipyOperator(self._operator.transposed())._matmat(X)

    def _rmatvec(self, x: np.ndarray) -> np.ndarray:
        return _ScipyOperator(self._operator.transposed())._matvec(x)
