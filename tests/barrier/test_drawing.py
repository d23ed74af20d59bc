"""A prediction and a measurement draw the numbers that they hold."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.container import BarContainer
from numpy.testing import assert_allclose, assert_array_equal

from lmc_curvature.barrier.drawing import ALPHAS, EXPANSION_PENS, draw_measurement, draw_prediction
from lmc_curvature.plotting.text import short_number

LABELS = {expansion: pen.label for expansion, pen in EXPANSION_PENS.items()}


def bars(axes):
    """Widths of each group of bars, by label."""
    groups = [group for group in axes.containers if isinstance(group, BarContainer)]
    return {group.get_label(): np.array([bar.get_width() for bar in group]) for group in groups}


def legend_texts(legend):
    return [text.get_text() for text in legend.get_texts()]


def curves_by_name(axes, lines):
    """Curves by the beginning of their label, which goes on with the barrier."""
    return {label.split(":")[0]: data for label, data in lines(axes).items() if not label.startswith("_")}


def half_lengths(collection):
    """Half of the length of each horizontal bar of an error."""
    return [(segment[1, 0] - segment[0, 0]) / 2 for segment in collection.get_segments()]


@pytest.mark.check
@pytest.mark.parametrize(
    ("made", "expected", "bar"),
    [
        ("predictions", ["anchored", "second-order", "with-slopes", "shared-hessian"], "anchored"),
        ("of_two_ends", ["second-order", "with-slopes", "shared-hessian", "hermite"], "second-order"),
    ],
)
def test_a_prediction_shows_its_four_curves_and_its_layers(made, expected, bar, request, saved, uncut, lines):
    prediction = request.getfixturevalue(made)[0]
    figure = prediction.plot()
    saved(figure)
    uncut(figure)
    curves, _, layers = figure.axes
    drawn = curves_by_name(curves, lines)
    drawn.pop("anchors", None)
    assert list(drawn) == [LABELS[expansion] for expansion in expected]
    for expansion in expected:
        assert_array_equal(drawn[LABELS[expansion]], [ALPHAS, prediction.curve(ALPHAS, None, expansion)])
    # One layer at a time is summed up in another order than all at once.
    assert_allclose(bars(layers)[f"predicted, {LABELS[bar]}"], prediction.layer_barriers(bar), rtol=1e-12)
    assert layers.texts[0].get_text() == LABELS[bar]
    assert curves.get_xlabel() == "position α on the segment"
    assert curves.get_ylabel() == layers.get_xlabel() == "barrier (units of the loss)"


@pytest.mark.check
def test_anchors_are_marked_in_a_band_of_the_expansion_error(predictions, lines):
    prediction = predictions[3]
    figure = draw_prediction(prediction)
    curves = figure.axes[0]
    assert_array_equal(curves_by_name(curves, lines)["anchors"], [[0, 0.5, 1], prediction.curve([0.0, 0.5, 1.0])])
    (band,) = curves.collections
    ends = band.get_paths()[0].vertices
    for alpha in (0.25, 0.5, 0.8):
        heights = ends[np.isclose(ends[:, 0], alpha), 1]
        middle, error = prediction.curve([alpha])[0], prediction.expansion_error(alpha=alpha)
        assert_allclose([heights.min(), heights.max()], [middle - error, middle + error])
    texts = legend_texts(figure.axes[1].get_legend())
    assert f"expansion error: ± {short_number(prediction.expansion_error())} at the highest" in texts


def test_without_anchors_between_the_ends_there_is_no_expansion_error(of_two_ends, lines):
    figure = draw_prediction(of_two_ends[3])
    assert "anchors" not in curves_by_name(figure.axes[0], lines)
    assert not figure.axes[0].collections
    assert len(figure.axes[-1].collections) == 1
    errors = [text for text in legend_texts(figure.axes[1].get_legend()) if "error" in text]
    assert errors == ["standard error of a layer"]


def test_layers_stand_in_the_order_of_the_network(predictions):
    layers = draw_prediction(predictions[0]).axes[-1]
    assert [label.get_text() for label in layers.get_yticklabels()] == list(predictions[0].layers)
    assert layers.yaxis_inverted()


def test_bars_of_a_prediction_have_both_its_errors(predictions):
    prediction = predictions[3]
    figure = draw_prediction(prediction)
    broad, thin, of_second_order = figure.axes[-1].collections
    for drawn, expansion in ((thin, "anchored"), (of_second_order, "second-order")):
        expected = [prediction.standard_error([layer], expansion) for layer in prediction.layers]
        assert_allclose(half_lengths(drawn), expected)
    assert_allclose(half_lengths(broad), [prediction.expansion_error([layer]) for layer in prediction.layers])
    legend = figure.axes[1].get_legend()
    handles = dict(zip(legend_texts(legend), legend.legend_handles, strict=True))
    for name, drawn in (("standard error of a layer", thin), ("expansion error of a layer", broad)):
        assert handles[name].get_linewidth() == drawn.get_linewidth()[0]


def test_a_single_batch_has_no_standard_errors(convex):
    figure = draw_prediction(convex[0])
    (broad,) = figure.axes[-1].collections
    assert_allclose(half_lengths(broad), [convex[0].expansion_error([layer]) for layer in convex[0].layers])
    barriers = [text for text in legend_texts(figure.axes[1].get_legend()) if "barrier" in text]
    assert len(barriers) == 4
    assert [text.endswith(" 0") for text in barriers] == ["± unknown (one batch)" not in text for text in barriers]
    assert " ".join(barriers).count("±") == " ".join(barriers).count("± unknown (one batch)") > 0


@pytest.mark.check
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


@pytest.mark.check
def test_nothing_is_imported_for_drawing_before_something_is_drawn():
    code = "import sys, lmc_curvature.barrier.prediction, lmc_curvature.curvature.spectra.density; "
    code += "sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
