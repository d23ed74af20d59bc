"""The barrier between several networks and their mean, for any set of layers, from the lines through that mean.

The mean of N networks is θ̄ = Σ_k w_k θ_k. A set S of layers is moved there from every network in turn, while its other
layers stay (for two networks, with w = (1 − α, α), the barrier B_S(α) of Adilova et al. 2023):

    B_S = Σ_k w_k L(θ_k with S at θ̄) − Σ_k w_k L(θ_k)

On the spoke of network k, the line from θ_k through θ̄ to the mean of the others, θ̄ lies at 1 − w_k; so the network
whose loss is asked for is the point (1 − w_k) 1_S of the spoke's cube of layers, and its loss is blended from the
anchors at θ_k, at θ̄ and at the mean of the others as every loss in a cube is; see `barrier/blending.py`. For all layers
it is θ̄ itself, an anchor, whose loss is known.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float

from lmc_curvature.barrier.cube import Cube, blend_error
from lmc_curvature.barrier.prediction import BarrierPrediction


@dataclass(frozen=True, eq=False)
class Mean:
    """The mean of several networks, and what is known of the loss on the lines through it.

    Attributes:
        weights: What each network counts for, (N,).
        spokes: The prediction on each network's spoke.
    """

    weights: Float[np.ndarray, " N"]
    spokes: Sequence[BarrierPrediction]

    @cached_property
    def cubes(self) -> list[Cube]:
        """The cube of layers of every spoke."""
        return [Cube(spoke.layers, spoke.anchors) for spoke in self.spokes]

    def barriers(self, members: Bool[np.ndarray, "sets L"]) -> Float[np.ndarray, " sets"]:
        """B_S of each set of layers, with its sign."""
        return self.weights @ np.stack([cube.rises(x) for cube, x in self._points(members)])

    def batch_barriers(self, members: Bool[np.ndarray, " L"]) -> Float[np.ndarray, " batches"]:
        """B_S of a set by every batch, with the weights of all anchors held fixed."""
        rises = [
            cube.batch_losses(x[0]) - cube.anchors[0].projection.batch_losses for cube, x in self._points(members[None])
        ]
        return self.weights @ np.stack(rises)

    def expansion_errors(self, members: Bool[np.ndarray, "sets L"]) -> Float[np.ndarray, " sets"]:
        """How far `barriers` may be off, apart from sampling, by the rule for two networks; zero for all layers."""
        far, ways = zip(*(cube.doubts(x) for cube, x in self._points(members)), strict=True)
        of_sum = np.tensordot(self.weights, np.stack(ways), 1)
        return (self.weights @ np.stack(far)) * blend_error(of_sum, self.barriers(members))

    def _points(self, members: np.ndarray) -> list[tuple[Cube, np.ndarray]]:
        """Every spoke's cube with its points, at which the sets are at the mean of all."""
        return [
            (cube, (1 - weight) * members.astype(np.float64))
            for cube, weight in zip(self.cubes, self.weights, strict=True)
        ]
