"""Claim: an expansion's coefficients are its formula, its peak is the maximum, its ends vanish."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.polynomial.polynomial import polyval
from scipy.interpolate import BPoly

from lmc_curvature.barrier.expansions import EXPANSIONS, Endpoint, check_alphas, coefficients, peak
from lmc_curvature.errors import OptionError

numbers = st.floats(-10, 10)
endpoints = st.builds(Endpoint, numbers, numbers, numbers)
ALPHAS = np.linspace(0, 1, 201)


@given(endpoints, endpoints)
def test_curves_are_the_formulas(first, second):
    a, g1, g2, c1, c2 = ALPHAS, first.slope, second.slope, first.curvature, second.curvature
    expected = {
        "second-order": a * (1 - a) / 2 * (a * c1 + (1 - a) * c2),
        "shared-hessian": a * (1 - a) / 2 * c1,
        "with-slopes": a * (1 - a) / 2 * (a * c1 + (1 - a) * c2) + a * (1 - a) * (g1 - g2),
        "hermite": BPoly.from_derivatives([0, 1], [[first.loss, g1, c1], [second.loss, g2, c2]])(a)
        - ((1 - a) * first.loss + a * second.loss),
    }
    for expansion in EXPANSIONS:
        found = polyval(a, coefficients(expansion, first, second))
        np.testing.assert_allclose(found, expected[expansion], atol=1e-10)


@given(st.sampled_from(EXPANSIONS), endpoints, endpoints)
def test_peak_is_the_maximum(expansion, first, second):
    curve = coefficients(expansion, first, second)
    position = peak(curve)
    assert 0 <= position <= 1
    assert polyval(position, curve) >= polyval(ALPHAS, curve).max() - 1e-9


def test_coefficients_take_a_value_a_batch():
    first, second = (Endpoint(*np.random.default_rng(seed).normal(size=(3, 5))) for seed in (0, 1))
    for expansion in EXPANSIONS:
        together = polyval(ALPHAS, coefficients(expansion, first, second))
        assert together.shape == (5, len(ALPHAS))
        one = coefficients(expansion, Endpoint(*(v[2] for v in first)), Endpoint(*(v[2] for v in second)))
        np.testing.assert_allclose(together[2], polyval(ALPHAS, one), atol=1e-12)


@pytest.mark.parametrize(
    ("alphas", "message"),
    [
        ([0.5, 1.2], r"alpha=1.2 lies outside the segment; expected numbers in \[0, 1\]"),
        ([float("nan")], "alpha=nan lies outside"),
        ([], "expected a sequence"),
        ([[0.1], [0.2]], r"shape \(2, 1\)"),
        ("half", "'half'.*expected a sequence of numbers"),
    ],
)
def test_bad_positions_are_named(alphas, message):
    with pytest.raises(OptionError, match=message):
        check_alphas(alphas)


@given(st.sampled_from(EXPANSIONS), endpoints, endpoints)
def test_a_peak_rises_or_lies_at_exactly_zero(expansion, first, second):
    curve = coefficients(expansion, first, second)
    position = peak(curve)
    height = polyval(position, curve)
    assert height > 0 or (position == 0 and height == 0)


@pytest.mark.parametrize("expansion", ["second-order", "shared-hessian"])
def test_a_convex_curve_has_no_peak(expansion):
    ends = Endpoint(1.0, 0.3, -1.1), Endpoint(1.0, -0.2, -0.7)
    assert peak(coefficients(expansion, *ends)) == 0
