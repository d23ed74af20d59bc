"""Figures of barriers show the numbers of the predictions and measurements they are given."""

import numpy as np
import pytest
from matplotlib.container import BarContainer
from numpy.testing import assert_allclose, assert_array_equal

from lmc_curvature.errors import OptionError, PartitionError
from lmc_curvature.figures import draw_barrier_curves, draw_layer_bars, draw_measurement, draw_prediction
from lmc_curvature.figures.panels import ALPHAS, number_with_error, short_number

EXPANSIONS = {
    "second order": "second-order",
    "with slopes": "with-slopes",
    "shared Hessian": "shared-hessian",
    "Hermite": "hermite",
}


def bars(axes):
    """Widths of each group of bars, by label."""
    groups = [group for group in axes.containers if isinstance(group, BarContainer)]
    return {group.get_label(): np.array([bar.get_width() for bar in group]) for group in groups}


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def legend_texts(legend):
    return [text.get_text() for text in legend.get_texts()]


def test_a_prediction_shows_its_four_curves_and_its_layers(predictions, saved, lines):
    prediction = predictions[0]
    figure = prediction.plot()
    saved(figure)
    curves, _, layers = figure.axes
    drawn = {label.split(":")[0]: data for label, data in lines(curves).items() if not label.startswith("_")}
    assert list(drawn) == list(EXPANSIONS)
    for label, expansion in EXPANSIONS.items():
        assert_array_equal(drawn[label], [ALPHAS, prediction.curve(ALPHAS, None, expansion)])
    assert_array_equal(bars(layers)["predicted, second order"], prediction.layer_barriers())
    assert curves.get_xlabel() == "position α on the segment"
    assert curves.get_ylabel() == layers.get_xlabel() == "barrier (units of the loss)"


def test_layers_stand_in_the_order_of_the_network(predictions):
    layers = draw_prediction(predictions[0]).axes[-1]
    assert [label.get_text() for label in layers.get_yticklabels()] == list(predictions[0].layers)
    assert layers.yaxis_inverted()


def test_bars_of_a_prediction_have_its_standard_errors(predictions):
    prediction = predictions[3]
    layers = draw_prediction(prediction).axes[-1]
    (segments,) = [collection.get_segments() for collection in layers.collections]
    halves = [(segment[1, 0] - segment[0, 0]) / 2 for segment in segments]
    assert_allclose(halves, [prediction.standard_error([layer]) for layer in prediction.layers])


def test_a_single_batch_has_no_standard_errors(convex):
    figure = draw_prediction(convex[0])
    assert not figure.axes[-1].collections
    assert "±" not in " ".join(legend_texts(figure.axes[1].get_legend()))


def test_a_measurement_shows_its_metrics_and_its_layers(measurements, saved, lines):
    measurement = measurements[0]
    figure = measurement.plot()
    saved(figure)
    loss, error, layers = figure.axes
    for axes, metric in ((loss, "loss"), (error, "error")):
        drawn = lines(axes)
        assert_array_equal(drawn["measured"], [measurement.alphas, measurement.values(metric)])
        assert_array_equal(drawn["chord between the ends"], [[0, 1], measurement.ends(metric)])
        assert titles(figure)[:2] == ["loss along the segment", "error along the segment"]
        ((bottom, top),) = axes.collections[0].get_segments()
        assert_allclose(top - bottom, [0, max(measurement.barrier(metric), 0)])
    assert_array_equal(bars(layers)["measured"], measurement.layer_barriers())
    assert loss.get_ylabel() == "loss (units of the loss)"
    assert error.get_ylabel() == "error (share of examples)"


def test_a_measurement_of_the_loss_alone_has_one_panel(two_sided):
    _, measurement = two_sided(sets=())
    figure = draw_measurement(measurement)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert "no barrier: nowhere above the chord" in [text.get_text() for text in axes.texts]


