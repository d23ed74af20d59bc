"""Claim: with layers frozen, barriers among many are those of networks that share the frozen layers."""

import numpy as np
import pytest
import torch

from lmc_curvature import BarriersPrediction, measure_barriers, merge, predict_barrier, predict_barriers, select_layers
from lmc_curvature.errors import OptionError
from tests.barrier.many.test_quadratics import LAYERS, NAMES, OPTIONS, WEIGHTS, Landscape
from tests.support.cases import CASES
from tests.support.networks import joined, plain_loss, untouched

HALF = [0.5]
FROZEN = ["first", "second"]
CASE = CASES["LayerNorm and GELU"]


@pytest.mark.parametrize("base", [None, "south"])
def test_of_a_quadratic_they_are_the_closed_form(base):
    landscape = Landscape()
    models = landscape.models()
    number = NAMES.index(base or "north")
    options = OPTIONS | {"frozen": FROZEN, "base": base}
    with untouched(*models):
        predicted = predict_barriers(models, landscape.loader, **options)
        measured = measure_barriers(models, landscape.loader, sets="each", metrics=("loss",), **options)
    # As if every network had the base's entries there.
    landscape.places = np.where(np.isin(landscape.owner, FROZEN), landscape.places[number], landscape.places)
    mean = landscape.set_barrier(WEIGHTS, list(LAYERS))
    others = [name for name in NAMES if name != NAMES[number]]
    for found in (predicted, measured):
        assert found.mean_barrier() == pytest.approx(mean, rel=1e-9)
        assert found.notes == (f"frozen at {NAMES[number]}: first, second (2 entries, others in {', '.join(others)})",)
        assert found.notes[0] in str(found)
    assert predicted.layers == ("third",)
    assert predicted.layer_barriers() == pytest.approx([mean], rel=1e-9)
    assert measured.set_barriers() == pytest.approx([mean], rel=1e-9)
    losses = [landscape.loss(place) for place in landscape.places]
    np.testing.assert_allclose(predicted.losses, losses, rtol=1e-9)
    np.testing.assert_allclose(measured.network_values(), losses, rtol=1e-9)
    for i, j in ((0, 1), (1, 3), (2, 3)):
        delta = landscape.places[j] - landscape.places[i]
        # A quadratic lies below its chord by α(1−α)/2 ΔᵀAΔ.
        middle = -delta @ landscape.hessian @ delta / 8
        pair = NAMES[i], NAMES[j]
        assert predicted.pair(*pair).curve([0.5])[0] == pytest.approx(middle, rel=1e-9)
        assert measured.pair(*pair).curve()[2] == pytest.approx(middle, rel=1e-9)


def test_a_pair_with_the_base_is_what_the_prediction_of_two_makes_of_it_and_another_is_not_merged(tmp_path):
    models = [CASE.model(seed) for seed in range(3)]
    options = {"frozen": "3", "progress": False}
    prediction = predict_barriers(models, CASE.batches(), names=list("abc"), base="b", **options)
    prediction.save(tmp_path / "found.safetensors")
    for found in (prediction, BarriersPrediction.load(tmp_path / "found.safetensors")):
        for pair, base in ((("a", "b"), "b"), (("b", "c"), "a")):
            expected = predict_barrier(*(models["abc".index(n)] for n in pair), CASE.batches(), base=base, **options)
            assert found.pair(*pair).base == base
            np.testing.assert_allclose(found.pair(*pair).curve(HALF), expected.curve(HALF), atol=1e-9)
    merged = select_layers(prediction.pair("b", "c"), budget=1e9).merge(models[1], models[2])
    assert torch.equal(merged.state_dict()["3.weight"], models[1].state_dict()["3.weight"])
    assert prediction.pair("a", "c").base == "other"
    with pytest.raises(OptionError, match="frozen entries are those of a third"):
        select_layers(prediction.pair("a", "c"), budget=1e9).merge(models[0], models[2])


def test_what_is_frozen_is_what_a_merge_leaves():
    models = [CASE.model(seed) for seed in range(3)]
    options = {"frozen": "3", "progress": False}
    measured = measure_barriers(models, CASE.batches(), **options)
    predicted = predict_barriers(models, CASE.batches(), **options)
    assert "3" not in predicted.layers
    merged = merge(*models, layers=predicted.layers)
    assert torch.equal(merged.state_dict()["3.weight"], models[0].state_dict()["3.weight"])
    expected = plain_loss(merged, joined(CASE.batches())).item()
    assert measured.mean_value() == pytest.approx(expected, abs=1e-10)
    assert predicted.mean_loss == pytest.approx(expected, abs=1e-10)


def test_what_was_never_trained_is_frozen_at_all_alike():
    models = [CASE.model(seed) for seed in range(3)]
    for model in models[1:]:
        model[3].load_state_dict(models[0][3].state_dict())
    prediction = predict_barriers(models, CASE.batches(), frozen="3", progress=False)
    assert prediction.notes == ("frozen at model_a: 3 (2 entries)",)
    pair = prediction.pair("model_b", "model_c")
    assert pair.base == "a"
    merged = select_layers(pair, budget=1e9).merge(models[1], models[2])
    assert torch.equal(merged.state_dict()["3.weight"], models[1].state_dict()["3.weight"])


def test_anchors_may_be_near_to_each_other():
    models = [CASE.model(seed) for seed in range(3)]
    prediction = predict_barriers(models, CASE.batches(), anchors=[0, 0.5, 0.5001, 1], progress=False)
    assert len(prediction.pair("model_a", "model_b").anchors) == 4


@pytest.mark.parametrize("function", [predict_barriers, measure_barriers])
def test_a_base_that_is_no_network_is_named(function):
    landscape = Landscape()
    with pytest.raises(OptionError, match="no network 'nord': did you mean 'north'"):
        function(landscape.models(), landscape.loader, frozen=FROZEN, base="nord", **OPTIONS)
