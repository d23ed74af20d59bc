"""Angles, distances and planes of siblings are those of the table."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from lmc_curvature.figures import draw_sibling_angles, draw_sibling_distances, draw_solution_planes


def of_forks(lines, axes):
    """Fork to the data of its line."""
    return {int(label[1:]): data for label, data in lines(axes).items() if label[1:].isdigit()}


def colors(axes):
    return {line.get_label(): line.get_color() for line in axes.get_lines() if line.get_label()[1:].isdigit()}


def test_angles_are_the_arccosines_in_degrees(traces, pick, lines, saved, uncut):
    figure = draw_sibling_angles(traces.geometry)
    saved(figure)
    uncut(figure)
    for axes, column, title in zip(figure.axes, ("cosine_origin", "cosine_fork"), ("origin", "fork"), strict=True):
        drawn = of_forks(lines, axes)
        assert list(drawn) == [0, 2, 5]
        for fork, data in drawn.items():
            rows = pick(traces.geometry, fork=fork)
            assert_allclose(data, [rows["epoch"], np.degrees(np.arccos(rows[column]))])
        assert axes.get_title(loc="left") == f"seen from the {title}"
        assert_array_equal(lines(axes)["_right angle"][1], 90)
    # By hand, at epoch 8: cosines of 1/2 and -1/2.
    assert [of_forks(lines, axes)[5][1][-1] for axes in figure.axes] == pytest.approx([60, 120])
    assert colors(figure.axes[0]) == colors(figure.axes[1])
    assert len(set(colors(figure.axes[0]).values())) == 3


def test_axes_hold_all_angles_and_rounding_gives_no_gap(traces, lines):
    for cosine, angle in ((1 + 1e-12, 0), (-1 - 1e-12, 180)):
        axes = draw_sibling_angles(traces.geometry.assign(cosine_fork=cosine)).axes[1]
        assert_allclose(of_forks(lines, axes)[0][1], angle)
        assert axes.get_ylim()[0] == 0
        assert axes.get_ylim()[1] > max(angle, 90)


def test_what_has_no_angle_leaves_the_lines_and_colours_of_others_alone(traces, lines):
    geometry = traces.geometry
    unknown = (geometry["fork"] == 0) | (geometry["epoch"] == 6)
    figure = draw_sibling_angles(geometry.assign(cosine_fork=geometry["cosine_fork"].mask(unknown)))
    everything = draw_sibling_angles(geometry)
    from_fork = of_forks(lines, figure.axes[1])
    assert {fork: data[0].tolist() for fork, data in from_fork.items()} == {2: [4, 8], 5: [8]}
    assert colors(figure.axes[1]).items() < colors(everything.axes[1]).items()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["0", "2", "5"]


@pytest.mark.check
@pytest.mark.parametrize(
    ("draw", "column"), [(draw_solution_planes, "cosine_final"), (draw_sibling_distances, "distance")]
)
def test_lines_are_the_columns(draw, column, traces, pick, lines, saved, uncut):
    figure = draw(traces.geometry)
    saved(figure)
    uncut(figure)
    (axes,) = figure.axes
    for fork, data in of_forks(lines, axes).items():
        assert_array_equal(data, pick(traces.geometry, fork=fork)[["epoch", column]].to_numpy().T)
    assert axes.get_ylim()[0] == 0
    assert (axes.get_xlabel(), figure.legends[0].get_title().get_text()) == ("epoch", "fork at epoch")


def test_negative_cosines_are_within_the_axes(traces):
    geometry = traces.geometry.assign(cosine_final=np.where(traces.geometry["epoch"] == 2, -0.4, 1.0))
    low, high = draw_solution_planes(geometry).axes[0].get_ylim()
    assert low < -0.4
    assert high > 1
