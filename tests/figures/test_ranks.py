"""Rank correlations are scipy's, and are left out where they are undefined."""

import math

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.stats import spearmanr

from lmc_curvature.figures import draw_rank_correlations
from lmc_curvature.figures.ranks import rank_correlations

COLUMNS = ("predicted", "predicted_with_slopes", "hessian_energy", "distance")


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.fixture
def layers(traces):
    """The shared table with other numbers for every fork and epoch, so that the correlations differ."""
    generator = np.random.default_rng(1)
    noise = {column: generator.lognormal(size=len(traces.layers)) for column in (*COLUMNS, "measured")}
    return traces.layers.assign(**noise)


def test_correlations_are_those_of_scipy(layers, pick):
    correlations = rank_correlations(layers)
    assert list(correlations) == [0, 2, 5]
    for fork, found in correlations.items():
        rows = pick(layers, fork=fork, epoch=8)
        expected = {column: spearmanr(rows["measured"], rows[column]).statistic for column in COLUMNS}
        curvature = rows["hessian_energy"] / rows["distance"] ** 2
        expected["curvature"] = spearmanr(rows["measured"], curvature).statistic
        assert found == pytest.approx(expected)
        assert len(set(found.values())) > 2


def test_ranks_by_hand(traces):
    """Of four layers, ρ = 1 - Σd²/10: measured 3 1 4 2, with the ranks of the columns in the fixture."""
    by_hand = {"predicted": 0.8, "predicted_with_slopes": 0.8, "hessian_energy": -0.4, "distance": -0.6}
    # ΔᵀHΔ / ‖Δ‖² is 16, 1.5, 2 and 1/9 of the layers: the ranks 4 2 3 1.
    assert rank_correlations(traces.layers)[2] == pytest.approx({**by_hand, "curvature": 0.6})


def test_anchored_predictions_are_ranked_where_there_are_some(anchored, saved, uncut):
    """In the fixture they have the ranks of the measured barriers."""
    found = rank_correlations(anchored.layers)
    assert next(iter(found[0])) == "predicted_anchored"
    assert [each["predicted_anchored"] for each in found.values()] == pytest.approx([1, 1, 1])
    figure = draw_rank_correlations(anchored.layers)
    saved(figure)
    uncut(figure)
    assert legend(figure)[:2] == ["anchored: 1.00", "second order: 0.80"]
    unknown = anchored.layers.assign(predicted_anchored=math.nan)
    assert "predicted_anchored" not in rank_correlations(unknown)[0]


def test_points_are_the_correlations_and_their_means(layers, lines, saved, uncut):
    figure = draw_rank_correlations(layers)
    saved(figure)
    uncut(figure)
    (axes,) = figure.axes
    correlations = rank_correlations(layers)
    for name, text in zip((*COLUMNS, "curvature"), legend(figure), strict=True):
        expected = [each[name] for each in correlations.values()]
        positions, values = lines(axes)[f"_{name}"]
        assert_allclose(values, expected)
        assert_allclose(positions - positions[0], [0, 1, 2])
        (position,), (mean,) = lines(axes)[f"_{name}, mean"]
        assert mean == pytest.approx(np.mean(expected))
        assert position == pytest.approx(positions[0] + 3)
        assert text.endswith(f": {np.mean(expected):.2f}".replace("-", "−"))
        assert axes.get_ylim()[0] < min(expected)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "2", "5", "mean"]


def test_each_fork_is_taken_at_the_last_epoch_at_which_layers_were_measured(layers):
    unmeasured = (layers["fork"] == 0) & (layers["epoch"] == 8) | (layers["fork"] == 5)
    found = rank_correlations(layers.assign(measured=layers["measured"].mask(unmeasured)))
    assert list(found) == [0, 2]
    assert found[0] == pytest.approx(rank_correlations(layers[layers["epoch"] <= 4])[0])
    assert found[2] == rank_correlations(layers)[2]


def test_layers_that_were_not_measured_do_not_count(layers, pick):
    partly = layers.assign(measured=layers["measured"].mask(layers["position"] == 1))
    rows = pick(layers, fork=0, epoch=8).query("position != 1")
    expected = spearmanr(rows["measured"], rows["predicted"]).statistic
    assert rank_correlations(partly)[0]["predicted"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("change", "undefined"),
    [
        (lambda t: t.assign(predicted=t["predicted"].where(t["fork"] != 2, 0.0)), {"predicted"}),
        (lambda t: t.assign(measured=t["measured"].where(t["fork"] != 2, 0.0)), {*COLUMNS, "curvature"}),
        (lambda t: t[(t["fork"] != 2) | (t["position"] < 2)], {*COLUMNS, "curvature"}),
        (lambda t: t.assign(distance=t["distance"].where(t["fork"] != 2)), {"distance", "curvature"}),
    ],
    ids=["constant prediction", "constant barrier", "two layers", "unknown distance"],
)
def test_without_ranks_there_is_no_correlation_and_means_are_of_the_others(change, undefined, layers, lines, recwarn):
    table = change(layers)
    found, complete = rank_correlations(table), rank_correlations(layers)
    assert {name for name, value in found[2].items() if math.isnan(value)} == undefined
    axes = draw_rank_correlations(table).axes[0]
    for name in undefined:
        assert_allclose(lines(axes)[f"_{name}"][1], [complete[0][name], np.nan, complete[5][name]])
        assert lines(axes)[f"_{name}, mean"][1] == pytest.approx((complete[0][name] + complete[5][name]) / 2)
    # Spearman's ρ of a constant would warn.
    assert not recwarn


def test_a_mean_of_nothing_is_undefined(layers, uncut):
    figure = draw_rank_correlations(layers.assign(predicted=1.0))
    uncut(figure)
    assert legend(figure)[0] == "second order: undefined"
    assert "undefined" not in "".join(legend(figure)[1:])


def test_a_layer_that_does_not_move_has_no_curvature(traces):
    still = traces.layers["position"] == 0
    columns = {
        column: traces.layers[column].where(~still, 0.0) for column in ("distance", "hessian_energy", "measured")
    }
    # The measured ranks are then 1 2 4 3, those of the curvature 1 3 4 2.
    assert rank_correlations(traces.layers.assign(**columns))[0]["curvature"] == pytest.approx(0.8)
