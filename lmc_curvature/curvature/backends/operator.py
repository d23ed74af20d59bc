"""The Hessian as an operator, with products by this library or by another, chosen by `backend=`.

| `backend` | products |
| --- | --- |
| `"native"` | reverse over reverse, one graph for all vectors |
| `"curvlinops"` | forward over reverse |
| `"pyhessian"` | reverse over reverse |
| `"backpack"` | Jacobian product of the gradient |

Every backend differentiates the same function of the same coordinates (see `peers`), and its first product is compared
with a native one: torch's forward mode through normalisation by batch statistics and `LayerNorm`, for one, is wrong,
and with it curvlinops's products.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, get_args

import torch

from lmc_curvature.agreement import near
from lmc_curvature.curvature.backends.peers import PeerBatch, load_peer
from lmc_curvature.curvature.operators import Curvature, CurvatureOperator, HessianOperator
from lmc_curvature.curvature.products import BatchGradient
from lmc_curvature.errors import BackendError, LMCCurvatureError, check_choice
from lmc_curvature.objective.batches import Batch
from lmc_curvature.objective.losses import finite_loss
from lmc_curvature.objective.network import State
from lmc_curvature.objective.risk import Objective
from lmc_curvature.segment.partition import PartitionSpec

Backend = Literal["native", "curvlinops", "backpack", "pyhessian"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


def hessian_operator(
    objective: Objective,
    state: State | None = None,
    *,
    backend: Backend = "native",
    layers: Iterable[str] | str | None = None,
    partition: PartitionSpec = "fused",
    statistics: bool = True,
) -> CurvatureOperator:
    """The Hessian as a linear operator whose products are computed by a backend.

    Whatever takes an operator takes it: `top_eigenpairs`, `spectral_density`, `trace`, `.diagonal()`, `.to_scipy()`.

    Args:
        objective: The loss and its data.
        state: Where to differentiate; the objective's own state by default.
        backend: The library that computes products.
        layers: A layer, or a set of layers, along rows and columns; None for the whole network.
        partition: How the network is cut into layers; see `LayerPartition.of`.
        statistics: Whether running statistics are coordinates, too; see `CurvatureOperator`.

    Raises:
        BackendError: The library is not installed; at the first product, it has another result than a native one.
        OptionError: `backend` is not a choice.
        PartitionError: `layers` names an unknown layer.
        DirectionError: The state has an unknown entry or a wrong shape.
        NonFiniteError: The state is not finite.
    """
    check_choice("backend", backend, BACKENDS)
    if backend == "native":
        return HessianOperator(objective, state, layers=layers, partition=partition, statistics=statistics)
    load_peer(backend)
    curvature = Curvature("Hessian", _compared_batches(backend), native=False)
    return CurvatureOperator(curvature, objective, state, layers=layers, partition=partition, statistics=statistics)


def _compared_batches(backend: str) -> Callable[[Objective, State, Batch, Sequence[str]], PeerBatch]:
    """A function that makes the Hessian of a batch, and compares the first for each selection of entries."""
    compared: set[tuple[str, ...]] = set()

    def of_batch(objective: Objective, state: State, batch: Batch, entries: Sequence[str]) -> PeerBatch:
        if tuple(entries) in compared:
            return PeerBatch(backend, objective, state, batch, entries)
        # Before the library's: it refuses a network that has no Hessian by name.
        native = BatchGradient(objective, state, batch, entries)
        finite_loss(native.loss, batch)
        peer = PeerBatch(backend, objective, state, batch, entries)
        _compare(peer, native, {name: state[name] for name in entries})
        compared.add(tuple(entries))
        return peer

    return of_batch


def _compare(peer: PeerBatch, native: BatchGradient, entries: State) -> None:
    generator = torch.Generator().manual_seed(0)
    vector = {name: torch.randn(tensor.shape, generator=generator).to(tensor) for name, tensor in entries.items()}
    try:
        products = [_flat(matrix.product(vector)) for matrix in (peer, native)]
    except (RuntimeError, NotImplementedError, LMCCurvatureError) as error:
        raise BackendError(f"backend={peer.backend!r} cannot differentiate this loss: {error}") from error
    size, error = torch.linalg.norm(products[1]), torch.linalg.norm(products[0] - products[1])
    rounding = max(torch.finfo(tensor.dtype).eps for tensor in entries.values())
    floor = rounding**0.75 * _flat(vector).norm()
    if not near("backend", error, torch.zeros_like(error), rounding=rounding, scale=size, floor=floor):
        raise BackendError(
            f"backend={peer.backend!r}: its product with a random vector is off by {float(error):.2g} from an exact "
            f"one of norm {float(size):.2g} on the first batch (torch's forward mode has wrong derivatives for some "
            "operations, such as LayerNorm). Use another backend."
        )


def _flat(state: State) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in state.values()]).double()
