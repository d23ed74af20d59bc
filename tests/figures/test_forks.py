"""Barriers by fork and over training are those of the tables; what is not positive stands in the strip."""

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from lmc_curvature.errors import OptionError
from lmc_curvature.figures import draw_barrier_growth, draw_barriers_by_fork

SECOND_ORDER, WITH_SLOPES, HERMITE = "predicted, second order", "predicted, with slopes", "predicted, Hermite"
ANCHORED = "predicted, anchored"


def points(axes, label):
    """Positions, values, and lower and upper ends of the bars of points with errors."""
    (container,) = (group for group in axes.containers if group.get_label() == f"_{label}")
    line, _, (bars,) = container
    # Where there is no point, the segment is empty.
    ends = np.array([segment[:, 1] if len(segment) else (np.nan, np.nan) for segment in bars.get_segments()])
    return *line.get_data(), *ends.T


def strip(axes):
    return next(text.get_position()[1] for text in axes.texts if text.get_text() == "≈ 0")


def strip_top(axes):
    return axes.patches[0].get_extents().transformed(axes.transData.inverted()).y1


def changed(table, values, **where):
    """The table with other barriers in some rows."""
    chosen = np.logical_and.reduce([table[column] == value for column, value in where.items()])
    return table.assign(barrier=table["barrier"].where(~chosen, values))


def test_points_are_the_barriers_at_the_last_epochs(traces, saved, uncut):
    figure = draw_barriers_by_fork(traces.barriers, traces.predictions)
    saved(figure)
    uncut(figure)
    (axes,) = figure.axes
    # The last epoch of all is 8; the barrier is 8 / (1 + fork).
    barriers = np.array([8, 8 / 3, 8 / 6])
    groups = {"measured, train": (1, 0.1), SECOND_ORDER: (2, 0.2), WITH_SLOPES: (1.5, 0.2), HERMITE: (1.2, 0.2)}
    for label, (factor, error) in groups.items():
        positions, values, low, high = points(axes, label)
        # At the tick of the fork: beside it, lines between points would cross where barriers do not.
        assert_array_equal(positions, axes.get_xticks())
        assert_allclose(values, factor * barriers)
        assert_allclose([low, high], [(factor - error) * barriers, (factor + error) * barriers])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(groups)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "2", "5"]
    assert axes.get_yscale() == "log"
    assert not axes.texts


def test_anchored_barriers_stand_beside_the_second_order(anchored, saved, uncut):
    figure = draw_barriers_by_fork(anchored.barriers, anchored.predictions)
    saved(figure)
    uncut(figure)
    (axes,) = figure.axes
    barriers = np.array([8, 8 / 3, 8 / 6])
    positions, values, low, high = points(axes, ANCHORED)
    assert_allclose(positions, np.arange(3))
    assert_allclose(values, 1.1 * barriers)
    assert_allclose([low, high], [0.9 * barriers, 1.3 * barriers])
    (broad,) = (each for each in axes.collections if each.get_label() == f"_{ANCHORED}, expansion error")
    ends = np.array([segment[:, 1] for segment in broad.get_segments()])
    assert_allclose(ends.T, [0.85 * barriers, 1.35 * barriers])
    assert broad.get_alpha() < 0.5
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["measured, train", f"{ANCHORED}\n(pale: expansion error)", SECOND_ORDER]
    assert axes.get_ylim()[1] > ends.max()


def test_an_expansion_error_that_reaches_zero_ends_in_the_strip(anchored):
    predictions = anchored.predictions.assign(expansion_error=2 * anchored.predictions["barrier"])
    (axes,) = draw_barriers_by_fork(anchored.barriers, predictions).axes
    (broad,) = (each for each in axes.collections if each.get_label() == f"_{ANCHORED}, expansion error")
    assert_allclose([segment[0, 1] for segment in broad.get_segments()], strip(axes))


def test_each_fork_is_taken_at_its_own_last_epoch(traces):
    barriers = traces.barriers[(traces.barriers["fork"] != 0) | (traces.barriers["epoch"] < 8)]
    (axes,) = draw_barriers_by_fork(barriers, traces.predictions).axes
    assert_allclose(points(axes, "measured, train")[1], [4, 8 / 3, 8 / 6])
    assert_allclose(points(axes, SECOND_ORDER)[1], [8, 16 / 3, 16 / 6])


