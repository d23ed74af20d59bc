"""Logarithmic axes hold the positive values, and a strip at their foot holds the others."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from lmc_curvature.plotting.decades import decades, decades_axis
from lmc_curvature.plotting.style import new_figure


def ticks(axes):
    return [value for value in axes.get_yticks() if axes.get_ylim()[0] <= value <= axes.get_ylim()[1]]


@pytest.mark.parametrize(
    ("values", "on_axis"),
    [
        ([1, 20, 300], [True, True, True]),
        ([0, -3, 2], [False, False, True]),
        ([1, 0.5e-5, 0.9e-5], [True, False, True]),
        ([np.nan, 1, np.inf], [False, True, False]),
        ([0, -1], [False, False]),
    ],
)
def test_values_stand_on_the_axis_or_in_the_strip(values, on_axis):
    values, on_axis = np.array(values, dtype=float), np.array(on_axis)
    scale = decades(values)
    known = np.isfinite(values)
    assert_array_equal(scale.above(values)[known], np.where(on_axis, values, np.nan)[known])
    assert_array_equal(np.isnan(scale.below(values)), on_axis | ~known | (values > 0) & ~known)
    # There is a strip if something has to stand in it.
    assert (scale.low < scale.floor) == bool((known & ~on_axis).any())
    assert 0 < scale.low <= scale.strip <= scale.floor < scale.high
    shown = values[on_axis]
    assert ((scale.floor < shown) & (shown < scale.high)).all()


@pytest.mark.parametrize(("largest", "strip"), [(2.0, 0.1), (1e5, 0.1), (2.0, 0.12)])
def test_the_strip_takes_the_same_share_of_any_axis(largest, strip):
    scale = decades(np.array([0, 1.0, largest]), strip=strip)
    height = np.log(scale.high / scale.low)
    assert_allclose(np.log(scale.floor / scale.low) / height, strip)
    small = np.array([0.0])
    for share in (0.25, 0.5, 0.75):
        assert_allclose(np.log(scale.below(small, share) / scale.low) / height, strip * share)
    assert_allclose(scale.below(small), scale.strip)


@pytest.mark.parametrize(
    ("values", "expected"), [([1, 1.2], [1]), ([1, 30], [1, 2, 5, 10, 20]), ([1e-3, 10], [1e-3, 0.01, 0.1, 1, 10])]
)
def test_ticks_are_few_and_round(values, expected):
    axes = new_figure(3.0, 3.0).add_subplot()
    decades_axis(axes, decades(np.array(values, dtype=float)))
    assert_allclose(ticks(axes), expected)
    assert not axes.texts
    assert not axes.patches


def test_the_strip_is_shaded_and_has_no_ticks():
    axes = new_figure(3.0, 3.0).add_subplot()
    scale = decades(np.array([0.0, 1, 1e3]))
    decades_axis(axes, scale)
    assert axes.get_yscale() == "log"
    assert axes.get_ylim() == (scale.low, scale.high)
    (shade,) = axes.patches
    assert_allclose(shade.get_extents().transformed(axes.transData.inverted()).intervaly, [scale.low, scale.floor])
    (name,) = axes.texts
    assert (name.get_text(), name.get_position()[1]) == ("≈ 0", scale.strip)
    assert min(ticks(axes)) > scale.floor


@pytest.mark.parametrize(("smallest", "most", "cut"), [(1e-6, 5, True), (1e-6, 7, False), (-1.0, 5, False)])
def test_the_scale_says_whether_it_cuts_positive_values_off(smallest, most, cut):
    assert decades(np.array([smallest, 1.0]), most=most).cut == cut


def test_both_axes_may_have_a_strip():
    axes = new_figure(3.0, 3.0).add_subplot()
    scale = decades(np.array([0.0, 1, 1e5]))
    for name in ("x", "y"):
        decades_axis(axes, scale, name, below="≤ 0", clear=0.06, powers=True)
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert axes.get_xlim() == axes.get_ylim() == (scale.low, scale.high)
    assert [text.get_text() for text in axes.texts] == ["≤ 0", "≤ 0"]
    # The first power of ten stands too close to what is written beside the strip.
    assert_allclose(axes.get_xticks(), [10, 100, 1e3, 1e4, 1e5])
    axes.figure.draw_without_rendering()
    assert axes.get_xticklabels()[0].get_text() == "$\\mathdefault{10^{1}}$"