def test_every_fork_has_its_curves_in_the_order_of_the_epochs(predictions, measurements, saved):
    figure = draw_barrier_curves(predictions, measurements)
    saved(figure)
    assert titles(figure) == ["fork at epoch 0", "fork at epoch 3", "fork at epoch 8"]
    for axes, epoch in zip(figure.axes, (0, 3, 8), strict=True):
        prediction, measurement = predictions[epoch], measurements[epoch]
        measured, second, _, slopes = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
        assert_array_equal(measured.get_data(), [measurement.alphas, measurement.curve()])
        assert_array_equal(second.get_data(), [ALPHAS, prediction.curve(ALPHAS)])
        assert_array_equal(slopes.get_data(), [ALPHAS, prediction.curve(ALPHAS, expansion="with-slopes")])
        assert second.get_linestyle() != slopes.get_linestyle()
        assert legend_texts(axes.get_legend()) == [
            short_number(measurement.barrier()),
            short_number(prediction.barrier()),
            f"‖Δ‖ = {short_number(prediction.distance, 3)}",
            short_number(prediction.barrier(expansion="with-slopes")),
        ]
    assert legend_texts(figure.legends[0]) == ["measured", "predicted, second order", "predicted, with slopes"]
    assert figure.get_supylabel() == "barrier (units of the loss)"


def test_scales_are_shared_only_within_an_order_of_magnitude(predictions, measurements):
    apart = draw_barrier_curves(predictions, measurements)
    assert len({axes.get_ylim() for axes in apart.axes}) == 3
    alike = draw_barrier_curves({0: predictions[0], 1: predictions[0]}, {0: measurements[0], 1: measurements[0]})
    assert len({axes.get_ylim() for axes in alike.axes}) == 1


def test_every_fork_has_its_layer_bars(predictions, measurements, saved, lines):
    figure = draw_layer_bars(predictions, measurements)
    saved(figure)
    for axes, epoch in zip(figure.axes, (0, 3, 8), strict=True):
        prediction, drawn = predictions[epoch], bars(axes)
        assert_array_equal(drawn["measured"], measurements[epoch].layer_barriers())
        assert_array_equal(drawn["predicted, second order"], prediction.layer_barriers())
        assert_array_equal(lines(axes)["predicted, with slopes"][0], prediction.layer_barriers("with-slopes"))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(predictions[0].layers)
    assert not any(label.get_text() for label in figure.axes[1].get_yticklabels())


def test_the_legend_of_layer_bars_names_what_it_shows(predictions, measurements):
    figure = draw_layer_bars(predictions, measurements)
    handles = figure.legends[0].legend_handles
    bar_colors = [group[0].get_facecolor() for group in figure.axes[0].containers if isinstance(group, BarContainer)]
    assert legend_texts(figure.legends[0]) == ["measured", "predicted, second order", "predicted, with slopes"]
    assert [handle.get_facecolor() for handle in handles[:2]] == bar_colors
    assert handles[2].get_marker() == "D"


def test_sets_of_several_layers_are_predicted_as_sets(two_sided):
    prediction, measurement = two_sided(sets=[["u", "v"], ["v"]])
    figure = draw_layer_bars({0: prediction}, {0: measurement})
    assert_array_equal(
        bars(figure.axes[0])["predicted, second order"], [prediction.barrier(["u", "v"]), prediction.barrier(["v"])]
    )
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["u + v", "v"]
    titled = draw_layer_bars({0: prediction}, {0: measurement}, titles={("u", "v"): "both"})
    assert [label.get_text() for label in titled.axes[0].get_yticklabels()] == ["both", "v"]


@pytest.mark.parametrize("draw", [draw_barrier_curves, draw_layer_bars])
def test_barriers_of_zero_are_drawn(draw, convex):
    prediction, measurement = convex
    assert measurement.barrier() == 0 < prediction.barrier()
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


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.00288, "0.0029"),
        (2.0, "2.0"),
        (123.4, "123"),
        (-0.5, "−0.50"),
        (5.4e-5, "5.4e−5"),
        (0.0, "0"),
        (2e5, "2.0e5"),
    ],
)
def test_short_numbers(value, text):
    assert short_number(value) == text


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.00288, 0.0004, "0.0029 ± 0.0004"),
        (9.6e-4, 7e-5, "(9.6 ± 0.7)e−4"),
        (2.5, float("nan"), "2.5"),
        (0.0, 0.0, "0"),
        (12.0, 30.0, "12 ± 30"),
    ],
)
def test_numbers_with_errors(value, error, text):
    assert number_with_error(value, error) == text
