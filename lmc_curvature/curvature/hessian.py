"""Exact Hessian-vector products of an objective, and the Hessian as a linear operator."""

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from lmc_curvature.batches import Batch
from lmc_curvature.errors import DirectionError, HessianSizeError, UnsupportedModelError
from lmc_curvature.layers import LayerPartition, PartitionSpec, layer_indices
from lmc_curvature.losses import check_differentiable, finite_loss
from lmc_curvature.network import State, as_leaves, check_finite, graph_nodes
from lmc_curvature.objective import Objective

# Columns of a dense Hessian that are computed in one pass over the loader.
_CHUNK = 64


class BatchGradient:
    """Loss and gradient of one batch, kept as a graph, so that each Hessian product costs one backward pass.

    Reverse over reverse: H v = ∇⟨∇L, v⟩ (Pearlmutter 1994). The first two passes are shared by all vectors of the
    batch, and sparse vectors cost only the part of the graph they touch; `benchmarks/hvp.py` compares this with
    forward over reverse.

    Args:
        objective: The loss.
        state: Where to differentiate, on the objective's device.
        batch: The examples.
        entries: Entries to differentiate in; by default all of the state.

    Attributes:
        loss: The batch's mean loss, a scalar tensor without graph.

    Raises:
        LossError: The loss does not depend on the state.
        UnsupportedModelError: An operation has no second derivative; `product` raises it, too.
    """

    def __init__(self, objective: Objective, state: State, batch: Batch, entries: Iterable[str] | None = None):
        names = list(state) if entries is None else list(entries)
        self._leaves = as_leaves({name: state[name] for name in names})
        with objective.differentiating():
            loss = objective.batch_loss({**state, **self._leaves}, batch)
            if len(names) >= len(objective.state()):
                check_differentiable(loss)
            self._gradient = self._differentiate(loss)
        self.loss = loss.detach()

    def _differentiate(self, loss: Float[Tensor, ""]) -> dict[str, Tensor]:
        # A few entries may well have no part in the loss.
        if not loss.requires_grad:
            return {name: torch.zeros_like(leaf) for name, leaf in self._leaves.items()}
        with _naming_what_has_no_derivative():
            gradients = torch.autograd.grad(
                loss, list(self._leaves.values()), create_graph=True, allow_unused=True, materialize_grads=True
            )
        return dict(zip(self._leaves, gradients, strict=True))

    def check_twice_differentiable(self) -> None:
        """Refuse a gradient whose own derivative torch would leave out without a word.

        Raises:
            UnsupportedModelError: An operation's backward pass is marked once-differentiable.
        """
        # The mark cuts the graph, so a second derivative through it is silently zero.
        if any(type(node).__name__ == "Error" for node in graph_nodes(self._gradient.values())):
            raise UnsupportedModelError(
                "The loss cannot be differentiated twice: an operation's backward pass is marked once_differentiable "
                "(a custom autograd.Function, often around a kernel of its own). Replace that operation."
            )

    def slope(self, direction: State) -> Float[Tensor, ""]:
        """⟨∇L, v⟩ for a direction v."""
        return inner({name: tensor.detach() for name, tensor in self._gradient.items()}, direction)

    def product(self, direction: State, rows: Sequence[str] | None = None) -> dict[str, Tensor]:
        """H v for a sparse direction v: entry name to tensor, for the entries in `rows` (default: all)."""
        rows = list(self._leaves) if rows is None else list(rows)
        # A gradient that does not depend on the state (a linear loss, an unused entry) has no graph.
        columns = [name for name in direction if self._gradient[name].requires_grad]
        if not columns:
            return {name: torch.zeros_like(self._leaves[name]) for name in rows}
        with _naming_what_has_no_derivative():
            products = torch.autograd.grad(
                [self._gradient[name] for name in columns],
                [self._leaves[name] for name in rows],
                [direction[name] for name in columns],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        return dict(zip(rows, products, strict=True))


def inner(a: State, b: State) -> Float[Tensor, ""]:
    """⟨a, b⟩ over the entries of `b`, which `a` must have."""
    products = [torch.dot(_precise(a[name]), _precise(tensor)) for name, tensor in b.items()]
    return torch.stack(products).sum()


def _precise(tensor: Tensor) -> Float[Tensor, " n"]:
    """The values as a vector, half-precision ones as float32: a sum of many does not fit into half a number."""
    return tensor.flatten().to(torch.promote_types(tensor.dtype, torch.float32))


@contextlib.contextmanager
def _naming_what_has_no_derivative() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"The loss cannot be differentiated twice: {error} Replace that operation, or switch off what hides it "
            "(torch.compile, checkpointing, sparse gradients)."
        ) from error