def test_test_barriers_stand_beside_predictions_of_the_training_loss(traces):
    figure = draw_barriers_by_fork(traces.barriers, traces.predictions, split="test")
    assert_allclose(points(figure.axes[0], "measured, test")[1], [24, 8, 4])
    assert_allclose(points(figure.axes[0], "predicted (train), second order")[1], [16, 16 / 3, 16 / 6])


@pytest.mark.parametrize("small", [0.0, -0.3, 1e-7])
def test_what_is_not_positive_or_far_too_small_stands_in_the_strip(small, traces, lines, uncut):
    barriers = changed(traces.barriers, small, fork=2)
    predictions = changed(traces.predictions, small, fork=5, expansion="with-slopes")
    figure = draw_barriers_by_fork(barriers, predictions)
    uncut(figure)
    (axes,) = figure.axes
    for label, place in (("measured, train", 1), (WITH_SLOPES, 2)):
        _, values, *_ = points(axes, label)
        in_strip = lines(axes)[f"_{label}, small"][1]
        assert np.flatnonzero(np.isnan(values)) == [place]
        assert np.flatnonzero(np.isfinite(in_strip)) == [place]
        low, floor = axes.get_ylim()[0], strip_top(axes)
        assert low < in_strip[place] < floor
    assert np.isnan(lines(axes)[f"_{SECOND_ORDER}, small"][1]).all()
    hollow = [line for line in axes.get_lines() if line.get_label().endswith(", small")]
    assert {line.get_markerfacecolor() for line in hollow} == {"none"}


def test_a_bar_that_reaches_zero_ends_in_the_strip(traces):
    barriers = traces.barriers.assign(standard_error=2 * traces.barriers["barrier"])
    (axes,) = draw_barriers_by_fork(barriers, traces.predictions).axes
    _, values, low, high = points(axes, "measured, train")
    assert_allclose(low, strip(axes))
    assert_allclose(high, 3 * values)
    assert axes.get_ylim()[1] > high.max()


@pytest.mark.parametrize(("share", "whole"), [(0.85, True), (0.95, False)])
def test_the_axis_reaches_to_the_lower_ends_of_bars_within_a_decade(share, whole, traces):
    barriers = traces.barriers.assign(standard_error=share * traces.barriers["barrier"])
    (axes,) = draw_barriers_by_fork(barriers, traces.predictions).axes
    _, values, low, _ = points(axes, "measured, train")
    assert low[0] == pytest.approx((1 - share) * values[0])
    assert low[2] == pytest.approx((1 - share) * values[2] if whole else strip(axes))


def test_a_fork_without_a_prediction_keeps_its_place(traces, lines):
    predictions = traces.predictions[traces.predictions["fork"] != 2]
    (axes,) = draw_barriers_by_fork(traces.barriers, predictions).axes
    assert_allclose(points(axes, SECOND_ORDER)[1], [16, np.nan, 16 / 6])
    assert np.isnan(lines(axes)[f"_{SECOND_ORDER}, small"][1]).all()


def growth(figure):
    """Fork to its panel."""
    return {int(axes.get_title(loc="left").removeprefix("fork at epoch ")): axes for axes in figure.axes}


@pytest.mark.check
def test_growth_is_the_barriers_over_training(traces, pick, saved, uncut):
    figure = draw_barrier_growth(traces.barriers, traces.predictions)
    saved(figure)
    uncut(figure)
    panels = growth(figure)
    assert list(panels) == [0, 2, 5]
    for fork, axes in panels.items():
        tables = {
            "measured": pick(traces.barriers, fork=fork, split="train", metric="loss"),
            SECOND_ORDER: pick(traces.predictions, fork=fork, expansion="second-order"),
            HERMITE: pick(traces.predictions, fork=fork, expansion="hermite"),
        }
        for label, rows in tables.items():
            epochs, values, low, high = points(axes, label)
            assert_array_equal([epochs, values], rows[["epoch", "barrier"]].to_numpy().T)
            assert_allclose(low, rows["barrier"] - rows["standard_error"])
            assert_allclose(high, rows["barrier"] + rows["standard_error"])
        assert axes.get_ylim() == panels[0].get_ylim()
        assert axes.get_xlim() == panels[0].get_xlim()
    assert [[text.get_text() for text in legend.get_texts()] for legend in figure.legends] == [
        ["measured", HERMITE, SECOND_ORDER],
    ]


