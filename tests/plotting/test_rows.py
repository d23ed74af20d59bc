"""Rows carry their names, or some of them where there are many, and bars with errors."""

import numpy as np
import pytest

from lmc_curvature.plotting.rows import Bars, draw_rows, rows_height
from lmc_curvature.plotting.style import new_figure


def names_beside(axes):
    return [label.get_text() for label in axes.get_yticklabels() if label.get_text()]


@pytest.mark.parametrize(("count", "step"), [(3, 1), (60, 1), (70, 2), (200, 4)])
def test_names_stand_beside_every_nth_row(count, step):
    axes = new_figure(3.0, 3.0).add_subplot()
    names = [f"layer {number}" for number in range(count)]
    draw_rows(axes, names, [Bars("bars", np.ones(count), "black")])
    assert names_beside(axes) == names[::step]
    assert axes.yaxis_inverted()
    assert rows_height(count, 0.1) == pytest.approx(0.1 * min(max(count, 4), 60))


def test_rows_may_be_without_names_and_errors_are_drawn_where_known():
    axes = new_figure(3.0, 3.0).add_subplot()
    values = np.array([1.0, 2.0])
    draw_rows(
        axes,
        ["u", "v"],
        [Bars("known", values, "black", values), Bars("unknown", values, "black", np.nan * values)],
        label_rows=False,
    )
    assert not names_beside(axes)
    assert len(axes.collections) == 1


def test_broad_errors_are_drawn_behind_thin_ones():
    axes = new_figure(3.0, 3.0).add_subplot()
    values = np.array([1.0, 2.0])
    draw_rows(axes, ["u", "v"], [Bars("both", values, "black", 0.1 * values, 0.5 * values)])
    broad, thin = axes.collections
    for drawn, share in ((broad, 0.5), (thin, 0.1)):
        ends = np.array([segment[:, 0] for segment in drawn.get_segments()])
        np.testing.assert_allclose(ends, np.outer(values, [1 - share, 1 + share]))
    assert broad.get_linewidth() > thin.get_linewidth()
    assert broad.get_color()[0, 3] < thin.get_color()[0, 3]
