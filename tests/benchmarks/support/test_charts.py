import itertools

import pytest

from benchmarks.support import charts
from benchmarks.support.timing import Spread


@pytest.mark.parametrize(
    ("heights", "places"),
    [
        ([0.0, 10.0], [0.0, 10.0]),
        ([0.0, 1.0], [-1.5, 2.5]),
        # The third comes too close only once the first two have parted.
        ([0.0, 1.0, 5.0], [-2.0, 2.0, 6.0]),
        ([0.0, 20.0, 20.0, 20.0], [0.0, 16.0, 20.0, 24.0]),
        ([], []),
    ],
)
def test_numbers_part_no_farther_than_they_must(heights, places):
    assert charts.spread_out(heights, 4.0) == pytest.approx(places)


def test_numbers_at_the_ends_of_curves_do_not_cover_one_another():
    lines = [
        charts.Line(f"road {k}", [1, 10, 100], [Spread.exactly(y) for y in (1.0, 30.0, 900.0 + 10 * k)], 1.5)
        for k in range(4)
    ]
    (axes,) = charts.draw_panels([charts.Panel("time", "size", "milliseconds", lines)]).axes
    axes.figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
    assert len(boxes) == 4
    assert all(below.y1 <= above.y0 for below, above in itertools.pairwise(boxes))


@pytest.mark.parametrize(("values", "scale"), [((5.6, 6.2), "linear"), ((1.0, 6.2), "log")])
def test_points_close_to_each_other_have_an_axis_from_zero(values, scale):
    shown = {name: Spread.exactly(value) for name, value in zip(("ours", "theirs"), values, strict=True)}
    figure = charts.draw_points(shown, ["ours"], "seconds")
    (axes,) = figure.axes
    assert axes.get_xscale() == scale
    assert (axes.get_xlim()[0] == 0) == (scale == "linear")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["this library", "others"]
