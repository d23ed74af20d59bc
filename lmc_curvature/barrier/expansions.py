"""Barrier curves from the loss, its slope and its curvature at the two ends of a segment.

Every expansion is a polynomial in α whose coefficients are linear in the six endpoint values. So a curve's maximum
is found among the roots of its derivative, and a value's standard error follows from the values of the batches.
"""

from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float
from numpy.polynomial.polynomial import polyder, polyroots, polytrim, polyval

from lmc_curvature.errors import OptionError

Expansion = Literal["second-order", "shared-hessian", "with-slopes", "hermite"]
EXPANSIONS: tuple[Expansion, ...] = get_args(Expansion)


class Endpoint(NamedTuple):
    """Loss L, slope ⟨∇L, P_S Δ⟩ and curvature (P_S Δ)ᵀ H (P_S Δ) at one end: numbers, or arrays over batches."""

    loss: float | np.ndarray
    slope: float | np.ndarray
    curvature: float | np.ndarray


def coefficients(expansion: Expansion, first: Endpoint, second: Endpoint) -> Float[np.ndarray, " powers *batches"]:
    """Coefficients of the barrier curve B(α), the constant first.

    - `"second-order"`: α(1−α)/2 · (α c₁ + (1−α) c₂), Propositions 1 and 2 of Singh et al. 2024;
    - `"shared-hessian"`: α(1−α)/2 · c₁, their eq. 19–21;
    - `"with-slopes"`: second order + α(1−α)(g₁ − g₂), for endpoints that are not stationary;
    - `"hermite"`: the quintic through L, L' and L'' at both ends, minus the chord; for the full segment only.
    """
    (loss_1, slope_1, curvature_1), (loss_2, slope_2, curvature_2) = first, second
    zero = np.zeros_like(np.asarray(curvature_1, dtype=np.float64))
    if expansion == "hermite":
        rise = loss_2 - loss_1
        return np.stack(
            [
                zero,
                slope_1 - rise,
                zero + curvature_1 / 2,
                10 * rise - 6 * slope_1 - 4 * slope_2 - 1.5 * curvature_1 + 0.5 * curvature_2,
                -15 * rise + 8 * slope_1 + 7 * slope_2 + 1.5 * curvature_1 - curvature_2,
                6 * rise - 3 * slope_1 - 3 * slope_2 - 0.5 * curvature_1 + 0.5 * curvature_2,
            ]
        )
    turn = slope_1 - slope_2 if expansion == "with-slopes" else zero
    if expansion == "shared-hessian":
        curvature_2 = curvature_1
    square = curvature_1 / 2 - curvature_2 - turn
    return np.stack([zero, turn + curvature_2 / 2, square, (curvature_2 - curvature_1) / 2])


def peak(curve: Float[np.ndarray, " powers"]) -> float:
    """Position of the maximum of a barrier curve over [0, 1]; 0 when the curve nowhere rises above the chord."""
    slope = polyder(curve)
    # A leading coefficient of rounding size would send the other roots astray.
    roots = polyroots(polytrim(slope, 1e-14 * np.abs(slope).max()))
    inside = [root.real for root in roots if abs(root.imag) < 1e-9 and 1e-9 < root.real < 1 - 1e-9]
    # Barrier curves vanish at both ends; only what rises above them is a peak, and rounding at α = 1 is not.
    candidates = np.array([0.0, *inside])
    return float(candidates[np.argmax(polyval(candidates, curve))])


def check_alphas(alphas: object) -> Float[np.ndarray, " n"]:
    """Positions on the segment, checked, as an array.

    Raises:
        OptionError: They are not numbers in [0, 1], or there is none; names the offending one.
    """
    try:
        positions = np.atleast_1d(np.asarray(alphas, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise OptionError(f"alphas={alphas!r}: expected a sequence of numbers in [0, 1].") from error
    if positions.ndim != 1 or positions.size == 0:
        raise OptionError(f"alphas has shape {positions.shape}; expected a sequence of numbers in [0, 1].")
    outside = positions[~((positions >= 0) & (positions <= 1))]
    if outside.size:
        raise OptionError(f"alpha={outside[0]} lies outside the segment; expected numbers in [0, 1].")
    return positions
