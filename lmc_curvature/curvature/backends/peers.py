"""Other libraries' products with the Hessian, of the same loss in the same coordinates as ours.

Every library differentiates the parameters of a module. So the objective is put into one (`LossModule`) whose
parameters are the entries of the state, running statistics included, and whose output is the batch's loss: batch-norm
policy, weights of batches, loss function, device and type are then the objective's own, for each library alike.
"""

import abc
import contextlib
import importlib
import warnings
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from lmc_curvature.curvature.spectra.trace import Estimate
from lmc_curvature.errors import BackendError, NonFiniteError
from lmc_curvature.objective.batches import Batch
from lmc_curvature.objective.network import State
from lmc_curvature.objective.randomness import global_rng_preserved
from lmc_curvature.objective.risk import Objective

PACKAGES = {
    "curvlinops": "curvlinops-for-pytorch",
    "backpack": "backpack-for-pytorch",
    "pyhessian": "pyhessian",
}
"""Backend to the package that it is installed from; it is imported by the backend's name."""


def load_peer(backend: str) -> Any:
    """Import a library.

    Raises:
        BackendError: It is not installed, or cannot be imported.
    """
    try:
        with warnings.catch_warnings():
            # What the library's own imports are warned about is nothing that its user could change.
            warnings.simplefilter("ignore")
            return importlib.import_module(backend)
    except ImportError as error:
        raise BackendError(
            f"backend={backend!r} needs the package {PACKAGES[backend]} ({error}): pip install lmc-curvature[backends]"
        ) from error


def tolerance_of(dtype: torch.dtype) -> float:
    """The relative difference between two libraries beyond which it is no matter of rounding."""
    return torch.finfo(dtype).eps ** 0.25


class LossModule(nn.Module):
    """The loss of the batch at hand, as a module whose parameters are entries of a state.

    Args:
        objective: The loss.
        point: The complete state.
        entries: The entries to differentiate in.

    Attributes:
        batch: The batch at hand; to be set before a call.
    """

    batch: Batch

    def __init__(self, objective: Objective, point: State, entries: Sequence[str]):
        super().__init__()
        self._objective = objective
        self._point = point
        # Entries have dots in their names, which parameters of a module must not have.
        self._keys = {name: f"entry_{number}" for number, name in enumerate(entries)}
        for name, key in self._keys.items():
            self.register_parameter(key, nn.Parameter(point[name].detach().clone()))

    def forward(self, _example_markers: Tensor) -> Float[Tensor, ""]:
        """The mean loss of the batch at hand."""
        entries = {name: getattr(self, key) for name, key in self._keys.items()}
        loss = self._objective.batch_loss({**self._point, **entries}, self.batch)
        # Nothing, but twice differentiable in every entry: some libraries fail at an entry that the loss does not use.
        return loss + sum(0.0 * entry.square().sum() for entry in entries.values())

    def markers(self) -> Float[Tensor, " examples"]:
        """A tensor of as many elements as the batch at hand has examples, for libraries that count them."""
        return torch.zeros(self.batch.size, device=self._objective.device, dtype=self._objective.dtype)


class _Identity(nn.Module):
    """The loss of an output that is the loss."""

    # What curvlinops asks of a loss.
    reduction = "mean"

    def forward(self, output: Tensor, _target: Tensor) -> Tensor:
        return output


class PeerBatch(abc.ABC):
    """The Hessian of one batch, whose products a library computes.

    Args:
        objective: The loss.
        point: The complete state.
        batch: The examples.
        entries: The entries to differentiate in.

    Attributes:
        loss: The batch's mean loss, a scalar tensor without graph.
    """

    loss: Tensor
    # Products of a peer are made as it makes them.
    operations: Hashable = ()

    def __init__(self, objective: Objective, point: State, batch: Batch, entries: Sequence[str]):
        self._objective = objective
        self._entries = list(entries)
        self._module = LossModule(objective, point, entries)
        self._module.batch = batch
        with objective.differentiating():
            self._prepare()

    @abc.abstractmethod
    def _prepare(self) -> None:
        """Do what all vectors share, and set `loss`."""

    @abc.abstractmethod
    def _multiply(self, vectors: list[Tensor]) -> Sequence[Tensor]:
        """The product with a vector that is a list of tensors, one for each entry."""

    def product(self, direction: State, rows: Sequence[str] | None = None) -> dict[str, Tensor]:
        """H v for a sparse direction v: entry name to tensor, for the entries in `rows` (default: all)."""
        vectors = [
            direction[name] if name in direction else torch.zeros_like(parameter)
            for name, parameter in zip(self._entries, self._module.parameters(), strict=True)
        ]
        with self._objective.differentiating():
            products = dict(zip(self._entries, self._multiply(vectors), strict=True))
        return {name: products[name].detach() for name in (self._entries if rows is None else rows)}


class CurvlinopsBatch(PeerBatch):
    """`curvlinops.HessianLinearOperator`: forward over reverse, under `torch.func`."""

    def _prepare(self) -> None:
        markers = self._module.markers()
        with torch.no_grad():
            self.loss = self._module(markers)
        self._operator = load_peer("curvlinops").HessianLinearOperator(
            self._module,
            _Identity(),
            list(self._module.parameters()),
            [(markers, markers)],
            check_deterministic=False,
            num_data=len(markers),
        )

    def _multiply(self, vectors: list[Tensor]) -> Sequence[Tensor]:
        return self._operator @ vectors


