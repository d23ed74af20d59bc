"""The same curvature by this library or by another: products, eigenvalues, traces and diagonals, chosen by `backend=`.

| `backend` | products | eigenvalues | trace | diagonal |
| --- | --- | --- | --- | --- |
| `"native"` | reverse over reverse, one graph for all | block Davidson, by residual | Hutch++ | exact, by products |
| `"curvlinops"` | forward over reverse | SciPy's `eigsh` of its products | Hutchinson | – |
| `"pyhessian"` | reverse over reverse | power iteration | Hutchinson | – |
| `"backpack"` | Jacobian product of the gradient | – | exact, of the diagonal | exact, nested `nn.Sequential` |

Every backend differentiates the same function of the same coordinates (see `peers`), and its first product is compared
with a native one: torch's forward mode through normalisation by batch statistics and `LayerNorm`, for one, is wrong,
and with it curvlinops's products. PyHessian's spectral density calls a function that torch removed; use
`spectral_density` on a `hessian_operator(...)` instead.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float64
from scipy.sparse.linalg import eigsh
from torch import Tensor

from lmc_curvature.curvature.backends.backpack_diagonal import backpack_diagonal
from lmc_curvature.curvature.backends.peers import (
    BackpackBatch,
    CurvlinopsBatch,
    PeerBatch,
    PyHessianBatch,
    curvlinops_trace,
    load_peer,
    pyhessian_eigenvalues,
    pyhessian_trace,
    tolerance_of,
)
from lmc_curvature.curvature.operators.hessian import HessianOperator
from lmc_curvature.curvature.operators.operator import CurvatureOperator, Share
from lmc_curvature.curvature.products.gradient import BatchGradient
from lmc_curvature.curvature.spectra.eigenpairs import top_eigenpairs
from lmc_curvature.curvature.spectra.trace import Estimate, trace
from lmc_curvature.errors import BackendError, OptionError, check_choice
from lmc_curvature.objective.batches import Batch
from lmc_curvature.objective.network import State
from lmc_curvature.objective.risk import Objective
from lmc_curvature.segment.partition import PartitionSpec

Backend = Literal["native", "curvlinops", "backpack", "pyhessian"]
BACKENDS: tuple[str, ...] = get_args(Backend)
_BATCHES: dict[str, type[PeerBatch]] = {
    "curvlinops": CurvlinopsBatch,
    "backpack": BackpackBatch,
    "pyhessian": PyHessianBatch,
}


class PeerHessian(CurvatureOperator):
    """The Hessian, as `HessianOperator`, with another library's products.

    Args:
        objective: The loss and its data.
        state: Where to differentiate; the objective's own state by default.
        backend: The library: `"curvlinops"`, `"backpack"` or `"pyhessian"`.
        layers: Restrict rows and columns to a set of layers; None for the whole network.
        partition: How the network is cut into layers; see `LayerPartition.of`.

    Raises:
        BackendError: The library is not installed; at the first product, it has another result than a native one.
        OptionError: `backend` is not a choice.
    """

    _name = "Hessian"
    # What a library does is left as it does it.
    _vectorizes = False

    def __init__(
        self,
        objective: Objective,
        state: State | None = None,
        *,
        backend: str,
        layers: Iterable[str] | str | None = None,
        partition: PartitionSpec = "fused",
    ):
        check_choice("backend", backend, _BATCHES)
        load_peer(backend)
        super().__init__(objective, state, layers=layers, partition=partition)
        self.backend = backend
        self._compared = False

    def _on_batch(self, batch: Batch, entries: Sequence[str]) -> PeerBatch:
        if self._compared:
            return _BATCHES[self.backend](self.objective, self.point, batch, entries)
        # Before the library's: it refuses a network that has no Hessian by name.
        native = BatchGradient(self.objective, self.point, batch, entries)
        native.check_twice_differentiable()
        peer = _BATCHES[self.backend](self.objective, self.point, batch, entries)
        self._compare(peer, native, entries)
        self._compared = True
        return peer

    def _lay_out(self, batch: Batch, compute: Callable[[Batch], tuple[Tensor, list[Share]]]) -> list[Share]:
        # A peer gets the batch as its own users would pass it.
        return compute(batch)[1]

    def _compare(self, peer: PeerBatch, native: BatchGradient, entries: Sequence[str]) -> None:
        generator = torch.Generator().manual_seed(0)
        vector = {
            name: torch.randn(self.state[name].shape, generator=generator).to(self.device, self.objective.dtype)
            for name in entries
        }
        try:
            products = [self.flatten(matrix.product(vector)).double() for matrix in (peer, native)]
        except (RuntimeError, NotImplementedError) as error:
            raise BackendError(f"backend={self.backend!r} cannot differentiate this loss: {error}") from error
        size, error = torch.linalg.norm(products[1]), torch.linalg.norm(products[0] - products[1])
        tolerance = tolerance_of(self.objective.dtype)
        if not error <= tolerance * (size + tolerance**2 * self.flatten(vector).norm()):
            raise BackendError(
                f"backend={self.backend!r}: its product with a random vector is off by {float(error):.2g} from an "
                f"exact one of norm {float(size):.2g} on the first batch (torch's forward mode has wrong derivatives "
                "for some operations, such as LayerNorm). Use another backend."
            )


def hessian_operator(
    objective: Objective,
    state: State | None = None,
    *,
    backend: str = "native",
    layers: Iterable[str] | str | None = None,
    partition: PartitionSpec = "fused",
) -> CurvatureOperator:
    """The Hessian as a linear operator whose products are computed by a backend.

    Whatever takes an operator takes it: `top_eigenpairs`, `spectral_density`, `trace`, `.to_scipy()`, `.to_dense()`.

    Args:
        objective: The loss and its data.
        state: Where to differentiate; the objective's own state by default.
        backend: `"native"`, `"curvlinops"`, `"backpack"` or `"pyhessian"`.
        layers: Restrict rows and columns to a set of layers; None for the whole network.
        partition: How the network is cut into layers; see `LayerPartition.of`.

    Raises:
        BackendError: The library is not installed; at the first product, it has another result than a native one.
        OptionError: `backend` is not a choice.
        PartitionError: `layers` names an unknown layer.
        DirectionError: The state has an unknown entry or a wrong shape.
        NonFiniteError: The state is not finite.
    """
    check_choice("backend", backend, BACKENDS)
    if backend == "native":
        return HessianOperator(objective, state, layers=layers, partition=partition)
    return PeerHessian(objective, state, backend=backend, layers=layers, partition=partition)


def hessian_vector_product(objective: Objective, state: State | None, vector: Any, *, backend: str = "native") -> Any:
    """H v at a state for a flat vector (n,), a matrix (n, k) or a direction; of the same kind as `vector`.

    One pass over the loader. For several products at one state make a `hessian_operator` once.

    Args:
        objective: The loss and its data.
        state: Where to differentiate; None for the objective's own state.
        vector: Flat (n,), several as columns (n, k), or a direction by entry names.
        backend: Who computes it; see `hessian_operator`.

    Returns:
        The product, of the kind and type of `vector`.

    Raises:
        BackendError: The library is not installed, or has another result than a native product on the first batch.
        DirectionError: The vector has a wrong shape, an unknown entry or a type that cannot move.
    """
    return hessian_operator(objective, state, backend=backend) @ vector


def hessian_eigenvalues(
    objective: Objective,
    state: State | None = None,
    *,
    k: int = 1,
    backend: str = "native",
    layers: Iterable[str] | str | None = None,
    partition: PartitionSpec = "fused",
    tolerance: float = 1e-3,
    seed: int = 0,
) -> Float64[Tensor, " k"]:
    """The k eigenvalues of the Hessian that are furthest from zero, the furthest first, by a backend's own method.

    Args:
        objective: The loss and its data.
        state: Where to differentiate; the objective's own state by default.
        k: How many.
        backend: `"native"`, `"curvlinops"` or `"pyhessian"`.
        layers: Restrict the Hessian to a set of layers; None for the whole network.
        partition: How the network is cut into layers; see `LayerPartition.of`.
        tolerance: Relative, of the residual; PyHessian's is of the change of an eigenvalue from step to step.
        seed: Of the random start.

    Raises:
        BackendError: The backend is not installed or computes no eigenvalues; names those that do.
        OptionError: `k` is not from 1 to the dimension, or `backend` is not a choice.
    """
    operator = _operator_for("eigenvalues", objective, state, backend, layers, partition)
    size = operator.shape[0]
    if not 1 <= k <= size:
        raise OptionError(f"k={k}: expected a number of eigenvalues from 1 to {size}.")
    if backend == "native":
        return top_eigenpairs(operator, k, which="magnitude", tolerance=tolerance, seed=seed).values
    if backend == "pyhessian":
        values = pyhessian_eigenvalues(objective, operator.point, operator.rows, k=k, tolerance=tolerance, seed=seed)
    elif k == size:
        values = torch.linalg.eigvalsh(operator.to_dense())
    else:
        start = np.random.default_rng(seed).standard_normal(size)
        options: dict[str, Any] = {"which": "LM", "tol": tolerance, "v0": start, "return_eigenvectors": False}
        values = torch.from_numpy(eigsh(operator.to_scipy(), k, **options)).to(operator.device)
    return values[values.abs().argsort(descending=True)]


def hessian_trace(
    objective: Objective,
    state: State | None = None,
    *,
    backend: str = "native",
    layers: Iterable[str] | str | None = None,
    partition: PartitionSpec = "fused",
    probes: int = 60,
    seed: int = 0,
) -> Estimate:
    """The trace of the Hessian, by a backend's own method.

    Args:
        objective: The loss and its data.
        state: Where to differentiate; the objective's own state by default.
        backend: `"native"`, `"curvlinops"`, `"backpack"` (exact) or `"pyhessian"`.
        layers: Restrict the Hessian to a set of layers; None for the whole network.
        partition: How the network is cut into layers; see `LayerPartition.of`.
        probes: Products to make.
        seed: Of the random vectors.

    Raises:
        BackendError: The backend is not installed, or cannot do this network.
        OptionError: There are too few or too many probes, or `backend` is not a choice.
    """
    operator = _operator_for("traces", objective, state, backend, layers, partition)
    if backend == "native":
        return trace(operator, probes=probes, seed=seed)
    if backend == "backpack":
        parts = backpack_diagonal(objective, operator.point, operator.rows)
        return Estimate(sum(float(part.sum()) for part in parts.values()), 0.0)
    if not 2 <= probes < operator.shape[0]:
        raise OptionError(
            f"probes={probes}: with backend={backend!r} expected at least 2, and fewer than the rows of the Hessian, "
            f"{operator.shape[0]}."
        )
    if backend == "curvlinops":
        return curvlinops_trace(operator, probes=probes, seed=seed)
    return pyhessian_trace(objective, operator.point, operator.rows, probes=probes, seed=seed)


def hessian_diagonal(
    objective: Objective,
    state: State | None = None,
    *,
    backend: str = "native",
    layers: Iterable[str] | str | None = None,
    partition: PartitionSpec = "fused",
) -> dict[str, Tensor]:
    """The exact diagonal of the Hessian, by a backend's own method.

    `"native"` makes a product for every coordinate. `"backpack"` makes a single pass through the modules of a network,
    which it knows only of nested `nn.Sequential`; its cost grows with the width of nonlinear layers.

    Args:
        objective: The loss and its data.
        state: Where to differentiate; the objective's own state by default.
        backend: `"native"` or `"backpack"`.
        layers: Restrict the diagonal to a set of layers; None for the whole network.
        partition: How the network is cut into layers; see `LayerPartition.of`.

    Returns:
        Entry name to the diagonal in the entry's shape, float64.

    Raises:
        BackendError: The backend is not installed, computes no exact diagonal, or cannot do this network.
        OptionError: `backend` is not a choice.
    """
    operator = _operator_for("exact diagonals", objective, state, backend, layers, partition)
    if backend == "backpack":
        return backpack_diagonal(objective, operator.point, operator.rows)
    sizes = [operator.state[name].numel() for name in operator.rows]
    parts = operator.diagonal().split(sizes)
    return {name: part.view(operator.state[name].shape) for name, part in zip(operator.rows, parts, strict=True)}


_ABLE: dict[str, tuple[str, ...]] = {
    "eigenvalues": ("native", "curvlinops", "pyhessian"),
    "traces": BACKENDS,
    "exact diagonals": ("native", "backpack"),
}


def _operator_for(
    quantity: str,
    objective: Objective,
    state: State | None,
    backend: str,
    layers: Iterable[str] | str | None,
    partition: PartitionSpec,
) -> CurvatureOperator:
    check_choice("backend", backend, BACKENDS)
    if backend not in _ABLE[quantity]:
        able = ", ".join(repr(name) for name in _ABLE[quantity])
        raise BackendError(
            f"backend={backend!r} does not compute {quantity}; these do: {able}. Its products, "
            f"hessian_operator(objective, backend={backend!r}), can be given to any algorithm."
        )
    return hessian_operator(objective, state, backend=backend, layers=layers, partition=partition)
