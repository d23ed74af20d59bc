"""The Hessian of an objective as a linear operator."""

import functools
from collections.abc import Iterable

from lmc_curvature.curvature.operators.operator import Curvature, CurvatureOperator
from lmc_curvature.curvature.products import BatchGradient
from lmc_curvature.objective.network import State
from lmc_curvature.objective.risk import Objective
from lmc_curvature.segment.partition import PartitionSpec

# Of products, the gradient is only on the way.
_OF_BATCH = functools.partial(BatchGradient, with_slopes=False)


class HessianOperator(CurvatureOperator):
    """The Hessian of an objective, or a block of it, as a linear operator.

        H[i, j] = ∂²L(θ) / ∂θ_i ∂θ_j

    Its arguments and errors are those of `CurvatureOperator`.

    Example:
        >>> H = HessianOperator(objective)
        >>> H @ torch.randn(H.shape[1])                         # a vector: shape (n,)
        >>> H @ torch.randn(H.shape[1], 5)                      # five at once: shape (n, 5), one pass over the data
        >>> H @ segment.directions()["fc"]                      # a direction: a state
        >>> H.block("fc").to_dense()                            # a layer's own Hessian
        >>> H.block("conv1", "fc").shape                        # rows of one layer, columns of another
        >>> H.block_diagonal() @ torch.randn(H.shape[1])        # without what is between layers
        >>> scipy.sparse.linalg.eigsh(H.to_scipy(), k=3)        # extreme eigenpairs
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
        curvature = Curvature("Hessian", _OF_BATCH)
        super().__init__(curvature, objective, state, layers=layers, partition=partition, statistics=statistics)
