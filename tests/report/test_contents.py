"""Claim: results are sorted into pairs, and what does not fit is refused by name."""

import dataclasses

import numpy as np
import pytest

from lmc_curvature import select_layers
from lmc_curvature.barrier.midpoint import measured_midpoint, predicted_midpoint
from lmc_curvature.errors import OptionError
from lmc_curvature.report.contents import Pair, compare, gather, shown_curves
from lmc_curvature.report.tables import pair_tables
from tests.support.predictions import random_prediction


def test_one_result_several_of_one_pair_and_several_pairs(pair, traces):
    prediction, measurement = pair
    (alone,) = gather(prediction).pairs
    assert (alone.title, alone.prediction, dict(alone.measurements)) == ("", prediction, {})
    (both,) = gather([measurement, prediction]).pairs
    assert (both.prediction, dict(both.measurements)) == (prediction, {"measured": measurement})
    (twice,) = gather([measurement, measurement]).pairs
    assert (list(twice.measurements), twice.prediction, twice.selection) == (["measured", "measured (2)"], None, None)
    many = gather({0: [prediction, measurement], "late": prediction, "table": traces})
    assert [each.title for each in many.pairs] == ["0", "late"]
    assert many.traces is traces


def test_layers_are_selected_within_what_counts_as_none_unless_a_budget_is_given(pair):
    prediction = pair[0]
    mean = sum(end.loss for end in prediction.endpoints) / 2
    (found,) = gather(prediction).pairs
    assert found.selection.budget == pytest.approx(0.02 * (1 + mean))
    assert gather(prediction, budget=0.5).pairs[0].selection.budget == 0.5
    assert gather(prediction, relative_budget=0.5).pairs[0].selection.budget == pytest.approx(0.5 * mean)
    selection = select_layers(prediction, 0.3)
    (given,) = gather(selection, budget=0.5).pairs
    assert (given.selection, given.prediction) == (selection, prediction)


@pytest.mark.parametrize(
    ("results", "said"),
    [
        ([], "no result"),
        ({}, "no result"),
        (3.0, "float is no result"),
        (["report.html"], "str is no result"),
        ([random_prediction(2), random_prediction(2)], "mapping from the name of each pair"),
    ],
)
def test_what_does_not_fit_is_refused(results, said, untyped):
    with pytest.raises(OptionError, match=said):
        gather(results)


def test_the_midpoint_is_the_same_predicted_and_measured(pair):
    prediction, measurement = pair
    predicted, measured = predicted_midpoint(prediction), measured_midpoint(measurement)
    np.testing.assert_allclose(measured.ends, predicted.ends, rtol=1e-12)
    for name in ("loss", "rise", "standard_error", "errors", "examples"):
        np.testing.assert_allclose(getattr(measured, name), getattr(predicted, name), rtol=1e-9)
    assert Pair(measurements={"measured": measurement}).midpoint == measured


def test_sets_are_compared_where_they_were_measured_to_be_highest(pair, named):
    prediction, measurement = pair
    found = compare(prediction, measurement)
    for row, members in enumerate(measurement.sets):
        curve = measurement.layer_curves()[row]
        alpha = measurement.alphas[1:-1][curve[1:-1].argmax()]
        assert found.measured[row] == curve[1:-1].max()
        assert found.predicted[row] == pytest.approx(prediction.curve([alpha], members)[0], rel=1e-12)
        assert found.expansion[row] == pytest.approx(prediction.expansion_error(members, alpha=alpha), rel=1e-12)
    assert compare(named(prediction, "xyz"), measurement) is None


def test_sets_that_rise_nowhere_are_compared_between_the_ends(pair):
    prediction, measurement = pair
    convex = dataclasses.replace(measurement, batch_values=measurement.batch_values - 9.0 * _between(measurement))
    found = compare(prediction, convex)
    assert (convex.layer_curves().argmax(axis=1) == 0).all()
    assert (found.measured < 0).all()
    assert (found.measured == convex.layer_curves()[:, 1:-1].max(axis=1)).all()
    assert np.isfinite(found.sampling).all()
    assert (found.sampling > 0).all()
    rows = pair_tables(Pair(prediction=prediction, measurements={"measured": convex}))[-1].rows
    for row, measured in zip(rows, found.measured, strict=True):
        assert row[1].startswith(f"{measured:.3g} ± ")


def _between(measurement):
    return np.isin(measurement.alphas, measurement.alphas[1:-1]).astype(float)


def test_curves_of_few_positions_are_drawn_only_where_there_are_no_finer_ones(pair, two_sided):
    fine, coarse = pair[1], two_sided(alphas=3)[1]
    both = Pair(measurements={"fine": fine, "coarse": coarse})
    assert list(shown_curves(both)) == ["fine"]
    assert list(shown_curves(Pair(measurements={"coarse": coarse}))) == ["coarse"]
    assert shown_curves(Pair(measurements={"coarse": coarse}), "error") == {}
