"""Other libraries' products with the Hessian, of the same loss in the same coordinates as ours.

Every library differentiates the parameters of a module. So the objective is put into one (`LossModule`) whose
parameters are the entries of the state, running statistics included, and whose output is the batch's loss: batch-norm
policy, weights of batches, loss function, device and type are then the objective's own, for each library alike.
"""

import importlib
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lmc_curvature.errors import BackendError
from lmc_curvature.objective.batches import Batch
from lmc_curvature.objective.network import State
from lmc_curvature.objective.risk import Objective


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
        package = backend if backend == "pyhessian" else f"{backend}-for-pytorch"
        raise BackendError(
            f"backend={backend!r} needs the package {package} ({error}): pip install lmc-curvature[backends]"
        ) from error


class LossModule(nn.Module):
    """The loss of one batch, as a module whose parameters are entries of a state.

    Args:
        objective: The loss.
        state: The complete state.
        batch: The examples.
        entries: The entries to differentiate in.

    Attributes:
        markers: A tensor of as many elements as the batch has examples, for libraries that count them.
    """

    def __init__(self, objective: Objective, state: State, batch: Batch, entries: Sequence[str]):
        super().__init__()
        self._objective = objective
        self._state = state
        self._batch = batch
        self._names = list(entries)
        self._values = nn.ParameterList(state[name].detach().clone() for name in entries)
        self.markers = torch.zeros(batch.size, device=objective.device, dtype=objective.dtype)

    def forward(self, _markers: Tensor) -> Float[Tensor, ""]:
        """The mean loss of the batch."""
        entries = dict(zip(self._names, self._values, strict=True))
        loss = self._objective.batch_loss({**self._state, **entries}, self._batch)
        # Nothing, but twice differentiable in every entry: some libraries fail at an entry that the loss does not use.
        return loss + sum(0.0 * entry.square().sum() for entry in entries.values())


class _Identity(nn.Module):
    """The loss of an output that is the loss."""

    # What curvlinops asks of a loss.
    reduction = "mean"

    def forward(self, output: Tensor, _target: Tensor) -> Tensor:
        return output


class PeerBatch:
    """The Hessian of one batch, whose products a library computes.

    Args:
        backend: The library.
        objective: The loss.
        state: The complete state.
        batch: The examples.
        entries: The entries to differentiate in.

    Attributes:
        backend: The library.
        loss: The batch's mean loss, a scalar tensor without graph.
        operations: The same for all batches: a library's products are made one by one.
    """

    operations: Hashable = ()

    def __init__(self, backend: str, objective: Objective, state: State, batch: Batch, entries: Sequence[str]):
        self.backend = backend
        self._objective = objective
        self._entries = list(entries)
        self._module = LossModule(objective, state, batch, entries)
        library = {"curvlinops": _curvlinops, "pyhessian": _pyhessian, "backpack": _backpack}[backend]
        with objective.numerics.differentiating():
            self.loss, self._multiply = library(self._module)

    def product(self, direction: State, rows: Sequence[str] | None = None) -> dict[str, Tensor]:
        """H v for a sparse direction v: entry name to tensor, for the entries in `rows` (default: all)."""
        vectors = [
            direction[name] if name in direction else torch.zeros_like(parameter)
            for name, parameter in zip(self._entries, self._module.parameters(), strict=True)
        ]
        with self._objective.numerics.differentiating():
            products = dict(zip(self._entries, self._multiply(vectors), strict=True))
        return {name: products[name].detach() for name in (self._entries if rows is None else rows)}


_Prepared = tuple[Tensor, Callable[[list[Tensor]], Sequence[Tensor]]]
# The loss, and the product with a vector that is a list of tensors, one for each entry.


def _curvlinops(module: LossModule) -> _Prepared:
    """`curvlinops.HessianLinearOperator`: forward over reverse, under `torch.func`."""
    with torch.no_grad():
        loss = module(module.markers)
    operator = load_peer("curvlinops").HessianLinearOperator(
        module,
        _Identity(),
        list(module.parameters()),
        [(module.markers, module.markers)],
        check_deterministic=False,
        num_data=len(module.markers),
    )
    return loss, operator.__matmul__


def _pyhessian(module: LossModule) -> _Prepared:
    """`pyhessian.utils.hessian_vector_product`: reverse over reverse, on a kept graph."""
    losses = []

    def keep(output: Tensor, _target: Tensor) -> Tensor:
        losses.append(output.detach())
        return output

    with warnings.catch_warnings():
        # About the cycle of a gradient and its graph, which is broken below.
        warnings.simplefilter("ignore")
        data = (module.markers, module.markers)
        gradients = load_peer("pyhessian").hessian(module, keep, data=data, cuda=False).gradsH
    # A gradient that is kept at its parameter, and has a graph, would never be freed.
    module.zero_grad(set_to_none=True)
    multiply = importlib.import_module("pyhessian.utils").hessian_vector_product
    return losses[0], lambda vectors: multiply(gradients, list(module.parameters()), vectors)


def _backpack(module: LossModule) -> _Prepared:
    """`backpack.hessianfree.hvp.hessian_vector_product`: a Jacobian product of the gradient, by two reverse passes."""
    multiply = importlib.import_module("backpack.hessianfree.hvp").hessian_vector_product
    parameters = list(module.parameters())
    graph = module(module.markers)
    gradients = torch.autograd.grad(graph, parameters, create_graph=True)
    return graph.detach(), lambda vectors: multiply(graph, parameters, vectors, grad_params=gradients)
