"""Barrier curves and bars of layers are those of the predictions and measurements, a panel a fork."""

import numpy as np
import pytest
from matplotlib.container import BarContainer
from numpy.testing import assert_array_equal

from lmc_curvature.barrier.drawing import ALPHAS
from lmc_curvature.errors import OptionError, PartitionError
from lmc_curvature.figures import draw_barrier_curves, draw_layer_bars
from lmc_curvature.plotting.text import short_number


def bars(axes):
    """Widths of each group of bars, by label."""
    groups = [group for group in axes.containers if isinstance(group, BarContainer)]
    return {group.get_label(): np.array([bar.get_width() for bar in group]) for group in groups}


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def legend_texts(legend):
    return [text.get_text() for text in legend.get_texts()]


ANCHORED = ("anchored", "second-order"), ["predicted, anchored", "predicted, second order"]
OF_TWO_ENDS = ("second-order", "with-slopes"), ["predicted, second order", "predicted, with slopes"]
EITHER = pytest.mark.parametrize(("made", "expected"), [("predictions", ANCHORED), ("of_two_ends", OF_TWO_ENDS)])


@pytest.mark.check
@EITHER
def test_every_fork_has_its_curves_in_the_order_of_the_epochs(made, expected, request, measurements, saved, uncut):
    predictions, (expansions, names) = request.getfixturevalue(made), expected
    figure = draw_barrier_curves(predictions, measurements)
    saved(figure)
    uncut(figure)
    assert titles(figure) == ["fork at epoch 0", "fork at epoch 3", "fork at epoch 8"]
    for axes, epoch in zip(figure.axes, (0, 3, 8), strict=True):
        prediction, measurement = predictions[epoch], measurements[epoch]
        measured, first, _, second = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
        assert_array_equal(measured.get_data(), [measurement.alphas, measurement.curve()])
        for line, expansion in zip((first, second), expansions, strict=True):
            assert_array_equal(line.get_data(), [ALPHAS, prediction.curve(ALPHAS, None, expansion)])
        assert first.get_linestyle() != second.get_linestyle()
        assert legend_texts(axes.get_legend()) == [
            short_number(measurement.barrier()),
            short_number(prediction.barrier(None, expansions[0])),
            f"‖Δ‖ = {short_number(prediction.distance, 3)}",
            short_number(prediction.barrier(None, expansions[1])),
        ]
    marks = ["anchors", "expansion error"] if expansions[0] == "anchored" else []
    assert legend_texts(figure.legends[0]) == ["measured", *names, *marks]
    assert figure.get_supylabel() == "barrier (units of the loss)"


def test_anchored_curves_have_their_anchors_and_expansion_errors(predictions, measurements, lines):
    figure = draw_barrier_curves(predictions, measurements)
    for axes, epoch in zip(figure.axes, (0, 3, 8), strict=True):
        prediction = predictions[epoch]
        assert_array_equal(lines(axes)["_anchors"], [[0, 0.5, 1], prediction.curve([0.0, 0.5, 1.0])])
        (band,) = axes.collections
        heights = band.get_paths()[0].vertices
        heights = heights[np.isclose(heights[:, 0], 0.25), 1]
        assert np.ptp(heights) == pytest.approx(2 * prediction.expansion_error(alpha=0.25))


@pytest.mark.check(after=1)
@EITHER
@pytest.mark.parametrize("draw", [draw_barrier_curves, draw_layer_bars])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_legends_have_room_over_any_number_of_panels(draw, count, made, expected, request, measurements, uncut):
    predictions = request.getfixturevalue(made)
    uncut(draw(dict.fromkeys(range(count), predictions[3]), dict.fromkeys(range(count), measurements[3])))


def test_predictions_with_and_without_anchors_stand_side_by_side(predictions, of_two_ends, measurements):
    mixed = {0: predictions[0], 3: of_two_ends[3]}
    for draw in (draw_barrier_curves, draw_layer_bars):
        texts = " ".join(legend_texts(draw(mixed, {key: measurements[key] for key in mixed}).legends[0]))
        assert all(name in texts for name in ("measured", "anchored", "second order", "with slopes"))


def test_scales_are_shared_only_within_an_order_of_magnitude(predictions, measurements):
    apart = draw_barrier_curves(predictions, measurements)
    assert len({axes.get_ylim() for axes in apart.axes}) == 3
    alike = draw_barrier_curves({0: predictions[0], 1: predictions[0]}, {0: measurements[0], 1: measurements[0]})
    assert len({axes.get_ylim() for axes in alike.axes}) == 1


