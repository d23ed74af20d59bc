"""Claim: the first screen says what the prediction's verdict and the selection say, and who is in the way."""

import dataclasses

import numpy as np
import pytest

from lmc_curvature.barrier.midpoint import Midpoint, measured_midpoint, predicted_midpoint
from lmc_curvature.barrier.verdict import verdict
from lmc_curvature.report import answers
from lmc_curvature.report.answers import answer_of
from lmc_curvature.report.contents import gather
from tests.support.predictions import prediction_of


def _answer(*results, **options):
    (pair,) = gather(list(results), **options).pairs
    return answer_of(pair)


def _facts(answer):
    return {fact.name: fact for fact in answer.facts}


@pytest.mark.check
def test_the_headline_is_the_verdict_s_answer(forks):
    for prediction, measurement in forks.values():
        assert _answer(prediction).headline == verdict(prediction)[0]
        assert _answer(measurement).headline == verdict(prediction)[0]
        gaps = predicted_midpoint(prediction).gap_error, measured_midpoint(measurement).gap_error
        assert gaps[0] == pytest.approx(gaps[1], rel=1e-3)


def test_numbers_have_both_errors(pair):
    prediction, measurement = pair
    facts = _facts(_answer(prediction, measurement))
    assert facts["Barrier"].value == f"{measurement.barrier():.3g} ± {measurement.standard_error():.2g}"
    assert f"expansion error about {prediction.expansion_error():.2g}" in facts["Barrier"].detail
    assert f"{prediction.barrier():.3g}" in facts["Barrier"].detail
    assert "±" in facts["Loss"].detail
    assert f"{100 * measurement.ends('error')[0]:.3g} %" in facts["Error"].detail


def test_a_barrier_that_was_not_measured_is_called_predicted(pair, of_two_ends):
    prediction, measurement = pair
    assert _facts(_answer(prediction))["Barrier"].value.endswith(", predicted")
    assert f"at α = {prediction.position():.2g}, expansion error" in _facts(_answer(prediction))["Barrier"].detail
    ends = _facts(_answer(of_two_ends[3]))["Barrier"]
    assert ends.value == f"{ends.value.partition(' ±')[0]} ± {of_two_ends[3].standard_error():.2g}, predicted"
    assert "to second order from the two networks alone, and may be far off" in ends.detail
    assert "predicted" not in _facts(_answer(of_two_ends[3], measurement))["Barrier"].value
    below = _facts(_answer(_separable([-1.0, 0.0])))["Barrier"]
    assert below.detail.startswith("nowhere above the chord")


def test_shares_of_no_parameters_are_left_out():
    """Of files in which no layer has a parameter that moves."""
    prediction = dataclasses.replace(_separable([8.0, 0.0]), parameters=np.zeros(2, dtype=int))
    answer = _answer(prediction, budget=0.01)
    assert not any("nan" in text for text in (*answer.selection, *(fact.detail for fact in answer.facts)))


def test_without_a_midpoint_there_is_no_answer(pair, two_sided):
    prediction = pair[0]
    ends = dataclasses.replace(prediction, anchors=(prediction.anchors[0], prediction.anchors[-1]))
    answer = _answer(ends)
    assert answer.headline.startswith("The averaged network was not evaluated")
    assert any("three anchors say more" in text for text in answer.trust)
    assert _answer(ends, pair[1]).headline == verdict(prediction)[0]


def _separable(curvature, losses=(0.1, 0.1)):
    """The prediction of Σ c_ℓ (x_ℓ − x_ℓ²) / 2, of which each layer's barrier at ½ is c_ℓ / 8."""
    curvature = np.asarray(curvature, dtype=float)
    places = np.array([0.0, 0.5, 1.0])
    slopes = curvature * (0.5 - places[:, None])
    values = [losses[0] + curvature.sum() * (place - place**2) / 2 for place in places]
    return prediction_of(slopes, np.tile(-np.diag(curvature), (3, 1, 1)), values, spread=0.0)


def test_the_layer_with_the_barrier_is_in_the_way():
    prediction = _separable([0.01, 8.0, 0.02, 4.0])
    answer = _answer(prediction, budget=0.01)
    assert answer.obstacles[0] == "Left out of the largest set within the budget: layer1, layer3."
    assert "most for layer1 (to 0.504), layer3 (to 1), layer2 (to 1.5)" in answer.obstacles[1]
    assert answer.obstacles[2].startswith("Moved alone, the highest barriers have layer1 (1), layer3 (0.5)")
    assert _facts(answer)["Largest set within the budget"].value.startswith("2 of 4 layers")


