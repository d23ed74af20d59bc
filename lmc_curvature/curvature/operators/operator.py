"""A curvature matrix over the data as a linear operator: rows, columns, blocks, and one pass a product."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from jaxtyping import Float, Float64
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from lmc_curvature.agreement import all_near
from lmc_curvature.curvature.operators.dense import add_columns, add_diagonal
from lmc_curvature.curvature.operators.scipy import ScipyOperator
from lmc_curvature.curvature.products import (
    BatchMatrix,
    BatchProducts,
    BlockDiagonal,
    ReplayedMatrix,
    StackedDirections,
    Vectorizer,
    places_of,
    replayed_matrix,
)
from lmc_curvature.curvature.products.derivatives import all_finite
from lmc_curvature.errors import DirectionError, NonFiniteError, OperatorError, check_flags, check_memory
from lmc_curvature.objective.batches import Batch, to_device
from lmc_curvature.objective.losses import finite_loss
from lmc_curvature.objective.network import State, check_finite, copies_of, flattened
from lmc_curvature.objective.numerics import outside_inference
from lmc_curvature.objective.risk import Objective
from lmc_curvature.plotting.summary import Display, Summary, some
from lmc_curvature.segment.partition import LayerPartition, PartitionSpec, layer_indices


@dataclasses.dataclass(frozen=True)
class Curvature:
    """A kind of curvature matrix.

    Attributes:
        name: Its name in messages.
        of_batch: `of_batch(objective, state, batch, entries)` makes the matrix of one batch at a state, for directions
            and rows among some entries.
        native: Whether the matrix is computed here, by torch's own differentiable operations: images are then laid out
            as the device convolves them fastest, and several products are made at once. Another library gets the
            batch as it is, and makes its products one by one.
    """

    name: str
    of_batch: Callable[[Objective, State, Batch, Sequence[str]], BatchMatrix]
    native: bool = True

    def block_diagonal(self, groups: Collection[Collection[str]]) -> "Curvature":
        """A kind of matrix that is zero between groups of entries, and this one within them."""

        def of_batch(objective: Objective, state: State, batch: Batch, entries: Sequence[str]) -> BatchMatrix:
            return BlockDiagonal(self.of_batch(objective, state, batch, entries), groups)

        return dataclasses.replace(self, of_batch=of_batch)


class CurvatureOperator(Display):
    """A symmetric matrix of second derivatives over the entries of a state, or a block of it.

    The matrix is a mean over examples. A product visits the loader once, whatever the number of vectors: on each batch
    they share the graph of its derivatives.

    Args:
        curvature: The kind of matrix.
        objective: The loss and its data.
        state: Where to differentiate; the objective's own state by default.
        layers: A layer, or a set of layers, along the rows; None for the whole network.
        columns: A layer, or a set of layers, along the columns; None for those along the rows.
        partition: How the network is cut into layers; see `LayerPartition.of`.
        statistics: Whether the running statistics, which a segment moves under `"interpolate"`, are coordinates, too.
            Other tools differentiate in parameters alone.

    Attributes:
        curvature: The kind of matrix.
        objective: The loss and its data.
        state: Where the matrix is taken, entry name to tensor.
        point: The same, with what else was given and does not move.
        partition: The layers.
        rows: Names of the entries that make up the rows, in the order of the state.
        columns: Names of the entries that make up the columns.
        shape: Numbers of rows and columns.
        device: The device that products are computed on.

    Raises:
        PartitionError: `layers` or `columns` names an unknown layer.
        DirectionError: The state has an unknown entry or a wrong shape.
        NonFiniteError: The state, a vector, the loss of a batch or a product is not finite; names the entry or batch.
    """

    @outside_inference()
    def __init__(
        self,
        curvature: Curvature,
        objective: Objective,
        state: State | None = None,
        *,
        layers: Iterable[str] | str | None = None,
        columns: Iterable[str] | str | None = None,
        partition: PartitionSpec = "fused",
        statistics: bool = True,
    ):
        check_flags(statistics=statistics)
        self.curvature, self._statistics = curvature, statistics
        self.objective = objective
        self.device = objective.device
        self.point = {**objective.snapshot, **copies_of(objective.place(state or {}))}
        check_finite(self.point, "the state")
        self.state = {name: self.point[name] for name in objective.snapshot}
        self.partition = LayerPartition.of(objective.network, partition, batch_norm=objective.batch_norm)
        self._row_layers = self._names_of(layers)
        self._column_layers = self._row_layers if columns is None else self._names_of(columns)
        self.rows, self.columns = self._entries_of(self._row_layers), self._entries_of(self._column_layers)
        self.shape = (self._count(self.rows), self._count(self.columns))
        self._vectorizer = Vectorizer(objective.rounding, elements=None if curvature.native else 0)

    def _summary(self) -> Summary:
        rows, columns = self.shape
        layers = {"layers": some(self._row_layers)}
        if self._row_layers != self._column_layers:
            layers = {"rows of": some(self._row_layers), "columns of": some(self._column_layers)}
        objective = self.objective._summary()
        return Summary(
            f"{type(self).__name__} of shape {rows:,} × {columns:,}: {self.curvature.name}",
            {**layers, "objective": objective.title.removeprefix("Objective: "), **objective.facts},
            "H @ v, H.matmat(V), H.block(layer), H.to_dense(), H.diagonal(), H.to_scipy()",
        )

    def _names_of(self, layers: Iterable[str] | str | None) -> tuple[str, ...]:
        names = self.partition.names
        return tuple(names[index] for index in layer_indices(self.partition.groups, layers))

    def _entries_of(self, layers: Iterable[str]) -> tuple[str, ...]:
        held = {entry for layer in layers for entry in self.partition.entries(layer)}
        named = dict(self.objective.network.named_parameters())
        return tuple(name for name in self.state if name in held and (self._statistics or name in named))

    def _tensors(self, entries: Iterable[str]) -> dict[str, Tensor]:
        return {name: self.state[name] for name in entries}

    def _count(self, entries: Iterable[str]) -> int:
        return sum(self.state[name].numel() for name in entries)

    def block(self, rows: Iterable[str] | str, columns: Iterable[str] | str | None = None) -> "CurvatureOperator":
        """The block between two layers, or sets of layers; of one with itself when `columns` is None.

        Raises:
            PartitionError: Names a layer that the partition does not have.
        """
        return self._block_of(self.curvature, rows, columns)

    def block_diagonal(self) -> "CurvatureOperator":
        """The operator of the same shape that keeps the layers' own blocks and drops what is between layers.

        Still exact, and one pass over the loader a product; each vector costs a product for every layer, on one graph.
        """
        groups = tuple(self.partition.groups.values())
        return self._block_of(self.curvature.block_diagonal(groups), self._row_layers, self._column_layers)

    def transposed(self) -> "CurvatureOperator":
        """The block with rows and columns exchanged, which is the transpose: the whole matrix is symmetric."""
        return self._block_of(self.curvature, self._column_layers, self._row_layers)

    def _block_of(
        self, curvature: Curvature, rows: Iterable[str] | str, columns: Iterable[str] | str | None
    ) -> "CurvatureOperator":
        shared = {"partition": self.partition, "statistics": self._statistics}
        return CurvatureOperator(curvature, self.objective, self.point, layers=rows, columns=columns, **shared)

    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, other: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    @outside_inference()
    def __matmul__(self, other: Any) -> Any:
        """The product with a flat vector (columns,), a matrix (columns, k), or a direction; of the same kind and type.

        Raises:
            DirectionError: The operand has a wrong shape, an unknown entry or a type that cannot move.
        """
        if isinstance(other, Mapping):
            placed = self.objective.place(other)
            outside = [name for name in placed if name not in self.columns]
            if outside:
                raise DirectionError(f"The direction has entries outside the operator's columns: {outside[:5]}.")
            direction = {name: tensor.unsqueeze(0) for name, tensor in placed.items()}
            return self.unflatten(self._products(direction, 1)[0], self.rows)
        if not isinstance(other, Tensor) or other.ndim not in (1, 2) or other.shape[0] != self.shape[1]:
            found = f"shape {tuple(other.shape)}" if isinstance(other, Tensor) else f"type {type(other).__name__}"
            raise DirectionError(
                f"Got an operand of {found}; expected a tensor of shape ({self.shape[1]},) or ({self.shape[1]}, k)."
            )
        if not other.is_floating_point():
            raise DirectionError(f"Got an operand of type {other.dtype}; expected real floating-point numbers.")
        vectors = other.unsqueeze(1) if other.ndim == 1 else other
        return self.matmat(vectors).reshape(self.shape[0], *other.shape[1:]).to(other.device, other.dtype)

    @outside_inference()
    def matmat(self, matrix: Float[Tensor, "columns k"]) -> Float64[Tensor, "rows k"]:
        """The product with k vectors in one pass over the loader; float64, on the objective's device.

        Raises:
            NonFiniteError: A vector, the loss of a batch or a product is not finite.
        """
        return self._products(self.unflatten(matrix.T), matrix.shape[1]).T

    def _products(self, directions: State, count: int) -> Float64[Tensor, "k rows"]:
        """The product with each of k directions, which are stacked along a first axis, as a row."""
        check_finite(directions, "the vector")
        total = torch.zeros(count, self.shape[0], dtype=torch.float64, device=self.device)
        if not directions or not count:
            return total
        places = places_of(self._tensors(self.rows))

        def add(products: BatchProducts) -> None:
            for done, found in products.of(StackedDirections(directions), self.rows):
                for name, rows in found.items():
                    total[done, places[name]].add_(rows, alpha=products.batch.weight)

        return self._mean_of(total, self._visit(add, replay=True))

    def check_derivatives(self, batch: Batch) -> None:
        """Before the first derivative is taken, compare those in rows and columns with differences of the loss.

        Both alone, too: a loss may depend on one layer so little that beside another one nothing is seen of it.

        Raises:
            UnsupportedModelError: They disagree.
        """
        for entries in dict.fromkeys((self.rows, self.columns, (*self.rows, *self.columns))):
            self.objective.check_derivatives(self.point, batch, set(entries))

    def _visit(
        self, add: Callable[[BatchProducts], None], *, replay: bool = False, progress: bool | None = False
    ) -> float:
        """Visit the loader once, and call `add` with the products of each batch; returns the sum of their weights.

        If asked to, matrices are replayed where a device can.
        """
        entries = [name for name in self.state if name in {*self.rows, *self.columns}]
        weight = 0.0
        with self.objective.one_pass(progress=progress, description=self.curvature.name) as batches:
            for batch in batches:
                data = self.objective.laid_out(batch) if self.curvature.native else batch
                self.check_derivatives(batch)
                matrix = self._replayed(data, entries) if replay and self.curvature.native else None
                if matrix is None:
                    matrix = self.curvature.of_batch(self.objective, self.point, data, entries)
                finite_loss(matrix.loss, batch)
                add(BatchProducts(matrix, batch, self._vectorizer))
                weight += batch.weight
        return weight

    def _replayed(self, batch: Batch, entries: Sequence[str]) -> BatchMatrix | None:
        """The matrix of a batch, replayed where one of its kind was recorded; None if the network has changed since."""
        objective = self.objective
        matrix = replayed_matrix(self.curvature.of_batch, objective, self.point, batch, entries)
        if isinstance(matrix, ReplayedMatrix) and batch.is_first:
            with objective.numerics.differentiating(), torch.no_grad():
                loss = objective.batch_loss(self.point, batch)
            if not all_near("replayed derivatives", matrix.loss, loss, rounding=objective.rounding):
                objective.replays.forget()
                return None
        return matrix

    def _mean_of(self, total: Float64[Tensor, "*n"], weight: float) -> Float64[Tensor, "*n"]:
        """A sum over a rank's batches, replaced by that over all of them and divided by the sum of their weights."""
        with self.objective.ranks.together():
            weight = self.objective.ranks.total(weight, total)
        if not all_finite(total):
            raise NonFiniteError(
                f"The {self.curvature.name} has products that are not finite, although loss and vectors are. Does the "
                "network compute something without a second derivative (a square root at zero), or forget values that "
                "it computes again (torch.utils.checkpoint)?"
            )
        return total.div_(weight)

    def flatten(self, state: State) -> Float[Tensor, " n"]:
        """A state of the entries along the columns, or along the rows, as one vector in their order."""
        return flattened(state, self._tensors(self.rows if state.keys() == {*self.rows} else self.columns))

    def unflatten(self, vector: Float[Tensor, "*k n"], entries: Sequence[str] | None = None) -> dict[str, Tensor]:
        """A vector as a direction over the operator's columns (or over `entries`), on the objective's device.

        Of several vectors, as rows, the directions are stacked along a first axis.
        """
        entries = self.columns if entries is None else entries
        vector = to_device(vector, self.device, self.objective.dtype).contiguous()
        parts = torch.split(vector, [self.state[name].numel() for name in entries], dim=-1)
        leading = vector.shape[:-1]
        return {name: part.view((*leading, *self.state[name].shape)) for name, part in zip(entries, parts, strict=True)}

    @outside_inference()
    def to_dense(self, *, memory_gib: float = 4.0, progress: bool | None = None) -> Float64[Tensor, "rows columns"]:
        """The dense matrix, float64, on the objective's device; one pass over the loader per 64 to 4,096 columns.

        Many columns are computed at once where calls cost more than arithmetic; see `Vectorizer`.

        Args:
            memory_gib: The largest matrix to make, in GiB.
            progress: Show a progress bar over the batches of each pass; by default on a terminal and in notebooks.

        Raises:
            MemoryBudgetError: The matrix would need more than `memory_gib`.
            NonFiniteError: The loss of a batch or an entry is not finite.
        """
        rows, columns = self.shape
        check_memory(
            rows * columns * 8 / 2**30,
            memory_gib,
            f"A dense {rows} × {columns} {self.curvature.name}",
            "use products (H @ v, H.to_scipy()), a layer's block (H.block(layer)), or raise memory_gib.",
        )
        transposed = torch.zeros(columns, rows, dtype=torch.float64, device=self.device)
        visit = functools.partial(self._visit, progress=progress)
        weight = add_columns(transposed, self._tensors(self.rows), self._tensors(self.columns), visit)
        return self._mean_of(transposed, weight).T

    @outside_inference()
    def diagonal(self, *, progress: bool | None = None) -> Float64[Tensor, " n"]:
        """The diagonal, exactly: one product for each coordinate, one pass over the loader per 4,096; float64.

        Args:
            progress: Show a progress bar over the batches of each pass; by default on a terminal and in notebooks.

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
        visit = functools.partial(self._visit, progress=progress)
        return self._mean_of(total, add_diagonal(total, self._tensors(self.rows), visit))

    def to_scipy(self) -> LinearOperator:
        """The same operator for SciPy: NumPy in and out, float64, computed on the objective's device."""
        return ScipyOperator(self.shape, self.matmat, self.transposed().matmat)
