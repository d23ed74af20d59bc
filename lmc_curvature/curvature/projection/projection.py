"""Loss, slopes and curvature of an objective along a few directions, with the values of every batch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int, Real

from lmc_curvature.averages import GroupMeans, standard_error, weighted_mean, with_error
from lmc_curvature.errors import counted
from lmc_curvature.plotting.summary import Display, Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class Projection(Display):
    """Loss, slopes and curvature at a state θ along k directions u_i, with the values of every batch.

        loss = L(θ),   slopes[i] = ⟨∇L(θ), u_i⟩,   curvature[i, j] = u_iᵀ ∇²L(θ) u_j

    Attributes:
        batch_sizes: Examples in each batch, (batches,). Of more than 512 batches, 2, 4, 8, … neighbouring ones are one
            here and below, as if they had been yielded together.
        batch_losses: Mean loss of each batch, (batches,).
        batch_slopes: Slopes of each batch's loss, (batches, k).
        batch_curvatures: Curvature of each batch's loss, (batches, k, k).
        batch_weights: What each batch counts for in means, (batches,); None where that is its number of examples.
        difference_error: How far curvature by differences, of gradients or losses, may be off, relative to its largest
            entry; None where it is exact, and in files.
    """

    batch_sizes: Int[np.ndarray, " batches"]
    batch_losses: Float[np.ndarray, " batches"]
    batch_slopes: Float[np.ndarray, "batches k"]
    batch_curvatures: Float[np.ndarray, "batches k k"]
    batch_weights: Float[np.ndarray, " batches"] | None = None
    difference_error: float | None = None

    @classmethod
    def of(cls, groups: Sequence[GroupMeans], number: int, difference_error: float | None = None) -> "Projection":
        """The projection at one of several states; groups hold loss, slopes and curvature of each in turn."""
        sizes, weights = (np.array([getattr(group, name) for group in groups]) for name in ("size", "weights"))
        values = zip(*(group.values[3 * number : 3 * number + 3] for group in groups), strict=True)
        losses, slopes, curvatures = map(np.stack, values)
        return cls(sizes, losses, slopes, curvatures, None if (weights == sizes).all() else weights, difference_error)

    def along(self, combinations: Float[np.ndarray, "k m"]) -> "Projection":
        """The projection along m combinations of the k directions: slopes Cᵀs and curvature CᵀMC, of every batch."""
        curvatures = combinations.T @ self.batch_curvatures @ combinations
        return replace(
            self,
            batch_slopes=self.batch_slopes @ combinations,
            # Rounding may make it a little asymmetric.
            batch_curvatures=(curvatures + curvatures.swapaxes(1, 2)) / 2,
        )

    def without(self, batch: int) -> "Projection":
        """The means over all batches but one, as a single batch."""
        total, own = float(self.weights.sum()), float(self.weights[batch])

        def others(mean: np.ndarray | float, values: np.ndarray) -> np.ndarray:
            return np.asarray(total * mean - own * values[batch])[None] / (total - own)

        return Projection(
            np.array([self.examples - self.batch_sizes[batch]]),
            others(self.loss, self.batch_losses),
            others(self.slopes, self.batch_slopes),
            others(self.curvature, self.batch_curvatures),
            np.array([total - own]),
        )

    @property
    def weights(self) -> Real[np.ndarray, " batches"]:
        """What each batch counts for in means over the data."""
        return self.batch_sizes if self.batch_weights is None else self.batch_weights

    @property
    def examples(self) -> int:
        """Number of examples visited."""
        return int(self.batch_sizes.sum())

    @cached_property
    def loss(self) -> float:
        """Mean loss over the data."""
        return float(weighted_mean(self.batch_losses, self.weights))

    @cached_property
    def slopes(self) -> Float[np.ndarray, " k"]:
        """Directional derivatives of the mean loss."""
        return weighted_mean(self.batch_slopes, self.weights)

    @cached_property
    def curvature(self) -> Float[np.ndarray, "k k"]:
        """UᵀHU of the mean loss, symmetric."""
        return weighted_mean(self.batch_curvatures, self.weights)

    @property
    def loss_se(self) -> float:
        """Standard error of `loss`, from the spread between batches; NaN for a single batch."""
        return float(standard_error(self.batch_losses, self.weights))

    @property
    def slopes_se(self) -> Float[np.ndarray, " k"]:
        """Standard errors of `slopes`."""
        return standard_error(self.batch_slopes, self.weights)

    @property
    def curvature_se(self) -> Float[np.ndarray, "k k"]:
        """Standard errors of `curvature`."""
        return standard_error(self.batch_curvatures, self.weights)

    def plot(self) -> "Figure":
        """Draw the curvature between all pairs of directions."""
        from lmc_curvature.curvature.projection.drawing import draw_projection

        return draw_projection(self)

    def _summary(self) -> Summary:
        # Of no directions there is the loss alone.
        facts = {"loss": with_error(self.loss, self.loss_se)}
        if len(self.slopes):
            steepest, sharpest = int(np.abs(self.slopes).argmax()), int(np.abs(np.diag(self.curvature)).argmax())
            slope = with_error(self.slopes[steepest], self.slopes_se[steepest])
            curvature = with_error(self.curvature[sharpest, sharpest], self.curvature_se[sharpest, sharpest])
            facts |= {
                "largest slope": f"{slope} (direction {steepest})",
                "largest curvature": f"{curvature} (direction {sharpest} with itself)",
                "sum of curvature": f"{self.curvature.sum():.4g}",
            }
        if self.difference_error is not None:
            facts["curvature by differences"] = f"off by about {self.difference_error:.1g} of its largest entry"
        batches = counted(len(self.batch_sizes), "batch")
        return Summary(
            f"Projection along {counted(len(self.slopes), 'direction')}, of {counted(self.examples, 'example')} "
            f"in {batches}",
            facts | {"±": "standard errors, from the spread between batches"},
            ".slopes, .curvature, .slopes_se, .curvature_se, .plot()",
            self.plot if len(self.slopes) else None,
        )