@pytest.mark.check
def test_growth_of_anchored_barriers_is_in_a_band_of_their_expansion_errors(anchored, pick, saved, uncut):
    figure = draw_barrier_growth(anchored.barriers, anchored.predictions)
    saved(figure)
    uncut(figure)
    for fork, axes in growth(figure).items():
        rows = pick(anchored.predictions, fork=fork, expansion="anchored")
        epochs, values, *_ = points(axes, ANCHORED)
        assert_array_equal([epochs, values], rows[["epoch", "barrier"]].to_numpy().T)
        (band,) = (each for each in axes.collections if each.get_label() == f"_{ANCHORED}, expansion error")
        corners = band.get_paths()[0].vertices
        for epoch, barrier, error in rows[["epoch", "barrier", "expansion_error"]].to_numpy():
            heights = corners[corners[:, 0] == epoch, 1]
            assert_allclose([heights.min(), heights.max()], [barrier - error, barrier + error])
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["measured", f"{ANCHORED}\n(pale: expansion error)", SECOND_ORDER]


def test_what_is_in_front_is_smaller_so_that_equal_barriers_are_all_seen(anchored):
    (axes,) = draw_barriers_by_fork(anchored.barriers, anchored.predictions).axes
    groups = [group[0] for group in axes.containers]
    assert [line.get_zorder() for line in groups] == sorted((line.get_zorder() for line in groups), reverse=True)
    sizes = [line.get_markersize() for line in groups]
    assert sizes == sorted(set(sizes))


@pytest.mark.check
@pytest.mark.parametrize("epochs", [(2, 4, 6, 8, 10, 12, 14, 16), (1, 2, 4, 6, 8, 10, 14, 17, 20, 24), (7,)])
def test_ticks_stand_at_snapshots_alone_the_last_among_them(epochs, traces):
    tables = []
    for table in (traces.barriers, traces.predictions):
        last = table[table["epoch"] == 8]
        tables.append(pd.concat([last.assign(epoch=epoch) for epoch in epochs]))
    for axes in draw_barrier_growth(*tables).axes:
        axes.figure.draw_without_rendering()
        ticks = axes.get_xticks()
        assert set(ticks) <= set(epochs)
        assert ticks[-1] == epochs[-1]
        assert len(ticks) >= min(len(epochs), 3)
        assert [label.get_text() for label in axes.get_xticklabels()] == [f"{tick:.0f}" for tick in ticks]


@pytest.mark.parametrize("draw", [draw_barriers_by_fork, draw_barrier_growth])
@pytest.mark.parametrize(("small", "text"), [(1.0, None), (-1.0, "(≤ 0"), (1e-7, "over 1e5 times")])
def test_the_legend_says_what_is_hollow_where_something_is(draw, small, text, traces):
    figure = draw(changed(traces.barriers, small, fork=2), traces.predictions)
    entries = {each.get_text(): handle for legend in figure.legends
               for each, handle in zip(legend.get_texts(), legend.legend_handles, strict=True)}  # fmt: skip
    hollow = [name for name, handle in entries.items() if handle.get_markerfacecolor() == "none"]
    assert len(hollow) == (text is not None)
    assert all("grey strip" in name and text in name for name in hollow)


@pytest.mark.parametrize("draw", [draw_barriers_by_fork, draw_barrier_growth])
def test_a_logarithmic_axis_says_that_it_is_one_and_has_one_notation(draw, traces):
    # Ticks from 1 down to 1e-4.
    tables = [table.assign(barrier=0.1 * table["barrier"]) for table in (traces.barriers, traces.predictions)]
    figure = draw(changed(tables[0], 1e-4, fork=5), tables[1])
    axes = figure.axes[0]
    assert axes.get_yscale() == "log"
    assert "log scale" in axes.get_ylabel() + figure.get_supylabel()
    figure.draw_without_rendering()
    numbers = [label.get_text() for label in axes.get_yticklabels()]
    assert len(numbers) >= 5
    assert all("10^" in number for number in numbers)


