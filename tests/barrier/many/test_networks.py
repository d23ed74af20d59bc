"""Claim: of networks, a pair is what the functions for two make of it, all in one pass, and two are a pair."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch

from lmc_curvature import (
    BarriersMeasurement,
    BarriersPrediction,
    measure_barrier,
    measure_barriers,
    merge,
    predict_barrier,
    predict_barriers,
)
from lmc_curvature.barrier import evaluation
from lmc_curvature.curvature.projection import project
from lmc_curvature.errors import FileFormatError, OptionError
from tests.support.cases import CASES
from tests.support.networks import joined, plain_loss

CONV, VECTORS = CASES["conv, interpolate"], CASES["LayerNorm and GELU"]
SETS = [["conv1"], ["fc", "conv2"]]


class Visits:
    """A loader that counts its visits."""

    def __init__(self, batches):
        self.batches, self.count = batches, 0

    def __iter__(self):
        self.count += 1
        return iter(self.batches)


@pytest.fixture(scope="module")
def models():
    return [CONV.model(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def prediction(models):
    return predict_barriers(models, CONV.batches(), names=list("abc"), weights=[0.5, 0.3, 0.2], progress=False)


@pytest.fixture(scope="module")
def measurement(models):
    subsets = [["a", "c"], ["b"], ["c", "b", "a"]]
    options = {"names": list("abc"), "weights": {"c": 0.2, "a": 0.5, "b": 0.3}, "sets": SETS, "subsets": subsets}
    return measure_barriers(models, CONV.batches(), progress=False, **options)


@pytest.mark.check
def test_a_pair_is_what_the_prediction_of_two_makes_of_it(models, prediction):
    for i, j in ((0, 1), (0, 2), (1, 2)):
        expected = predict_barrier(models[i], models[j], CONV.batches(), progress=False)
        found = prediction.pair("abc"[i], "abc"[j])
        for one, other in zip(found.anchors, expected.anchors, strict=True):
            assert one.alpha == other.alpha
            for field in ("batch_losses", "batch_slopes", "batch_curvatures"):
                values = getattr(other.projection, field)
                atol = 1e-10 * np.abs(values).max()
                np.testing.assert_allclose(getattr(one.projection, field), values, rtol=0, atol=atol)
        np.testing.assert_allclose(found.errors, expected.errors)
        for name in ("distances", "parameters", "norms"):
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name))
        for name in ("layers", "batch_norm", "notes", "groups", "base", "loss", "examples"):
            assert getattr(found, name) == getattr(expected, name)
        assert found.cosine == pytest.approx(expected.cosine)
        assert prediction.barriers()[i, j] == pytest.approx(expected.barrier(), abs=1e-9)
        assert prediction.standard_errors()[j, i] == pytest.approx(expected.standard_error(), rel=1e-6)
        assert prediction.expansion_errors()[i, j] == pytest.approx(expected.expansion_error(), rel=1e-6)


def test_a_pair_is_what_the_measurement_of_two_makes_of_it(models, measurement):
    for i, j in ((0, 1), (0, 2), (1, 2)):
        expected = measure_barrier(models[i], models[j], CONV.batches(), alphas=5, progress=False)
        found = measurement.pair("abc"[i], "abc"[j])
        for metric in ("loss", "error"):
            np.testing.assert_allclose(found.curve(metric), expected.curve(metric), atol=1e-12)
            assert found.ends(metric) == pytest.approx(expected.ends(metric), abs=1e-12)
            assert measurement.barriers(metric)[i, j] == pytest.approx(expected.barrier(metric), abs=1e-12)
            error = expected.standard_error(metric)
            assert measurement.standard_errors(metric)[j, i] == pytest.approx(error, abs=1e-12)
        assert found.kind == expected.kind
        assert str(found) == str(expected)


def _plain(models, weights, moved=None):
    """The loss of the mean, plainly; or of each network with some entries at the mean."""
    states = [model.state_dict() for model in models]
    mean = {
        name: sum(w * state[name] for w, state in zip(weights, states, strict=True))
        for name, tensor in states[0].items()
        if tensor.is_floating_point()
    }
    found = []
    for model in models:
        mixed = copy.deepcopy(model).eval()
        entries = {name: t for name, t in mean.items() if moved is None or name.startswith(moved)}
        mixed.load_state_dict(entries, strict=False)
        found.append(plain_loss(mixed, joined(CONV.batches())).item())
    return np.array(found)


def test_the_mean_and_layers_at_the_mean_are_networks_evaluated_plainly(models, prediction, measurement):
    weights = np.array([0.5, 0.3, 0.2])
    ends = np.array([plain_loss(model.eval(), joined(CONV.batches())).item() for model in copy.deepcopy(models)])
    whole = _plain(models, weights)[0]
    for found in (prediction, measurement):
        assert found.mean_barrier() == pytest.approx(whole - weights @ ends, abs=1e-10)
    expected = [
        weights @ (_plain(models, weights, moved) - ends) for moved in (("conv1", "bn1"), ("fc", "conv2", "bn2"))
    ]
    np.testing.assert_allclose(measurement.set_barriers(), expected, atol=1e-10)
    y = np.array([0.5, 0.2]) / 0.7
    pair = _plain([models[0], models[2]], y)[0]
    assert measurement.subset_values() == pytest.approx([pair, ends[1], whole], abs=1e-10)
    assert measurement.subset_rises() == pytest.approx(
        [pair - y @ ends[[0, 2]], 0.0, whole - weights @ ends], abs=1e-10
    )
    # Of three networks every subset's mean was evaluated.
    subsets = {subset.networks: subset for subset in prediction.subsets}
    assert subsets["a", "c"].loss == pytest.approx(pair, abs=1e-10)
    assert all(subset.is_evaluated and subset.expansion_error == 0 for subset in subsets.values())
    merged = merge(models[0], models[2], weights=subsets["a", "c"].weights)
    assert plain_loss(merged, joined(CONV.batches())).item() == pytest.approx(pair, abs=1e-10)


@pytest.mark.check
@pytest.mark.parametrize("share", [0.5, 0.3])
def test_two_networks_are_a_pair(models, share):
    two, position = models[:2], 1 - share
    anchors = sorted({0.0, 0.5, position, 1.0}) if share == 0.5 else [0.0, position, 1.0]
    expected = predict_barrier(*two, CONV.batches(), anchors=anchors, progress=False)
    found = predict_barriers(two, CONV.batches(), weights=[share, position], anchors=anchors, progress=False)
    sets = [*SETS, ["conv2"], expected.layers]
    np.testing.assert_allclose(found.mean_barriers(sets), expected.set_barriers(sets, position), atol=1e-10)
    errors = expected.set_expansion_errors(sets, position)
    np.testing.assert_allclose(found.mean_expansion_errors(sets), errors, rtol=1e-6, atol=1e-10)
    for members in sets:
        error = expected.standard_error(members, alpha=position)
        assert found.mean_standard_error(members) == pytest.approx(error, rel=1e-6, abs=1e-12)
    assert found.names == ("model_a", "model_b")
    whole = found.subsets[[len(subset.networks) for subset in found.subsets].index(2)]
    assert whole.loss == pytest.approx(found.mean_loss, abs=1e-12)
    measured = measure_barrier(*two, CONV.batches(), sets=SETS, alphas=[position], progress=False)
    both = measure_barriers(two, CONV.batches(), sets=SETS, weights=[share, position], progress=False)
    for metric in ("loss", "error"):
        np.testing.assert_allclose(both.set_barriers(metric), measured.layer_curves(metric)[:, 0], atol=1e-12)
        assert both.mean_barrier(metric) == pytest.approx(measured.curve(metric)[0], abs=1e-12)
        errors = measured.curve_errors(metric)[:, 0]
        np.testing.assert_allclose(both.mean_standard_error(metric), errors[0], atol=1e-12)
        np.testing.assert_allclose(both.set_standard_errors(metric), errors[1:], atol=1e-12)


def test_every_state_is_evaluated_once_a_batch_in_one_pass(models, monkeypatch):
    loader, calls = Visits(CONV.batches()), Counter()
    original = evaluation._batch_values

    def counting(objective, points, places, batch, metrics):
        calls[batch.index] += len(places)
        return original(objective, points, places, batch, metrics)

    monkeypatch.setattr(evaluation, "_batch_values", counting)
    measure_barriers(models, loader, sets=SETS, subsets=[["model_a", "model_b"]], alphas=5, progress=False)
    assert loader.count == 1
    # Networks, three positions between each two, the mean of all, and each network with each set there; the subset's
    # mean is halfway between two.
    assert set(calls.values()) == {3 + 3 * 3 + 1 + 2 * 3}


def test_every_station_is_differentiated_once_a_batch_in_one_pass(models, monkeypatch):
    loader, calls = Visits(CONV.batches()), Counter()
    original = project.project_by_sweep

    def counting(problem, point, batch):
        calls[batch.index, point.place] += 1
        assert len(problem.directions) <= 2 * 3
        return original(problem, point, batch)

    monkeypatch.setitem(project._ROADS, "auto", counting)
    predict_barriers(models, loader, progress=False)
    assert loader.count == 1
    assert set(calls.values()) == {1}
    # Networks, the middle of each two, which is the mean of all but the third, and the mean of all.
    assert len({place for _, place in calls}) == 3 + 3 + 1


def test_saving_and_loading_is_lossless(prediction, measurement, tmp_path):
    for number, result in enumerate((prediction, measurement)):
        result.save(tmp_path / str(number))
        again = type(result).load(tmp_path / str(number))
        assert str(again) == str(result)
        assert repr(again) == repr(result)
        np.testing.assert_array_equal(again.barriers(), result.barriers())
    again = BarriersPrediction.load(tmp_path / "0")
    assert again.subsets == prediction.subsets
    np.testing.assert_array_equal(again.layer_barriers(), prediction.layer_barriers())
    assert BarriersMeasurement.load(tmp_path / "1").subsets == measurement.subsets
    with pytest.raises(FileFormatError, match="'barriers-measurement'; expected a file of kind 'barriers-prediction'"):
        BarriersPrediction.load(tmp_path / "1")


def test_tables_have_a_row_a_pair_a_layer_or_set_and_a_subset(prediction, measurement, untyped):
    pairs = prediction.to_dataframe()
    assert list(zip(pairs["first"], pairs["second"], strict=True)) == [("a", "b"), ("a", "c"), ("b", "c")]
    np.testing.assert_allclose(pairs["barrier"], prediction.barriers()[[0, 0, 1], [1, 2, 2]])
    layers = prediction.to_dataframe("layers")
    assert layers["layer"].tolist() == ["conv1", "conv2", "fc"]
    np.testing.assert_allclose(layers["barrier"], prediction.layer_barriers())
    assert prediction.to_dataframe("subsets")["networks"].tolist() == [s.networks for s in prediction.subsets]
    found = measurement.to_dataframe()
    np.testing.assert_allclose(found["error_barrier"], measurement.barriers("error")[[0, 0, 1], [1, 2, 2]])
    assert measurement.to_dataframe("sets")["set"].tolist() == [("conv1",), ("conv2", "fc")]
    subsets = measurement.to_dataframe("subsets")
    assert subsets["subset"].tolist() == [("a", "c"), ("b",), ("a", "b", "c")]
    np.testing.assert_allclose(subsets["loss"], measurement.subset_values())
    for result in (prediction, measurement):
        with pytest.raises(OptionError, match="rows='pair' is not a choice: did you mean 'pairs'"):
            result.to_dataframe("pair")


@pytest.mark.check
@pytest.mark.parametrize("policy", ["batch", "recalibrate"])
def test_other_policies_are_those_of_two_networks(models, policy):
    batches = CONV.batches((6, 6))
    options = {"batch_norm": policy, "progress": False}
    found = predict_barriers(models, batches, **options).pair("model_b", "model_c")
    expected = predict_barrier(*models[1:], batches, **options)
    assert found.barrier() == pytest.approx(expected.barrier(), abs=1e-9)
    measured = measure_barriers(models, batches, **options).pair("model_b", "model_c")
    np.testing.assert_allclose(
        measured.curve(), measure_barrier(*models[1:], batches, alphas=5, **options).curve(), atol=1e-12
    )


@pytest.mark.check
def test_without_points_between_them_pairs_are_of_second_order(models):
    found = predict_barriers(models, CONV.batches(), anchors=2, progress=False)
    expected = predict_barrier(*models[:2], CONV.batches(), anchors=2, progress=False)
    assert found.pair("model_a", "model_b").barrier() == pytest.approx(expected.barrier(), abs=1e-9)
    # The mean of two of three is that of all but one, which is evaluated in any case.
    assert all(subset.is_evaluated for subset in found.subsets)


@pytest.mark.check
def test_of_five_networks_the_mean_of_three_is_predicted():
    five = [VECTORS.model(seed) for seed in range(5)]
    found = predict_barriers(five, VECTORS.batches(), progress=False)
    measured = measure_barriers(
        five, VECTORS.batches(), subsets=[s.networks for s in found.subsets], metrics=("loss",), progress=False
    )
    assert len(found.subsets) == 31
    for subset, loss in zip(found.subsets, measured.subset_values(), strict=True):
        assert subset.is_evaluated == (len(subset.networks) != 3)
        assert subset.loss == pytest.approx(loss, abs=1e-9 if subset.is_evaluated else 0.1)
        assert (subset.expansion_error > 0) == (not subset.is_evaluated)


def test_networks_are_left_alone_and_may_be_given_in_any_iterable(models):
    before = [copy.deepcopy(model.state_dict()) for model in models]
    named = dict(zip("xyz", models, strict=True))
    found = measure_barriers(named.values(), CONV.batches(), names=named, alphas=3, progress=False)
    assert found.names == ("x", "y", "z")
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
