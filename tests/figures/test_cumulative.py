"""Cumulative barriers are those of the table, a panel a fork."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from lmc_curvature.errors import OptionError
from lmc_curvature.figures import draw_cumulative_barriers


def headings(figure):
    return [(axes.get_title(loc="left"), axes.texts[0].get_text()) for axes in figure.axes]


@pytest.mark.check
@pytest.mark.parametrize("forks", [[0], [0, 2, 5]])
def test_curves_are_those_of_the_last_epoch(forks, traces, pick, lines, saved, uncut):
    figure = draw_cumulative_barriers(traces.cumulative[traces.cumulative["fork"].isin(forks)])
    saved(figure)
    uncut(figure)
    assert headings(figure) == [(f"fork at epoch {fork}", "siblings at epoch 8") for fork in forks]
    for fork, axes in zip(forks, figure.axes, strict=True):
        drawn = lines(axes)
        for side in ("first", "last"):
            rows = pick(traces.cumulative, fork=fork, epoch=8, side=side).sort_values("count")
            for column in ("measured", "predicted", "predicted_shared"):
                assert_array_equal(drawn[f"_{side}, {column}"], rows[["count", column]].to_numpy().T)
        assert len(drawn) == 7  # and the line at zero
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "first k layers",
        "last k layers",
        "measured",
        "predicted, shared Hessian",
        "predicted, second order",
    ]


@pytest.mark.check
def test_anchored_predictions_take_the_place_of_one_end(anchored, pick, lines, saved, uncut):
    figure = draw_cumulative_barriers(anchored.cumulative)
    saved(figure)
    uncut(figure)
    for fork, axes in zip((0, 2, 5), figure.axes, strict=True):
        drawn = lines(axes)
        for side in ("first", "last"):
            rows = pick(anchored.cumulative, fork=fork, epoch=8, side=side).sort_values("count")
            assert_array_equal(
                drawn[f"_{side}, predicted_anchored"], rows[["count", "predicted_anchored"]].to_numpy().T
            )
        assert len(drawn) == 7
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[2:] == ["measured", "predicted, anchored", "predicted, second order"]


def test_measured_barriers_have_bars_and_anchored_ones_bands_of_their_errors(anchored, pick, uncut):
    table = anchored.cumulative.assign(
        measured_se=0.1 * anchored.cumulative["measured"],
        expansion_error=0.3 * anchored.cumulative["measured"],
    )
    figure = draw_cumulative_barriers(table)
    uncut(figure)
    for fork, axes in zip((0, 2, 5), figure.axes, strict=True):
        for side in ("first", "last"):
            rows = pick(table, fork=fork, epoch=8, side=side).sort_values("count")
            (group,) = (each for each in axes.containers if each.get_label() == f"_{side}, measured, error")
            (bars,) = group[2]
            ends = np.array([segment[:, 1] for segment in bars.get_segments()]).T
            assert_allclose(ends, np.outer([0.9, 1.1], rows["measured"]))
            (band,) = (each for each in axes.collections if each.get_label() == f"_{side}, expansion error")
            corners = band.get_paths()[0].vertices
            for _, row in rows.iterrows():
                heights = corners[corners[:, 0] == row["count"], 1]
                middle = row["predicted_anchored"]
                expected = [middle - row["expansion_error"], middle + row["expansion_error"]]
                assert_allclose([heights.min(), heights.max()], expected)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[2] == "measured ± standard error"
    assert texts[-1] == "expansion error"


def test_a_column_without_a_number_is_as_none(traces, lines):
    figure = draw_cumulative_barriers(traces.cumulative.assign(predicted_anchored=float("nan")))
    assert "_first, predicted_shared" in lines(figure.axes[0])


def test_colours_tell_sides_apart_and_line_styles_what_they_are(traces):
    drawn = {line.get_label()[1:]: line for line in draw_cumulative_barriers(traces.cumulative).axes[0].get_lines()}
    drawn.pop("zero")
    for of, look in ((0, "get_color"), (1, "get_linestyle")):
        looks = {}
        for label, line in drawn.items():
            looks.setdefault(label.split(", ")[of], set()).add(getattr(line, look)())
        assert all(len(each) == 1 for each in looks.values())
        assert len(set.union(*looks.values())) == len(looks)


def test_at_an_epoch_only_forks_that_have_it_are_drawn(traces):
    figure = draw_cumulative_barriers(traces.cumulative, epoch=4)
    assert headings(figure) == [(f"fork at epoch {fork}", "siblings at epoch 4") for fork in (0, 2)]


@pytest.mark.parametrize(("factor", "shared"), [(1, True), (1e-3, False)])
def test_panels_of_one_order_of_magnitude_have_one_scale(factor, shared, traces):
    table = traces.cumulative
    small = table["fork"] == 5
    for column in ("measured", "predicted", "predicted_shared"):
        table = table.assign(**{column: table[column].where(~small, factor * table[column])})
    limits = [axes.get_ylim() for axes in draw_cumulative_barriers(table).axes]
    assert (len(set(limits)) == 1) == shared
    # The highest is of fork 5: 2 (predicted) * 2 (last) * 4 layers * 8 / 6.
    assert limits[2][1] > factor * 16 * 8 / 6


def test_an_unknown_epoch_is_named(traces):
    with pytest.raises(OptionError, match="cumulative barriers has no rows at epoch 7; it has epochs 2, 4, 6, 8"):
        draw_cumulative_barriers(traces.cumulative, epoch=7)