@pytest.mark.check
@EITHER
def test_every_fork_has_its_layer_bars(made, expected, request, measurements, saved, uncut, lines):
    predictions, (expansions, names) = request.getfixturevalue(made), expected
    figure = draw_layer_bars(predictions, measurements)
    saved(figure)
    uncut(figure)
    for axes, epoch in zip(figure.axes, (0, 3, 8), strict=True):
        prediction, drawn = predictions[epoch], bars(axes)
        assert_array_equal(drawn["measured"], measurements[epoch].layer_barriers())
        for shown, expansion in ((drawn[names[0]], expansions[0]), (lines(axes)[names[1]][0], expansions[1])):
            assert_array_equal(shown, [prediction.barrier([layer], expansion) for layer in prediction.layers])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(predictions[0].layers)
    assert not any(label.get_text() for label in figure.axes[1].get_yticklabels())


@pytest.mark.check
@EITHER
def test_bars_and_diamonds_of_layers_have_their_standard_errors(made, expected, request, measurements):
    predictions, (expansions, _) = request.getfixturevalue(made), expected
    figure = draw_layer_bars(predictions, measurements)
    for axes, epoch in zip(figure.axes, (0, 3, 8), strict=True):
        prediction = predictions[epoch]
        drawn = [np.array([np.ptp(part[:, 0]) / 2 for part in each.get_segments()]) for each in axes.collections]
        by_expansion = [
            [prediction.standard_error([layer], expansion) for layer in prediction.layers] for expansion in expansions
        ]
        for errors in (measurements[epoch].layer_standard_errors(), *by_expansion):
            assert any(np.allclose(each, errors) for each in drawn)


@pytest.mark.check
@EITHER
def test_the_legend_of_layer_bars_names_what_it_shows(made, expected, request, measurements):
    predictions, (expansions, names) = request.getfixturevalue(made), expected
    figure = draw_layer_bars(predictions, measurements)
    handles = figure.legends[0].legend_handles
    bar_colors = [group[0].get_facecolor() for group in figure.axes[0].containers if isinstance(group, BarContainer)]
    errors = ["standard error", *(["expansion error"] if expansions[0] == "anchored" else [])]
    assert legend_texts(figure.legends[0]) == ["measured", *names, *errors]
    assert [handle.get_facecolor() for handle in handles[:2]] == bar_colors
    assert handles[2].get_marker() == "D"


def test_sets_of_several_layers_are_predicted_as_sets(two_sided):
    prediction, measurement = two_sided(sets=[["u", "v"], ["v"]])
    figure = draw_layer_bars({0: prediction}, {0: measurement})
    assert_array_equal(
        bars(figure.axes[0])["predicted, anchored"], [prediction.barrier(["u", "v"]), prediction.barrier(["v"])]
    )
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["u + v", "v"]
    titled = draw_layer_bars({0: prediction}, {0: measurement}, titles={("u", "v"): "both"})
    assert [label.get_text() for label in titled.axes[0].get_yticklabels()] == ["both", "v"]


@pytest.mark.parametrize("draw", [draw_barrier_curves, draw_layer_bars])
def test_barriers_of_zero_are_drawn(draw, convex):
    prediction, measurement = convex
    assert measurement.barrier() == 0 < prediction.barrier(None, "second-order")
    draw({0: prediction}, {0: measurement}).draw_without_rendering()


@pytest.mark.parametrize("draw", [draw_barrier_curves, draw_layer_bars])
def test_negative_barriers_are_drawn(draw, two_sided):
    prediction, measurement = two_sided(alphas=[0.25, 0.5])
    assert measurement.barrier() < 0
    assert (measurement.layer_barriers() < 0).all()
    draw({0: prediction}, {0: measurement}).draw_without_rendering()


@pytest.mark.parametrize("draw", [draw_barrier_curves, draw_layer_bars])
def test_labels_other_than_epochs_stand_as_they_are(draw, predictions, measurements):
    labels = {"warm": 3, "cold": 0}
    figure = draw({k: predictions[e] for k, e in labels.items()}, {k: measurements[e] for k, e in labels.items()})
    assert titles(figure) == ["warm", "cold"]


def test_epochs_may_be_numpy_integers(predictions, measurements, untyped):
    epochs = np.array([3])
    figure = draw_barrier_curves({epochs[0]: predictions[3]}, {3: measurements[3]})
    assert titles(figure) == ["fork at epoch 3"]


@pytest.mark.parametrize("draw", [draw_barrier_curves, draw_layer_bars])
def test_forks_must_be_the_same_in_both(draw, predictions, measurements):
    with pytest.raises(OptionError, match=r"predicted are \[0\], those measured \[3\]"):
        draw({0: predictions[0]}, {3: measurements[3]})
    with pytest.raises(OptionError, match="at least one"):
        draw({}, {})


def test_layer_bars_need_measured_layers_of_the_same_partition(predictions, convex, two_sided):
    _, measurement = two_sided(sets=())
    with pytest.raises(OptionError, match="pass sets="):
        draw_layer_bars({0: convex[0]}, {0: measurement})
    with pytest.raises(PartitionError):
        draw_layer_bars({0: predictions[0]}, {0: convex[1]})