def test_where_all_can_be_averaged_none_is_in_the_way():
    assert _answer(_separable([-1.0, 0.0, -2.0])).obstacles == ("None: all layers can be averaged within the budget.",)


def test_where_one_network_alone_is_better_that_is_said_beside_the_layers():
    unequal = prediction_of(np.zeros((3, 2)), np.zeros((3, 2, 2)), [0.475, 0.055, 0.0155], spread=0.0)
    answer = _answer(unequal, budget=0.05)
    assert answer.headline.startswith("Keep model_b: ")
    assert answer.obstacles[1:] == ("But model_b alone has less loss (0.0155).",)
    assert "model_b alone has less loss (0.0155)." in answer.selection


def test_layers_that_only_together_are_in_the_way_are_not_blamed():
    """Of twelve layers, leaving any one out makes it worse: it costs to leave the diagonal."""
    prediction = _separable(np.full(12, 1.0))
    anchors = []
    for anchor in prediction.anchors:
        across = 50 * (np.eye(12) - np.full((12, 12), 1 / 12))
        projection = dataclasses.replace(
            anchor.projection, batch_curvatures=anchor.projection.batch_curvatures + across[None]
        )
        anchors.append(anchor._replace(projection=projection))
    answer = _answer(dataclasses.replace(prediction, anchors=tuple(anchors)), budget=0.01)
    assert "No single layer is to blame" in answer.obstacles[1]
    assert "12 of 12 layers" in answer.obstacles[0]


@pytest.mark.parametrize(("rise", "is_close"), [(0.03, True), (0.05, True), (0.5, False), (-0.2, False)])
def test_an_answer_that_other_data_may_turn_says_so(rise, is_close):
    # A rise of 0.04 counts as none where the two have a mean loss of 1.
    text = answers._sampling(Midpoint((1.0, 1.0), 1 + rise, rise, 0.014, None, 512))
    assert ("on the other side of what counts as none, 0.04" in text) == is_close


def test_an_uncertain_selection_is_called_so(pair):
    prediction = pair[0]
    answer = _answer(prediction, budget=1e-3)
    selection = gather(prediction, budget=1e-3).pairs[0].selection
    unsure = bool(selection.members) and selection.rise + selection.expansion_error > selection.budget
    assert (", unsure" in _facts(answer)["Largest set within the budget"].value) == unsure
    nothing = _facts(_answer(_separable([8.0, 8.0]), budget=1e-6))["Largest set within the budget"]
    assert (nothing.value, nothing.detail[:24]) == ("0 of 2 layers", "nothing can be averaged ")
    sure = _answer(_separable([0.0, 0.0]), budget=1.0)
    assert "unsure" not in _facts(sure)["Largest set within the budget"].value
    assert any("measure before you merge" in text for text in _answer(_separable([8.0, 8.0]), budget=1.0).selection)


def test_it_says_how_well_measured_sets_were_predicted(pair):
    prediction, measurement = pair
    texts = [text for text in _answer(prediction, measurement).trust if "were measured" in text]
    assert len(texts) == 1
    assert texts[0].startswith(f"Of {len(measurement.sets)} sets")


def test_notes_are_told_once(pair):
    prediction, measurement = (dataclasses.replace(each, notes=("The head is frozen.",)) for each in pair)
    assert _answer(prediction, measurement).trust.count("The head is frozen.") == 1


def test_a_single_batch_does_not_tell_how_sure_it_is(pair):
    measurement = pair[1]
    fields = {
        name: value for name, value in vars(measurement).items() if name.startswith("batch_") and name != "batch_norm"
    }
    one = dataclasses.replace(measurement, **{n: None if v is None else v[:1] for n, v in fields.items()})
    assert "in a single batch" in _answer(one).trust[0]


@pytest.mark.parametrize("expected", ["No: ", "Yes"])
def test_the_row_of_a_table_of_pairs_has_the_same_numbers(expected, forks):
    prediction, measurement = forks[{"No: ": 0, "Yes": 8}[expected]]
    answer = _answer(prediction, measurement)
    assert answer.row["Barrier"] == _facts(answer)["Barrier"].value
    assert answer.row["answer"] == answer.headline
