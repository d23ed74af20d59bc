"""Claim: each kind of curve is recognised, and the thresholds are where they are said to be."""

import numpy as np
import pytest

from lmc_curvature.barrier.kinds import classify_curve

ALPHAS = np.linspace(0, 1, 41)
PARABOLA = 4 * ALPHAS * (1 - ALPHAS)


def _peak(centre, width):
    return np.exp(-(((ALPHAS - centre) / width) ** 2)) * PARABOLA**0.2


@pytest.mark.parametrize(
    ("curve", "kind"),
    [
        (0.09 * PARABOLA, "flat"),
        (-0.09 * PARABOLA, "flat"),
        (-PARABOLA, "convex"),
        (PARABOLA, "ridge"),
        (_peak(0.5, 0.1), "bump"),
        (_peak(0.25, 0.1) + _peak(0.75, 0.1), "several peaks"),
        (_peak(0.3, 0.1) - _peak(0.7, 0.1), "mixed"),
        (PARABOLA**0.2 - 0.05 * _peak(0.5, 0.1), "ridge"),
    ],
)
def test_kinds(curve, kind):
    assert classify_curve(ALPHAS, curve, tolerance=0.1) == kind


def test_the_tolerance_decides():
    assert classify_curve(ALPHAS, 0.5 * PARABOLA, tolerance=0.51) == "flat"
    assert classify_curve(ALPHAS, 0.5 * PARABOLA, tolerance=0.49) == "ridge"


def test_half_the_segment_parts_bump_from_ridge():
    for width, kind in ((0.48, "bump"), (0.52, "ridge")):
        triangle = np.clip(1 - np.abs(ALPHAS - 0.5) / width, 0, None)
        # At half its height a triangle is as wide as its half base.
        assert classify_curve(ALPHAS, triangle, tolerance=0.1) == kind


def test_positions_may_come_in_any_order_and_without_the_ends():
    inner = slice(1, -1)
    order = np.random.default_rng(0).permutation(39)
    assert classify_curve(ALPHAS[inner][order], PARABOLA[inner][order], tolerance=0.1) == "ridge"
