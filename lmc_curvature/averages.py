"""Means over batches of different weights and how far to trust them, and correlations of ranks."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Real

from lmc_curvature.errors import OptionError

# Groups of batches that are kept, each with values of its own.
_MOST = 512
# Batches below which their skewness says nothing.
_FEW = 5


def weighted_mean(values: Float[np.ndarray, " batches *shape"], weights: Real[np.ndarray, " batches"]) -> np.ndarray:
    """Mean over the data, from per-batch means and what each batch counts for; float64, of shape `shape`."""
    return np.asarray(np.tensordot(weights / weights.sum(), values, axes=1))


def standard_error(values: Float[np.ndarray, " batches *shape"], weights: Real[np.ndarray, " batches"]) -> np.ndarray:
    """Standard error of `weighted_mean`, from the spread between batches; NaN for a single batch that counts.

    With weights w_b that sum to one and B batches, the variance of the mean is estimated by
    B / (B − 1) · Σ_b w_b² (x_b − x̄)² (Cochran 1977, §6.4: the linearised ratio estimator).
    """
    batches = np.count_nonzero(weights)
    if batches < 2:
        return np.full(values.shape[1:], np.nan)
    deviations = values - weighted_mean(values, weights)
    shares = weights / weights.sum()
    return np.asarray(np.sqrt(batches / (batches - 1) * np.tensordot(shares**2, deviations**2, axes=1)))


@dataclass(frozen=True, eq=False)
class GroupMeans:
    """Means over the examples of one batch, or of a group of neighbouring ones.

    Attributes:
        index: Place of the first batch in the loader.
        size: Number of examples.
        weights: What it counts for in means over the data, of some shape: one number, or one a metric.
        values: Arrays whose first axes are those of the weights.
    """

    index: int
    size: int
    weights: Float[np.ndarray, "*w"]
    values: tuple[Float[np.ndarray, "..."], ...]

    def joined(self, other: "GroupMeans") -> "GroupMeans":
        """The group of both: x̄ = x̄₁ + w₂ / (w₁ + w₂) · (x̄₂ − x̄₁)."""
        # Sums of arrays without dimensions are plain numbers.
        weights = np.asarray(self.weights + other.weights)
        share = np.divide(other.weights, weights, out=np.zeros_like(weights), where=weights != 0)
        values = (
            np.asarray(first + share.reshape(share.shape + (1,) * (first.ndim - share.ndim)) * (second - first))
            for first, second in zip(self.values, other.values, strict=True)
        )
        return GroupMeans(min(self.index, other.index), self.size + other.size, weights, tuple(values))


def add_batch(groups: list[GroupMeans], batch: GroupMeans) -> None:
    """Add a batch to groups, which are joined once they are many."""
    groups.append(batch)
    if len(groups) > _MOST:
        groups[:] = grouped(groups)


def grouped(batches: Iterable[GroupMeans], most: int | None = None) -> list[GroupMeans]:
    """Batches, or groups of them, joined into at most so many groups (512), in the order of the loader.

    Group g is of the batches g · n to (g + 1) · n − 1, with the smallest power of two for n: which they are does not
    depend on how often, and by how many processes, batches were grouped before.
    """
    most = _MOST if most is None else most
    ordered, width = sorted(batches, key=lambda batch: batch.index), 1
    while ordered and ordered[-1].index // width >= most:
        width *= 2
    groups: dict[int, GroupMeans] = {}
    for batch in ordered:
        number = batch.index // width
        groups[number] = groups[number].joined(batch) if number in groups else batch
    return list(groups.values())


def interval(
    values: Float[np.ndarray, " batches"], weights: Real[np.ndarray, " batches"], level: float | int = 0.95
) -> tuple[float, float]:
    """An interval that holds the mean over all data in so many cases; NaN for a single batch.

    With t the quantile of Student's distribution with one degree of freedom less than there are batches that count, it
    is x̄ ± t · SE for fewer than five. Of more, the skewness γ is known well enough to be taken into account: batches in
    which rare examples are all that counts have a mean that is too low more often than not. With B batches,

        x̄ − SE · g⁻¹(± t),    g(z) = z + γ / (3√B) · z² + γ² / (27 B) · z³ + γ / (6√B)

    which is near to normal (Hall 1992, "On the removal of skewness by transformation", eq. 2.6).

    Raises:
        OptionError: The level is not between 0 and 1.
    """
    from scipy.stats import t

    if not 0 < level < 1:
        raise OptionError(f"level={level!r}: expected a share between 0 and 1, such as 0.95.")
    mean, error = float(weighted_mean(values, weights)), float(standard_error(values, weights))
    batches = int(np.count_nonzero(weights))
    quantile = float(t.ppf((1 + level) / 2, max(batches - 1, 1)))
    slope = _skewness(values, weights) / math.sqrt(batches) if batches >= _FEW and error > 0 else 0.0
    below, above = (error * _without_skewness(sign * quantile, slope) for sign in (1, -1))
    return mean - below, mean - above


def _skewness(values: Float[np.ndarray, " batches"], weights: Real[np.ndarray, " batches"]) -> float:
    """γ of what each batch adds to the mean, B² / ((B − 1)(B − 2)) · ⟨d³⟩ / s³."""
    batches = np.count_nonzero(weights)
    parts = (weights * (values - weighted_mean(values, weights)))[weights != 0]
    deviation = math.sqrt(np.sum(parts**2) / (batches - 1))
    return float(batches**2 / ((batches - 1) * (batches - 2)) * np.mean((parts / deviation) ** 3))


def _without_skewness(z: float, slope: float) -> float:
    """g⁻¹(z), for γ / √B."""
    z -= slope / 6
    return z if abs(slope) < 1e-9 else float((np.cbrt(1 + slope * z) - 1) * 3 / slope)


def with_error(value: float, error: float, digits: int = 4, *, of: str = "") -> str:
    """A number and its standard error: 0.1234 ± 0.012; that it is unknown, where a single batch does not tell it.

    Args:
        value: The number.
        error: Its standard error.
        digits: Digits of the number.
        of: What the error is called in parentheses behind it.
    """
    if not math.isfinite(error):
        return f"{value:.{digits}g} ± unknown (one batch)"
    return f"{value:.{digits}g} ± {error:.2g}" + (f" ({of})" if of else "")


def rank_correlation(first: Float[np.ndarray, " n"], second: Float[np.ndarray, " n"]) -> float:
    """Spearman's ρ over the pairs that are finite; NaN for fewer than three, or where one side is constant."""
    from scipy.stats import spearmanr

    pairs = np.stack([first, second])
    pairs = pairs[:, np.isfinite(pairs).all(axis=0)]
    if pairs.shape[1] < 3 or (np.ptp(pairs, axis=1) == 0).any():
        return math.nan
    return float(np.asarray(spearmanr(*pairs))[0])
