"""The generalised Gauss-Newton matrix of an objective as a linear operator."""

from collections.abc import Iterable, Sequence

import torch

from lmc_curvature.curvature.operators.operator import CurvatureOperator
from lmc_curvature.curvature.products.gauss_newton import BatchGaussNewton
from lmc_curvature.errors import LossError
from lmc_curvature.objective.batches import Batch
from lmc_curvature.objective.network import State
from lmc_curvature.objective.risk import Objective
from lmc_curvature.segment.partition import PartitionSpec


class GGNOperator(CurvatureOperator):
    """The generalised Gauss-Newton matrix of an objective, or a block of it, as a linear operator.

        G = (1/n) Σ_i J_iᵀ (∂²loss_i/∂output²) J_i    (Schraudolph 2002)

    The Hessian without the network's own second derivatives, exactly; positive semidefinite where the loss is convex
    in the output, and equal to the Hessian where the network is linear in its state or the loss is least at the output
    of every example. For cross-entropy it is the Fisher information matrix, for the squared error a multiple of it.

    Example:
        >>> G = GGNOperator(objective)
        >>> G @ torch.randn(G.shape[1], 5)                      # five vectors, one pass over the data
        >>> G.block("fc").to_dense()                            # a layer's own matrix
        >>> G.block_diagonal() @ torch.randn(G.shape[1])        # without what is between layers

    Args:
        objective: The loss, `loss_fn(output, target)` of an output that is one tensor, and its data.
        state: Where to differentiate; the objective's own state by default.
        layers: Restrict rows and columns to a set of layers; None for the whole network.
        partition: How the network is cut into layers; see `LayerPartition.of`.

    Raises:
        LossError: The loss is a `BatchLoss`, whose network output is not known.
        PartitionError: `layers` names an unknown layer.
        DirectionError: The state has an unknown entry or a wrong shape.
        NonFiniteError: The state, a vector or the loss of a batch is not finite; names the entry or the batch.
    """

    _name = "Gauss-Newton matrix"

    def __init__(
        self,
        objective: Objective,
        state: State | None = None,
        *,
        layers: Iterable[str] | str | None = None,
        partition: PartitionSpec = "fused",
    ):
        if not objective.has_output:
            raise LossError(
                "The Gauss-Newton matrix is made of the derivatives of the network's output and of the loss in it; a "
                "BatchLoss calls the network itself, so its output is not known. Pass loss_fn(output, target) with "
                "batches (x, y), or use HessianOperator."
            )
        super().__init__(objective, state, layers=layers, partition=partition)
        self._checked = False

    def _on_batch(self, batch: Batch, entries: Sequence[str]) -> BatchGaussNewton:
        if not self._checked:
            # The objective refuses what is no function of the state where it computes a loss.
            with torch.no_grad():
                self.objective.batch_loss(self.point, batch)
            self._checked = True
        matrix = BatchGaussNewton(self.objective, self.point, batch, entries)
        if batch.index == 0:
            matrix.check_twice_differentiable()
        return matrix
