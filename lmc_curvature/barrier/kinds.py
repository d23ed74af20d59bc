"""Names for the shapes of barrier curves (Singh et al. 2024, Figure 7)."""

from typing import Literal

import numpy as np
from jaxtyping import Float

CurveKind = Literal["flat", "convex", "bump", "ridge", "several peaks", "mixed"]


def classify_curve(alphas: Float[np.ndarray, " n"], curve: Float[np.ndarray, " n"], *, tolerance: float) -> CurveKind:
    """Name the shape of a barrier curve B(α).

    With t the tolerance, in units of the curve:

    - `"flat"`: |B| ≤ t everywhere, so the networks are linearly mode connected and so are all between them;
    - `"convex"`: B ≤ t everywhere, and below −t somewhere: the networks in between are better than the chord;
    - `"mixed"`: above t somewhere and below −t elsewhere;
    - `"several peaks"`: above t, with at least two maxima parted by a dip deeper than t;
    - `"bump"`: one peak above t, no wider at half its height than half the segment;
    - `"ridge"`: one peak above t, wider than that (the parabola α(1−α) has a width of 0.71).

    Args:
        alphas: Positions in [0, 1].
        curve: B at the positions.
        tolerance: Largest height that counts as zero. `BarrierMeasurement.kind` uses 2 % of (1 + the higher end's
            loss), after the 2 % that Frankle et al. (2020) allow a stable network.
    """
    order = np.argsort(alphas)
    # B vanishes at both ends whether or not they were measured.
    alphas = np.concatenate([[0.0], alphas[order], [1.0]])
    curve = np.concatenate([[0.0], curve[order], [0.0]])
    rises, sinks = bool(curve.max() > tolerance), bool(curve.min() < -tolerance)
    if not rises:
        return "convex" if sinks else "flat"
    if sinks:
        return "mixed"
    if _deepest_dip(curve) > tolerance:
        return "several peaks"
    return "ridge" if _width_at_half_height(alphas, curve) > 0.5 else "bump"


def _deepest_dip(curve: Float[np.ndarray, " n"]) -> float:
    """Return the depth to which the curve sinks between two of its points that are both higher."""
    walls = np.minimum(np.maximum.accumulate(curve), np.maximum.accumulate(curve[::-1])[::-1])
    return float((walls - curve).max())


def _width_at_half_height(alphas: Float[np.ndarray, " n"], curve: Float[np.ndarray, " n"]) -> float:
    """Length of the part of [0, 1] where the piecewise linear curve exceeds half its maximum."""
    fine = np.linspace(0.0, 1.0, 2001)
    return float((np.interp(fine, alphas, curve) > curve.max() / 2).mean())
