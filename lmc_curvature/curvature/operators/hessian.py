"""The Hessian of an objective as a linear operator."""

from collections.abc import Sequence

from lmc_curvature.curvature.operators.operator import CurvatureOperator
from lmc_curvature.curvature.products.gradient import BatchGradient
from lmc_curvature.objective.batches import Batch


class HessianOperator(CurvatureOperator):
    """The Hessian of an objective, or a block of it, as a linear operator.

        H[i, j] = ∂²L(θ) / ∂θ_i ∂θ_j

    A product visits the loader once, whatever the number of vectors: on each batch they share the graph of its
    gradient. Under `"interpolate"` the running statistics are among the coordinates.

    Example:
        >>> H = HessianOperator(objective)
        >>> H.shape                                             # (n, n)
        >>> H @ torch.randn(H.shape[1])                         # a vector: shape (n,)
        >>> H @ torch.randn(H.shape[1], 5)                      # five at once: shape (n, 5), one pass over the data
        >>> H @ segment.directions()["fc"]                      # a direction: a state
        >>> H.block("fc").to_dense()                            # a layer's own Hessian
        >>> H.block("conv1", "fc").shape                        # rows of one layer, columns of another
        >>> H.block_diagonal() @ torch.randn(H.shape[1])        # without what is between layers
        >>> scipy.sparse.linalg.eigsh(H.to_scipy(), k=3)        # extreme eigenpairs

    Args:
        objective: The loss and its data.
        state: Where to differentiate; the objective's own state by default.
        layers: Restrict rows and columns to a set of layers; None for the whole network.
        partition: How the network is cut into layers; see `LayerPartition.of`.

    Raises:
        PartitionError: `layers` names an unknown layer.
        DirectionError: The state has an unknown entry or a wrong shape.
        NonFiniteError: The state, a vector or the loss of a batch is not finite; names the entry or the batch.
    """

    _name = "Hessian"

    def _on_batch(self, batch: Batch, entries: Sequence[str]) -> BatchGradient:
        gradient = BatchGradient(self.objective, self.point, batch, entries)
        if batch.index == 0:
            gradient.check_twice_differentiable()
        return gradient
