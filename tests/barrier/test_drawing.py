"""A prediction and a measurement draw the numbers that they hold."""

import subprocess
import sys

import numpy as np
from matplotlib.container import BarContainer
from numpy.testing import assert_allclose, assert_array_equal

from lmc_curvature.barrier.drawing import ALPHAS, EXPANSION_PENS, draw_measurement, draw_prediction

EXPANSIONS = {pen.label: expansion for expansion, pen in EXPANSION_PENS.items()}


def bars(axes):
    """Widths of each group of bars, by label."""
    groups = [group for group in axes.containers if isinstance(group, BarContainer)]
    return {group.get_label(): np.array([bar.get_width() for bar in group]) for group in groups}


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
        assert axes.get_title(loc="left") == f"{metric} along the segment"
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


def test_expansions_differ_in_colour_and_in_line_style():
    assert len({pen.color for pen in EXPANSION_PENS.values()}) == len(EXPANSION_PENS)
    assert len({pen.linestyle for pen in EXPANSION_PENS.values()}) == len(EXPANSION_PENS)


def test_nothing_is_imported_for_drawing_before_something_is_drawn():
    code = "import sys, lmc_curvature.barrier.prediction, lmc_curvature.curvature.spectra.density; "
    code += "sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
