"""The generalised Gauss-Newton matrix of an objective as a linear operator."""

from collections.abc import Iterable

from lmc_curvature.curvature.operators.operator import Curvature, CurvatureOperator
from lmc_curvature.curvature.products import BatchGaussNewton
from lmc_curvature.errors import LossError
from lmc_curvature.objective.network import State
from lmc_curvature.objective.risk import Objective
from lmc_curvature.segment.partition import PartitionSpec


class GGNOperator(CurvatureOperator):
    """The generalised Gauss-Newton matrix of an objective, or a block of it, as a linear operator.

        G = (1/n) Σ_i J_iᵀ (∂²loss_i/∂output²) J_i    (Schraudolph 2002)

    The Hessian without the network's own second derivatives, exactly; positive semidefinite where the loss is convex
    in the output, and equal to the Hessian where the network is linear in its state or the loss is least at the output
    of every example. For cross-entropy it is the Fisher information matrix, for the squared error a multiple of it.

    What the output is matters: cross-entropy takes logits. `nll_loss` of a network that ends in `LogSoftmax` is linear
    in the output, and its matrix exactly zero, as that of any loss that is piecewise linear in it (L1, hinges). Where
    it is in the first batch, a warning says so.

    Its arguments and errors are those of `CurvatureOperator`. The loss must be `loss_fn(output, target)` of an output
    that is one tensor; a `BatchLoss` raises `LossError`, because its network's output is not known.

    Example:
        >>> G = GGNOperator(objective)
        >>> G @ torch.randn(G.shape[1], 5)                      # five vectors, one pass over the data
        >>> G.block("fc").to_dense()                            # a layer's own matrix
        >>> G.block_diagonal() @ torch.randn(G.shape[1])        # without what is between layers
    """

    def __init__(
        self,
        objective: Objective,
        state: State | None = None,
        *,
        layers: Iterable[str] | str | None = None,
        partition: PartitionSpec = "fused",
        statistics: bool = True,
    ):
        if not objective.has_output:
            raise LossError(
                "The Gauss-Newton matrix is made of the derivatives of the network's output and of the loss in it; a "
                "BatchLoss calls the network itself, so its output is not known. Pass loss_fn(output, target) with "
                "batches (x, y), or use HessianOperator."
            )
        curvature = Curvature("Gauss-Newton matrix", BatchGaussNewton)
        super().__init__(curvature, objective, state, layers=layers, partition=partition, statistics=statistics)