@pytest.mark.check(after=1)
@pytest.mark.parametrize("forks", [range(3), range(5), range(8)])
def test_no_place_of_a_panel_is_empty(forks, traces):
    tables = [
        pd.concat([table[table["fork"] == 0].assign(fork=fork) for fork in forks])
        for table in (traces.barriers, traces.predictions)
    ]
    figure = draw_barrier_growth(*tables)
    rows, columns = figure.axes[0].get_subplotspec().get_gridspec().get_geometry()
    places = [axes.get_subplotspec().num1 for axes in figure.axes]
    legends = [sub._subplotspec for sub in figure.subfigs if sub.legends]
    places += [number for spec in legends for number in range(spec.num1, spec.num2 + 1)]
    assert sorted(places) == list(range(rows * columns))
    # Where there is no place to fill, the legend stands above.
    assert len(figure.legends) == (not legends)


@pytest.mark.check(after=1)
@pytest.mark.parametrize("forks", [[0], [0, 2]])
@pytest.mark.parametrize("made", ["anchored", "traces"])
def test_legends_have_room_over_few_panels(made, forks, request, uncut):
    tables = request.getfixturevalue(made)
    few = [table[table["fork"].isin(forks)] for table in (tables.barriers, tables.predictions)]
    uncut(draw_barrier_growth(*few))
    uncut(draw_barriers_by_fork(*few))


def test_in_the_strip_every_kind_has_a_row(traces, lines):
    predictions = changed(traces.predictions, 0.0, epoch=4)
    panels = growth(draw_barrier_growth(changed(traces.barriers, 0.0, epoch=4), predictions))
    for fork, at in ((0, 1), (2, 0)):
        axes = panels[fork]
        floor = axes.patches[0].get_extents().transformed(axes.transData.inverted()).y1
        drawn = lines(axes)
        heights = []
        for label in ("measured", SECOND_ORDER, HERMITE):
            epochs, values = drawn[f"_{label}, small"]
            assert epochs[np.isfinite(values)].tolist() == [4]
            heights.append(values[at])
            assert np.isnan(points(axes, label)[1]).tolist() == [number == at for number in range(len(epochs))]
        assert floor > heights[0] > heights[1] > heights[2] > axes.get_ylim()[0]


def test_a_fork_of_a_single_epoch_is_visible(traces):
    figure = draw_barrier_growth(*(t[t["epoch"] == 8] for t in (traces.barriers, traces.predictions)))
    for axes in figure.axes:
        assert len(axes.containers) == 3
        assert all(group[0].get_marker() in ("o", "s", "^") for group in axes.containers)


def test_a_fork_that_was_only_predicted_has_a_panel(traces):
    axes = growth(draw_barrier_growth(traces.barriers[traces.barriers["fork"] != 2], traces.predictions))[2]
    assert_allclose(points(axes, SECOND_ORDER)[:2], [[4, 8], [8 / 3, 16 / 3]])
    assert {group.get_label() for group in axes.containers} == {f"_{SECOND_ORDER}", f"_{HERMITE}"}


def test_expansions_that_were_not_traced_are_left_out(traces):
    predictions = traces.predictions[traces.predictions["expansion"] != "hermite"]
    for draw in (draw_barriers_by_fork, draw_barrier_growth):
        figure = draw(traces.barriers, predictions)
        assert HERMITE not in [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda b, p: draw_barriers_by_fork(b, p, split="val"), "of barriers has no rows with split='val'"),
        (
            lambda b, p: draw_barriers_by_fork(b, p[p["epoch"] < 8]),
            "of predictions has no barrier for the last epochs measured: fork 0 at epoch 8, fork 2 at epoch 8, fork 5",
        ),
        (
            lambda b, p: draw_barriers_by_fork(b[b["metric"] == "error"], p),
            "of barriers has no rows with metric='loss': choose from 'error'",
        ),
        (
            lambda b, p: draw_barriers_by_fork(b, p.replace("hermite", "anchored")),
            "of predictions has no column 'expansion_error'",
        ),
        (
            lambda b, p: draw_barrier_growth(b[b["split"] == "test"], p),
            "of barriers has no rows with split='train'",
        ),
        (
            lambda b, p: draw_barrier_growth(b, p[p["expansion"] == "with-slopes"]),
            "of predictions has no rows with expansion='second-order': choose from 'with-slopes'",
        ),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(draw, message, traces):
    with pytest.raises(OptionError, match=message):
        draw(traces.barriers, traces.predictions)
