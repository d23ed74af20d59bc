"""The Gauss-Newton matrix of one batch, and its products."""

import functools
import warnings
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lmc_curvature.curvature.products.convolutions import DifferentiableConvolutions
from lmc_curvature.curvature.products.derivatives import gradients, operations, refuse_once_differentiable
from lmc_curvature.errors import UnsupportedModelError
from lmc_curvature.objective.batches import Batch, describe
from lmc_curvature.objective.network import State, as_leaves
from lmc_curvature.objective.risk import Objective


class BatchGaussNewton:
    """The Gauss-Newton matrix of one batch, kept as graphs, so that a product costs two backward passes.

        G v = Jᵀ S J v,    J = ∂output/∂state,    S = ∂²loss/∂output²

    Jᵀ u is a backward pass. It is linear in u, and its derivative in u is J: so J v is a backward pass through the
    graph of Jᵀ u, shared by all vectors of the batch, and needs no operation to have a forward mode.

    Args:
        objective: The loss.
        state: Where to differentiate, on the objective's device.
        batch: The examples.
        entries: Entries to differentiate in; by default all of the state.

    Attributes:
        loss: The batch's mean loss, a scalar tensor without graph.

    Raises:
        LossError: The loss is a `BatchLoss`.
        UnsupportedModelError: The loss is not a function of the state, the output is not one tensor, or an operation
            has no derivative; what torch would differentiate with parts left out is looked for on the first batch.
    """

    def __init__(self, objective: Objective, state: State, batch: Batch, entries: Iterable[str] | None = None):
        self._objective = objective
        self._leaves = as_leaves({name: state[name] for name in (state if entries is None else entries)})
        self._convolutions = DifferentiableConvolutions()
        with torch.no_grad():
            # Where it computes a loss, the objective refuses what is no function of the state: once is enough.
            objective.memo("loss before a Gauss-Newton matrix", lambda: objective.batch_loss(state, batch).item())
        with objective.numerics.differentiating():
            with self._convolutions:
                self._output = _single_tensor(objective.output({**state, **self._leaves}, batch))
            self._at = self._output.detach().requires_grad_()
            loss = objective.output_loss(self._at, batch)
            self._slope = gradients([loss], {"output": self._at}, create_graph=True)["output"]
            self._cotangent = torch.zeros_like(self._output, requires_grad=True)
            self._pulled = gradients([self._output], self._leaves, [self._cotangent], create_graph=True)
        self.loss = loss.detach()
        if batch.is_first:
            refuse_once_differentiable([loss, self._slope, self._output, *self._pulled.values()])
            objective.memo("a Gauss-Newton matrix of zeros", self._warn_of_zeros)

    @functools.cached_property
    def operations(self) -> Hashable:
        """A value that differs between batches whose output or loss is computed by other operations."""
        return operations([self._slope, self._output, *self._pulled.values()])

    def _warn_of_zeros(self) -> None:
        random = torch.randn(self._at.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        with self._objective.numerics.differentiating_operations():
            curvature = gradients([self._slope], {"output": self._at}, [random.to(self._at)])["output"]
        if self._slope.any() and not curvature.any():
            warnings.warn(
                "The Gauss-Newton matrix of the first batch is exactly zero: the loss has a slope in the network's "
                "output and no second derivative, as nll_loss of log-probabilities and l1_loss have none. Let a "
                "network that ends in LogSoftmax end in its logits, and use cross_entropy; or use HessianOperator.",
                stacklevel=2,
            )

    def product(self, direction: State, rows: Sequence[str] | None = None) -> dict[str, Tensor]:
        """G v for a sparse direction v: entry name to tensor, for the entries in `rows` (default: all)."""
        leaves = self._leaves if rows is None else {name: self._leaves[name] for name in rows}
        others = [leaf for name, leaf in self._leaves.items() if name not in leaves]
        with self._objective.numerics.differentiating_operations():
            pulled = [self._pulled[name] for name in direction]
            with self._convolutions.backward(linear=True):
                tangent = gradients(pulled, {"output": self._cotangent}, list(direction.values()))["output"]
            cotangent = gradients([self._slope], {"output": self._at}, [tangent])["output"]
            with self._convolutions.backward(without=others):
                return gradients([self._output], leaves, [cotangent])


def _single_tensor(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise UnsupportedModelError(
            f"The network's output is {describe(output)}; the Gauss-Newton matrix is defined for one tensor. Wrap the "
            "network in one that returns the tensor that the loss is computed from."
        )
    if not output.is_floating_point():
        raise UnsupportedModelError(f"The network's output has type {output.dtype}; expected floating-point numbers.")
    return output
