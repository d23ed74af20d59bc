"""The sketch says what the paper says: the earlier the fork, the higher and the wider the ridge between siblings."""

import numpy as np
import pytest
from matplotlib.text import Annotation, Text
from numpy.testing import assert_allclose

from lmc_curvature.figures import draw_mountainside
from lmc_curvature.figures.mountainside import (
    EARLY_FORK,
    EARLY_SIBLINGS,
    LATE_FORK,
    LATE_SIBLINGS,
    PARENT,
    RIDGES,
    between,
    height,
)

PAIRS = {"early": (EARLY_FORK, EARLY_SIBLINGS), "late": (LATE_FORK, LATE_SIBLINGS)}


@pytest.fixture(scope="module")
def figure():
    return draw_mountainside()


def width(way, ridge):
    """Full width at half maximum."""
    return np.ptp(way[ridge > ridge.max() / 2])


@pytest.mark.check
def test_the_early_ridge_is_higher_and_wider_than_the_late_one(figure, lines):
    drawn = lines(figure.axes[1])
    for name, (_, siblings) in PAIRS.items():
        assert_allclose(drawn[name], between(siblings))
    (early_way, early), (late_way, late) = drawn["early"], drawn["late"]
    assert early.max() > 3 * late.max() > 0
    assert width(early_way, early) > 3 * width(late_way, late)
    # And early siblings end farther apart.
    assert np.ptp(early_way) > 3 * np.ptp(late_way)


def test_the_ground_in_closed_form():
    across = np.linspace(-1, 1, 7)
    # At the top there is no ridge yet; at the foot all have their full height.
    assert_allclose(height(across, np.zeros(7)), 1.0)
    bells = [ridge.height * np.exp(-(((across - ridge.across) / ridge.width) ** 2)) for ridge in RIDGES]
    assert_allclose(height(across, np.ones(7)), np.sum(bells, axis=0))


@pytest.mark.parametrize("name", PAIRS)
def test_a_ridge_is_the_ground_above_the_chord(name):
    _, siblings = PAIRS[name]
    ends = np.array([[path.points()[0][-1], path.points()[1][-1]] for path in siblings])
    way, barrier = between(siblings, points=3)
    ground = [float(height(*np.array(point)[:, None])[0]) for point in (ends[0], ends.mean(axis=0), ends[1])]
    assert_allclose(barrier, [0, ground[1] - (ground[0] + ground[2]) / 2, 0], atol=1e-12)
    assert_allclose(way[[0, -1]], np.array([-0.5, 0.5]) * np.linalg.norm(ends[1] - ends[0]))


@pytest.mark.parametrize("name", PAIRS)
def test_siblings_leave_the_parent_at_the_fork_and_a_ridge_begins_below_it(name):
    fork, siblings = PAIRS[name]
    # The parent is at the height of the fork where the siblings begin.
    across, down = PARENT.points()
    assert np.interp(fork[1], down, across) == pytest.approx(fork[0], abs=1e-3)
    for path in siblings:
        assert (path.points()[0][0], path.points()[1][0]) == pytest.approx(fork)
    (parting,) = (ridge for ridge in RIDGES if np.isclose(ridge.across, fork[0]))
    assert siblings[0].across < parting.across < siblings[1].across
    assert parting.start > fork[1]


@pytest.mark.parametrize("path", [PARENT, *EARLY_SIBLINGS, *LATE_SIBLINGS])
def test_every_path_leads_down(path):
    assert (np.diff(height(*path.points())) < 0).all()


@pytest.mark.check
def test_paths_and_segments_lie_on_the_ground(figure, saved):
    saved(figure)
    drawn = {line.get_label(): line.get_data_3d() for line in figure.axes[0].get_lines()}
    paths = {"parent", *(f"{name} sibling {number}" for name in PAIRS for number in (1, 2))}
    assert paths | {"early segment", "late segment"} <= set(drawn)
    for x, y, z in drawn.values():
        assert_allclose(np.asarray(z), height(np.asarray(x), 1 - np.asarray(y)), atol=0.01)
    for name in PAIRS:
        ends = [drawn[f"{name} sibling {number}"][0][-1] for number in (1, 2)]
        assert_allclose(drawn[f"{name} segment"][0][[0, -1]], ends)


@pytest.mark.check
def test_it_says_that_it_is_a_sketch(figure):
    assert figure.get_suptitle() == "sketch: the mountain is a formula, not the loss of a network"


def test_no_name_is_cut_or_crossed_by_a_curve(figure, uncut):
    uncut(figure)
    axes = figure.axes[1]
    for text in axes.texts:
        box = Text.get_window_extent(text)
        for line in axes.get_lines():
            assert not box.count_contains(axes.transData.transform(line.get_xydata())), text.get_text()
    # Nor does any leader cross one.
    assert not any(isinstance(text, Annotation) and text.arrow_patch for text in axes.texts)