class HessianOperator:
    """The Hessian of an objective, or a block of it, as a linear operator.

        H[i, j] = ∂²L(θ) / ∂θ_i ∂θ_j

    A product visits the loader once, whatever the number of vectors. Under `"interpolate"` the running statistics
    are among the coordinates.

    Example:
        >>> H = HessianOperator(objective)                      # doctest: +SKIP
        >>> H.shape                                             # (n, n)
        >>> H @ torch.randn(H.shape[1])                         # a vector: shape (n,)
        >>> H @ torch.randn(H.shape[1], 5)                      # five at once: shape (n, 5), one pass over the data
        >>> H @ segment.directions()["fc"]                      # a direction: a state
        >>> H.block("fc").to_dense()                            # a layer's own Hessian
        >>> H.block("conv1", "fc").shape                        # rows of one layer, columns of another
        >>> scipy.sparse.linalg.eigsh(H.to_scipy(), k=3)        # extreme eigenpairs

    Args:
        objective: The loss and its data.
        state: Where to differentiate; the objective's own state by default.
        layers: Restrict rows and columns to a set of layers; None for the whole network.
        partition: How the network is cut into layers; see `LayerPartition.of`.

    Raises:
        UnknownLayerError: `layers` names an unknown layer.
        DirectionError: The state has an unknown entry or a wrong shape.
        NonFiniteError: The state, a vector or the loss of a batch is not finite; names the entry or the batch.
    """

    def __init__(
        self,
        objective: Objective,
        state: State | None = None,
        *,
        layers: Iterable[str] | str | None = None,
        partition: PartitionSpec = "fused",
    ):
        self.objective = objective
        self._point = {**objective.state(), **objective.place(state or {})}
        check_finite(self._point, "the state")
        self.state = {name: self._point[name] for name in objective.state()}
        self.partition = LayerPartition.of(objective.network, partition, batch_norm=objective.batch_norm)
        self.rows = self.columns = self._entries_of(layers)

    def _entries_of(self, layers: Iterable[str] | str | None) -> tuple[str, ...]:
        if layers is None:
            return tuple(self.state)
        names = self.partition.names
        held = {entry for index in layer_indices(names, layers) for entry in self.partition.entries(names[index])}
        return tuple(name for name in self.state if name in held)

    def block(self, rows: Iterable[str] | str, columns: Iterable[str] | str | None = None) -> "HessianOperator":
        """The block of H between two layers, or sets of layers; of one with itself when `columns` is None."""
        row_entries = self._entries_of(rows)
        return self._restricted(row_entries, row_entries if columns is None else self._entries_of(columns))

    def _restricted(self, rows: tuple[str, ...], columns: tuple[str, ...]) -> "HessianOperator":
        operator = copy.copy(self)
        operator.rows, operator.columns = rows, columns
        return operator

    def transposed(self) -> "HessianOperator":
        """The block with rows and columns exchanged, which is the transpose: the Hessian is symmetric."""
        return self._restricted(self.columns, self.rows)

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of rows and columns."""
        return self._count(self.rows), self._count(self.columns)

    def _count(self, entries: Sequence[str]) -> int:
        return sum(self.state[name].numel() for name in entries)

    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, other: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    def __matmul__(self, other: Any) -> Any:
        """H v for a flat vector (columns,), a matrix (columns, k), or a direction; of the same kind and type.

        Raises:
            DirectionError: The operand has a wrong shape, an unknown entry or a type that cannot move.
        """
        if isinstance(other, Mapping):
            outside = [name for name in other if name not in self.columns]
            if outside:
                raise DirectionError(f"The direction has entries outside the operator's columns: {outside[:5]}.")
            product = self._products([self.objective.place(other)])[0]
            return {name: tensor.to(self.objective.dtype) for name, tensor in product.items()}
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
        """H V for k vectors in one pass over the loader; float64."""
        if matrix.shape[1] == 0:
            return torch.zeros(self.shape[0], 0, dtype=torch.float64, device=self.objective.device)
        directions = [self.unflatten(vector, self.columns) for vector in matrix.T]
        return torch.stack([self.flatten(product) for product in self._products(directions)], dim=1)

    def _products(self, directions: Sequence[State]) -> list[dict[str, Tensor]]:
        """H v for each direction, summed in float64 over one pass."""
        for direction in directions:
            check_finite(direction, "the vector")
        totals = [
            {name: torch.zeros_like(self.state[name], dtype=torch.float64) for name in self.rows} for _ in directions
        ]
        entries = [name for name in self.state if name in {*self.rows, *self.columns}]
        examples = 0
        with self.objective.one_pass() as batches:
            for batch in batches:
                gradient = BatchGradient(self.objective, self._point, batch, entries)
                if batch.index == 0:
                    gradient.check_twice_differentiable()
                finite_loss(gradient.loss, batch)
                for direction, total in zip(directions, totals, strict=True):
                    for name, product in gradient.product(direction, self.rows).items():
                        total[name].add_(product, alpha=batch.size)
                examples += batch.size
        return [{name: tensor / examples for name, tensor in total.items()} for total in totals]

    def flatten(self, state: State) -> Float[Tensor, " n"]:
        """The entries of a state, in its order, as one vector."""
        return torch.cat([tensor.flatten() for tensor in state.values()])

    def unflatten(self, vector: Float[Tensor, " n"], entries: Sequence[str] | None = None) -> dict[str, Tensor]:
        """A vector as a direction over the operator's columns (or over `entries`), on the objective's device."""
        entries = self.columns if entries is None else entries
        vector = vector.to(self.objective.device, self.objective.dtype)
        parts = torch.split(vector, [self.state[name].numel() for name in entries])
        return {name: part.view_as(self.state[name]) for name, part in zip(entries, parts, strict=True)}

    def to_dense(self, *, max_gib: float = 4.0) -> Float[Tensor, "rows columns"]:
        """The dense matrix, float64, on the objective's device; one pass over the loader per 64 columns.

        Raises:
            HessianSizeError: It would need more than `max_gib` GiB.
        """
        rows, columns = self.shape
        gib = rows * columns * 8 / 2**30
        if gib > max_gib:
            raise HessianSizeError(
                f"A dense {rows} × {columns} Hessian takes {gib:.1f} GiB, more than max_gib={max_gib:g}. Use products "
                "(H @ v, H.to_scipy()), a layer's block (H.block(layer)), or raise max_gib."
            )
        dense = torch.empty(rows, columns, dtype=torch.float64, device=self.objective.device)
        for start in range(0, columns, _CHUNK):
            stop = min(start + _CHUNK, columns)
            unit = torch.zeros(columns, stop - start, dtype=self.objective.dtype, device=self.objective.device)
            unit[torch.arange(start, stop), torch.arange(stop - start)] = 1.0
            dense[:, start:stop] = self.matmat(unit)
        return dense

    def to_scipy(self) -> LinearOperator:
        """The same operator for SciPy: NumPy in and out, float64, computed on the objective's device."""
        return _ScipyHessian(self)


class _ScipyHessian(LinearOperator):
    def __init__(self, operator: HessianOperator):
        super().__init__(np.dtype(np.float64), operator.shape)
        self._operator = operator

    def _matmat(self, X: np.ndarray) -> np.ndarray:
        return self._operator.matmat(torch.from_numpy(np.ascontiguousarray(X))).cpu().numpy()

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return self._matmat(x.reshape(-1, 1))[:, 0]

    def _rmatmat(self, X: np.ndarray) -> np.ndarray:
        return _ScipyHessian(self._operator.transposed())._matmat(X)

    def _rmatvec(self, x: np.ndarray) -> np.ndarray:
        return _ScipyHessian(self._operator.transposed())._matvec(x)
