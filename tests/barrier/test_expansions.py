"""Claim: expansions are their formulas, and their maxima are found."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.interpolate import BPoly

from lmc_curvature.barrier.blending import Features, combine
from lmc_curvature.barrier.expansions import EXPANSIONS, barrier_weights, check_alphas, check_anchors, highest
from lmc_curvature.errors import OptionError

numbers = st.floats(-10, 10)
ends = st.tuples(*[st.tuples(numbers, numbers, numbers)] * 2)
ALPHAS = np.linspace(0, 1, 201)


def _curve(expansion, known, alphas=ALPHAS, positions=(0.0, 1.0)):
    """The curve of the whole network, from loss, slope and curvature at each anchor."""
    loss, slope, curvature = (np.array(column)[:, None] for column in zip(*known, strict=True))
    weights = barrier_weights(expansion, np.array(positions), alphas, np.ones_like(alphas))
    return combine(weights, Features(loss, slope, curvature, slope, curvature, curvature))


@given(ends)
def test_curves_are_the_formulas(known):
    a, ((first, g1, c1), (second, g2, c2)) = ALPHAS, known
    quintic = BPoly.from_derivatives([0, 1], known)(a) - ((1 - a) * first + a * second)
    expected = {
        "second-order": a * (1 - a) / 2 * (a * c1 + (1 - a) * c2),
        "shared-hessian": a * (1 - a) / 2 * c1,
        "with-slopes": a * (1 - a) / 2 * (a * c1 + (1 - a) * c2) + a * (1 - a) * (g1 - g2),
        "hermite": quintic,
        "anchored": quintic,
    }
    for expansion in EXPANSIONS:
        np.testing.assert_allclose(_curve(expansion, known), expected[expansion], atol=1e-10)


@pytest.mark.parametrize("expansion", ["hermite", "anchored"])
def test_curves_of_the_whole_network_go_through_all_anchors(expansion):
    positions, known = [0.0, 0.2, 0.7, 1.0], np.random.default_rng(0).normal(size=(4, 3))
    chord = (1 - ALPHAS) * known[0, 0] + ALPHAS * known[-1, 0]
    expected = BPoly.from_derivatives(positions, known)(ALPHAS) - chord
    np.testing.assert_allclose(_curve(expansion, known, positions=positions), expected, atol=1e-12)


@pytest.mark.check
@settings(deadline=None)
@given(st.sampled_from(EXPANSIONS), ends)
@example("second-order", ((0.0, 0.0, 0.03125), (0.0, 0.0, -4.0)))  # above the chord in the last hundredth alone
def test_the_highest_point_is_the_maximum(expansion, known):
    (position,) = highest(lambda alpha: _curve(expansion, known, alpha), 1)
    height = _curve(expansion, known, np.array([position]))[0]
    assert 0 <= position <= 1
    assert height > 0 or (position == 0 and height == 0)
    fine = np.linspace(0, 1, 20_001)
    assert height >= _curve(expansion, known, fine).max() - 1e-9


def test_many_curves_have_their_own_maxima():
    centres = np.array([0.1, 0.123456, 0.5, 0.9])
    found = highest(lambda alpha: 1 - (alpha - centres) ** 2, 4)
    np.testing.assert_allclose(found, centres, atol=1e-7)
    assert highest(lambda alpha: alpha * (alpha - 1) + 0 * centres, 4).tolist() == [0, 0, 0, 0]


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


def test_anchors_are_a_number_or_positions():
    assert check_anchors(3).tolist() == [0, 0.5, 1]
    assert check_anchors((0, 0.3, 1)).tolist() == [0, 0.3, 1]
    for bad in (
        1,
        True,
        [0.5],
        [0, 1.5],
        [0.1, 1],
        [0, 0.5, 0.5, 1],
        [1, 0],
        "three",
        None,
        [[0, 1]],
        [0, float("nan"), 1],
    ):
        with pytest.raises(OptionError, match="anchors="):
            check_anchors(bad)
