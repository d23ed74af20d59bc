"""The figure of predicted against measured barriers: no point is lost, and the correlation is scipy's."""

from itertools import product

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from scipy.stats import spearmanr

from lmc_curvature.errors import OptionError
from lmc_curvature.figures import draw_predicted_against_measured


def small_print(axes):
    return next(text.get_text() for text in axes.texts if text.get_text().startswith("Spearman"))


@pytest.mark.check
def test_points_are_the_barriers(predictions, measurements, saved, lines):
    figure = draw_predicted_against_measured(predictions, measurements)
    saved(figure)
    # Anchored above, of second order below.
    for epoch, expansion in product(predictions, ("anchored", "second-order")):
        whole, layers = figure.axes[:2] if expansion == "anchored" else figure.axes[2:]
        prediction = predictions[epoch]
        expected = np.array([[measurements[epoch].barrier()], [prediction.barrier(None, expansion)]])
        predicted = [prediction.barrier([layer], expansion) for layer in prediction.layers]
        by_layer = np.array([measurements[epoch].layer_barriers(), predicted])
        for axes, barriers in ((whole, expected), (layers, by_layer)):
            positive = (barriers > 0).all(axis=0)
            assert_array_equal(lines(axes)[f"_{epoch}"], barriers[:, positive])
            assert lines(axes)[f"_{epoch}, small"].shape == (2, (~positive).sum())


@pytest.mark.check
def test_axes_are_logarithmic_alike_and_labelled(predictions, measurements):
    panels = draw_predicted_against_measured(predictions, measurements).axes
    assert len(panels) == 4
    for number, axes in enumerate(panels):
        assert axes.get_xscale() == axes.get_yscale() == "log"
        assert axes.get_xlim() == axes.get_ylim()
        assert axes.get_xlabel() == "measured barrier\n(units of the loss, log scale)"
        expansion = "anchored" if number < 2 else "second order"
        assert axes.get_ylabel() == f"predicted barrier, {expansion}\n(units of the loss, log scale)"


def bars(axes, label):
    """Lengths of the lower and upper half of the bars along each axis, (bars, halves), from their middles."""
    (group,) = (each for each in axes.containers if each.get_label() == label)
    return [np.array(part.get_segments()) for part in group[2]]


@pytest.mark.check
def test_points_have_their_errors_along_both_axes(predictions, measurements):
    figure = draw_predicted_against_measured(predictions, measurements)
    for axes, expansion in ((figure.axes[0], "anchored"), (figure.axes[2], "second-order")):
        for epoch, prediction in predictions.items():
            if min(measurements[epoch].barrier(), prediction.barrier(None, expansion)) <= axes.get_xlim()[0]:
                continue
            along_x, along_y = bars(axes, f"_{epoch}, standard error")
            middle = measurements[epoch].barrier(), prediction.barrier(None, expansion)
            errors = measurements[epoch].standard_error(), prediction.standard_error(None, expansion)
            assert along_x[0, 1, 0] == pytest.approx(middle[0] + errors[0])
            assert along_y[0, 1, 1] == pytest.approx(middle[1] + errors[1])
            low = max(middle[1] - errors[1], axes.get_ylim()[0])
            assert along_y[0, 0, 1] == pytest.approx(low)
            if expansion == "anchored":
                (broad,) = bars(axes, f"_{epoch}, expansion error")
                assert broad[0, 1, 1] == pytest.approx(middle[1] + prediction.expansion_error())
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[:3] == ["predicted = measured", "standard error", "expansion error"]


def test_by_default_it_is_the_second_order_unless_all_have_anchors(predictions, of_two_ends, measurements, lines):
    for made in (of_two_ends, {**predictions, 3: of_two_ends[3]}):
        for axes in draw_predicted_against_measured(made, measurements).axes:
            assert axes.get_ylabel() == "predicted barrier, second order\n(units of the loss, log scale)"
        whole = draw_predicted_against_measured(made, measurements).axes[0]
        assert lines(whole)["_0"][1] == [predictions[0].barrier(None, "second-order")]


@pytest.mark.check
def test_the_rank_correlation_is_that_of_scipy(predictions, measurements):
    epochs = sorted(predictions)
    whole, layers = draw_predicted_against_measured(predictions, measurements).axes[:2]
    measured = [measurements[epoch].barrier() for epoch in epochs]
    predicted = [predictions[epoch].barrier() for epoch in epochs]
    assert small_print(whole) == f"Spearman ρ = {spearmanr(measured, predicted).statistic:.2f}, n = 3"
    of_layers = [(measurements[e].layer_barriers(), predictions[e].layer_barriers()) for e in epochs]
    pooled = spearmanr(*np.concatenate(of_layers, axis=1)).statistic
    within = np.median([spearmanr(*pair).statistic for pair in of_layers])
    expected = f"Spearman ρ = {pooled:.2f}, n = 9; median within forks = {within:.2f}".replace("-", "−")
    assert small_print(layers) == expected


def test_a_constant_side_has_no_rank_correlation(convex, recwarn):
    prediction, measurement = convex
    figure = draw_predicted_against_measured({0: prediction, 1: prediction}, {0: measurement, 1: measurement})
    assert [small_print(axes) for axes in figure.axes] == [
        "Spearman ρ undefined, n = 2",
        "Spearman ρ undefined, n = 4",
    ] * 2
    assert not recwarn


def test_zeros_stand_in_the_strip_and_the_legend_says_so(convex, lines):
    prediction, measurement = convex
    assert measurement.barrier() == 0 < prediction.barrier(None, "second-order")
    figure = draw_predicted_against_measured({0: prediction}, {0: measurement}, expansion="second-order")
    figure.draw_without_rendering()
    whole = figure.axes[0]
    ((measured,), (predicted,)) = lines(whole)["_0, small"]
    assert predicted == prediction.barrier(None, "second-order")
    assert whole.get_xlim()[0] < measured < predicted
    assert [text.get_text() for text in whole.texts].count("≤ 0") == 2
    assert "in the grey strip: no barrier (≤ 0)" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_points_on_one_spot_are_counted(convex):
    prediction, measurement = convex
    figure = draw_predicted_against_measured({0: prediction}, {0: measurement}, expansion="with-slopes")
    assert prediction.barrier(expansion="with-slopes") == 0
    whole, layers = ([text.get_text() for text in axes.texts] for axes in figure.axes)
    assert "×2" in layers
    assert not any(text.startswith("×") for text in whole)


def test_without_measured_layers_there_is_one_panel(two_sided):
    prediction, measurement = two_sided(sets=())
    figure = draw_predicted_against_measured({"only": prediction}, {"only": measurement}, expansion="hermite")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["whole network"]
    assert figure.legends[1].get_title().get_text() == "fork"


def test_an_expansion_must_hold_for_layers(predictions, measurements, untyped):
    with pytest.raises(OptionError, match="hermite"):
        draw_predicted_against_measured(predictions, measurements, expansion="hermite")
    with pytest.raises(OptionError, match="second-order"):
        draw_predicted_against_measured(predictions, measurements, expansion="second order")
