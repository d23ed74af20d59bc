"""Means over batches of different weights and how far to trust them, and correlations of ranks."""

import math

import numpy as np
from jaxtyping import Float, Real


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