class PyHessianBatch(PeerBatch):
    """`pyhessian.utils.hessian_vector_product`: reverse over reverse, on a kept graph."""

    def _prepare(self) -> None:
        markers = self._module.markers()
        with warnings.catch_warnings():
            # About the cycle of a gradient and its graph, which is broken below.
            warnings.simplefilter("ignore")
            hessian = load_peer("pyhessian").hessian(self._module, self._criterion, data=(markers, markers), cuda=False)
        self._gradients = hessian.gradsH
        # A gradient that is kept at its parameter, and has a graph, would never be freed.
        self._module.zero_grad(set_to_none=True)

    def _criterion(self, output: Tensor, _target: Tensor) -> Tensor:
        self.loss = output.detach()
        return output

    def _multiply(self, vectors: list[Tensor]) -> Sequence[Tensor]:
        utilities = importlib.import_module("pyhessian.utils")
        return utilities.hessian_vector_product(self._gradients, list(self._module.parameters()), vectors)


class BackpackBatch(PeerBatch):
    """`backpack.hessianfree.hvp.hessian_vector_product`: a Jacobian product of the gradient, by two reverse passes."""

    def _prepare(self) -> None:
        load_peer("backpack")
        self._graph = self._module(self._module.markers())
        self.loss = self._graph.detach()
        parameters = list(self._module.parameters())
        self._gradients = torch.autograd.grad(self._graph, parameters, create_graph=True)

    def _multiply(self, vectors: list[Tensor]) -> Sequence[Tensor]:
        products = importlib.import_module("backpack.hessianfree.hvp")
        parameters = list(self._module.parameters())
        return products.hessian_vector_product(self._graph, parameters, vectors, grad_params=self._gradients)


def pyhessian_eigenvalues(
    objective: Objective, point: State, entries: Sequence[str], *, k: int, tolerance: float, seed: int
) -> Float64[Tensor, " k"]:
    """The k eigenvalues furthest from zero, by PyHessian's power iteration with deflation."""
    with _whole_pyhessian(objective, point, entries, seed) as hessian:
        values, _ = hessian.eigenvalues(maxIter=1000, tol=tolerance, top_n=k)
    return _finite(torch.tensor(values, dtype=torch.float64, device=objective.device), "PyHessian's eigenvalues")


def pyhessian_trace(objective: Objective, point: State, entries: Sequence[str], *, probes: int, seed: int) -> Estimate:
    """The trace by PyHessian's estimator (Hutchinson 1989)."""
    with _whole_pyhessian(objective, point, entries, seed) as hessian:
        # No change is smaller than zero, so that all vectors are drawn.
        samples = torch.tensor(hessian.trace(maxIter=probes, tol=0.0), dtype=torch.float64)
    return _estimate(_finite(samples, "PyHessian's samples of the trace"))


def curvlinops_trace(operator: Any, *, probes: int, seed: int) -> Estimate:
    """The trace of an operator by curvlinops's estimator (Hutchinson 1989)."""
    library = load_peer("curvlinops")
    watched = _Watched(operator)
    with global_rng_preserved():
        torch.manual_seed(seed)
        value = library.hutchinson_trace(watched, num_matvecs=probes)
    return Estimate(float(value), _estimate(watched.samples).standard_error)


class _Watched:
    """An operator as curvlinops's estimators take one; remembers ⟨v, A v⟩ of the vectors it was multiplied with."""

    def __init__(self, operator: Any):
        self._operator = operator
        self.shape, self.device, self.dtype = operator.shape, operator.device, torch.float64

    def __matmul__(self, vectors: Float64[Tensor, "n k"]) -> Float64[Tensor, "n k"]:
        product = self._operator.matmat(vectors)
        self.samples = (vectors * product).sum(0)
        return product


def _estimate(samples: Float64[Tensor, " probes"]) -> Estimate:
    return Estimate(float(samples.mean()), float(samples.std() / len(samples) ** 0.5))


def _finite(values: Tensor, what: str) -> Tensor:
    if not torch.isfinite(values).all():
        raise NonFiniteError(f"{what} are not finite. Is the loss finite on every batch?")
    return values


class _Batches:
    """The objective's batches, as a library's own loop over data asks for them: any number of passes."""

    def __init__(self, objective: Objective, module: LossModule):
        self._objective = objective
        self._module = module

    def __iter__(self) -> Iterator[Any]:
        with self._objective.one_pass() as batches:
            for batch in batches:
                self._module.batch = batch
                yield self._module.markers(), self._module.markers()


@contextlib.contextmanager
def _whole_pyhessian(objective: Objective, point: State, entries: Sequence[str], seed: int) -> Iterator[Any]:
    """PyHessian's object for all batches; it draws from torch's global generator, which is restored."""
    module = LossModule(objective, point, entries)
    default = torch.get_default_dtype()
    with objective.differentiating(), global_rng_preserved(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        try:
            # It makes its vectors in the default type.
            torch.set_default_dtype(objective.dtype)
            batches = _Batches(objective, module)
            hessian = load_peer("pyhessian").hessian(module, _Identity(), dataloader=batches, cuda=False)
            hessian.device = objective.device
            yield hessian
        finally:
            torch.set_default_dtype(default)
