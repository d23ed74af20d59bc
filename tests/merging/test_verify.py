"""Claim: what a verification reports is what the merged networks have, and the budget holds as measured."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lmc_curvature import best_point, predict_barrier, select_layers
from lmc_curvature.errors import LoaderError, OptionError
from lmc_curvature.merging import Verification
from lmc_curvature.merging.residuals import Correction
from lmc_curvature.merging.trials import SetTrial
from tests.support.cases import CASES
from tests.support.networks import permuted_pair, untouched
from tests.support.predictions import random_prediction

# Five layers in float64.
MODELS = permuted_pair([6, 8, 8, 8, 8, 4], torch.float64)


def data(seed, batches=4):
    """Examples with the classes that the networks find most likely."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batches, 16, 6, generator=generator, dtype=torch.float64)
    return [(part, MODELS[0](part).argmax(1)) for part in x]


def plain_rise(models, batches, alphas):
    """The rise at a point of the cube, by plain torch; `alphas` by layer."""
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))

    def loss(model):
        with torch.no_grad():
            return F.cross_entropy(model.eval()(x), y).item()

    merged, other = copy.deepcopy(models[0]), models[1].state_dict()
    with torch.no_grad():
        for name, tensor in merged.state_dict().items():
            alpha = alphas[name.rpartition(".")[0]]
            tensor.copy_((1 - alpha) * tensor + alpha * other[name])
    return loss(merged) - (loss(models[0]) + loss(models[1])) / 2


def alphas_of(prediction, members, base):
    """The point of the cube that a merge is."""
    return {layer: 0.5 if layer in members else float(base == "b") for layer in prediction.layers}


LOADER, OTHERS = data(0), data(1)


@pytest.fixture(scope="module")
def prediction():
    return predict_barrier(*MODELS, LOADER, progress=False)


@pytest.mark.check
@pytest.mark.parametrize("base", [None, "a", "b", "mean"])
@pytest.mark.parametrize("part", [0.1, 0.4])
def test_reported_rises_are_those_of_plain_networks_and_the_budget_holds(prediction, base, part):
    budget = part * float(prediction.set_barriers([None])[0])
    selection = select_layers(prediction, budget, base=base)
    found = selection.verify(*MODELS, LOADER, measurements=5, held_out=OTHERS, progress=False)
    assert 1 <= len(found.trials) <= 5
    assert (found.trials[0].members, found.trials[0].base) == (selection.members, selection.base)
    assert found.trials[0].predicted == found.trials[0].expected == pytest.approx(selection.rise, abs=1e-12)

    def plain(trial, batches):
        sides = ["a", "b"] if trial.base == "mean" else [trial.base]
        return np.mean([plain_rise(MODELS, batches, alphas_of(prediction, trial.members, each)) for each in sides])

    assert found.chosen in found.measured
    assert {*found.trials} <= {*found.measured}
    for trial in found.measured:
        assert trial.rise == pytest.approx(plain(trial, LOADER), abs=1e-10)
        assert trial.weight == sum(prediction.parameters[prediction.layers.index(name)] for name in trial.members)
    assert found.held_out.rise == pytest.approx(plain(found.held_out, OTHERS), abs=1e-10)
    assert budget > 0.01
    assert found.chosen.rise + 1.5 * found.chosen.standard_error <= budget
    assert found.holds == (found.held_out.rise <= budget)
    assert (found.selection.members, found.selection.base) == (found.chosen.members, found.chosen.base)
    assert (found.held_out.members, found.held_out.base) == (found.chosen.members, found.chosen.base)
    # No measured set that is surely within the budget is heavier.
    for trial in found.trials:
        assert trial.weight <= found.chosen.weight or trial.rise + 1.5 * trial.standard_error > budget


@pytest.mark.check
def test_a_choice_that_does_not_hold_is_repaired():
    # The curvature at the two networks alone tells little of what lies between.
    rough = predict_barrier(*MODELS, LOADER, anchors=2, progress=False)
    whole, wrong = plain_rise(MODELS, LOADER, dict.fromkeys(rough.layers, 0.5)), 0
    for part, base in itertools.product((0.05, 0.2, 0.5), ("a", "b")):
        selection = select_layers(rough, part * whole, base=base, weight="distance")
        found = selection.verify(*MODELS, LOADER, measurements=8, progress=False)
        assert found.chosen.rise <= part * whole
        assert found.held_out is None
        if plain_rise(MODELS, LOADER, alphas_of(rough, selection.members, base)) > part * whole:
            wrong += 1
            assert found.selection.members != selection.members
    assert wrong > 0


def test_one_measurement_is_enough_where_everything_may_be_averaged(prediction):
    found = select_layers(prediction, 1e3).verify(*MODELS, LOADER, progress=False)
    assert (len(found.trials), found.selection.members) == (1, prediction.layers)
    assert found.holds


def test_where_nothing_stays_within_the_budget_the_least_rise_is_told(prediction):
    x, y = (torch.cat(parts) for parts in zip(*LOADER, strict=True))
    # The ends have no loss on their own classes; on these a required layer has to rise.
    selection = select_layers(prediction, 100.0, required="4")
    strict = dataclasses.replace(selection, choice=dataclasses.replace(selection.choice, budget=1e-9), budget=1e-9)
    found = strict.verify(*MODELS, [(x, y)], measurements=3, progress=False)
    assert found.chosen.rise == min(trial.rise for trial in found.trials)
    assert not found.holds
    assert "above the budget" in str(found)


@pytest.mark.check
def test_the_text_has_every_measurement(prediction):
    budget = 0.2 * float(prediction.set_barriers([None])[0])
    found = select_layers(prediction, budget).verify(*MODELS, LOADER, measurements=3, held_out=OTHERS, progress=False)
    text = str(found)
    assert str(found.selection) in text
    for number, trial in enumerate(found.trials, 1):
        assert f"  {number:>3}. {found.against_budget(trial):<11}  base {trial.base}, " in text
    assert f"measured rise   {found.chosen.rise:.4g} ± {found.chosen.standard_error:.2g}, within the budget" in text
    assert f"on held-out     {found.held_out.rise:.4g} ± " in text
    assert text.count("of the weight: ") == len({*found.trials, found.chosen})
    assert text.count(" (selected)\n") + text.endswith(" (selected)") == 1
    single = select_layers(prediction, budget).verify(*MODELS, LOADER[:1], measurements=2, progress=False)
    assert "nan" not in str(single)


def test_a_rise_is_within_the_budget_just_within_or_above(prediction):
    selection = select_layers(prediction, 0.2, base="a")
    near, within, above = (
        SetTrial(members=(), base="a", weight=1.0, predicted=0.1, expected=0.1, rise=rise, standard_error=error)
        for rise, error in ((0.19, 0.01), (0.18, 0.01), (0.21, np.nan))
    )
    found = Verification(selection, (near, within, above), within, 1.5, near)
    assert [found.against_budget(trial) for trial in found.trials] == ["just within", "within", "above"]
    text = str(found)
    assert "  measured rise   0.18 ± 0.01, within the budget\n" in text
    assert "  on held-out     0.19 ± 0.01, just within the budget\n" in text
    assert "    1. just within  base a, " in text
    assert text.endswith("\n  just within: by less than 1.5 standard errors")
    assert (found.holds, dataclasses.replace(found, caution=0.5).legend) == (True, None)
    assert "just within" not in str(Verification(selection, (within, above), within, 1.5))


def test_networks_are_left_alone(prediction):
    with untouched(*MODELS):
        select_layers(prediction, 0.1).verify(*MODELS, LOADER, measurements=2, progress=False)


@pytest.mark.check
def test_batch_normalisation_and_the_loss_are_those_of_the_options():
    case = CASES["conv, batch"]
    models, batches = (case.model(0), case.model(1)), case.batches()
    prediction = predict_barrier(*models, batches, progress=False, **case.options)
    found = select_layers(prediction, 1e3).verify(*models, batches, progress=False)
    assert found.chosen.rise == pytest.approx(float(prediction.set_barriers([None])[0]), abs=1e-9)
    tied = CASES["tied weights"]
    models, batches = (tied.model(0), tied.model(1)), tied.batches()
    prediction = predict_barrier(*models, batches, progress=False, **tied.options)
    found = select_layers(prediction, 1e3).verify(*models, batches, progress=False, **tied.options)
    assert found.chosen.rise == pytest.approx(float(prediction.set_barriers([None])[0]), abs=1e-9)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"measurements": 0}, OptionError, "measurements=0: expected a number of at least 1"),
        ({"measurements": 2.5}, OptionError, "measurements=2.5"),
        ({"caution": -1}, OptionError, "caution=-1: expected a number that is not negative"),
        ({"sets": "each"}, OptionError, "sets='each': what is measured is chosen here"),
        ({"alphas": 5}, OptionError, "alphas=5: what is measured is chosen here"),
        ({"metrics": ("error",)}, OptionError, "the loss is needed"),
    ],
)
def test_bad_input_is_named(prediction, options, error, message, untyped):
    with pytest.raises(error, match=message):
        select_layers(prediction, 0.5).verify(*MODELS, LOADER, progress=False, **options)


def test_a_loader_that_is_used_up_is_refused_at_once(prediction):
    with pytest.raises(LoaderError, match="can be visited only once"):
        select_layers(prediction, 0.5).verify(*MODELS, iter(LOADER))
    with pytest.raises(LoaderError, match="can be visited only once"):
        best_point(prediction).verify(*MODELS, iter(LOADER))


def test_a_correction_goes_through_what_was_measured_and_vanishes_at_anchors():
    prediction, rng = random_prediction(6, 0), np.random.default_rng(0)
    points = rng.random((7, 6))
    mean = (prediction.endpoints[0].loss + prediction.endpoints[1].loss) / 2
    rises = prediction.loss_at(points) - mean + 0.3 * prediction.loss_errors(points) * rng.normal(size=7)
    found = Correction.of(prediction).extended(points, rises, np.zeros(7))
    values, deviations = found.at(points)
    scales = prediction.loss_errors(points)
    np.testing.assert_allclose(values, rises, atol=1e-3 * scales.max())
    assert (deviations < 0.01 * scales.max()).all()
    anchors = np.array([0.0, 0.5, 1.0])[:, None] * np.ones(6)
    values, deviations = found.at(anchors)
    np.testing.assert_allclose(values, prediction.loss_at(anchors) - mean, atol=1e-9)
    np.testing.assert_allclose(deviations, 0, atol=1e-6)
    # Without measurements it is the prediction, and nine in ten errors are within the expansion error.
    values, deviations = Correction.of(prediction).at(points)
    np.testing.assert_allclose(values, prediction.loss_at(points) - mean, atol=1e-12)
    np.testing.assert_allclose(1.645 * deviations, scales)


def test_a_correction_learns_that_a_prediction_is_off_everywhere():
    prediction, rng = random_prediction(6, 1), np.random.default_rng(0)
    mean = (prediction.endpoints[0].loss + prediction.endpoints[1].loss) / 2
    points, others = rng.random((8, 6)), rng.random((20, 6))

    def truth(x):
        return prediction.loss_at(x) - mean + 0.8 * prediction.loss_errors(x)

    before, after = (
        np.abs(each.at(others)[0] - truth(others)).mean()
        for each in (
            Correction.of(prediction),
            Correction.of(prediction).extended(points, truth(points), np.zeros(8)),
        )
    )
    assert after < 0.5 * before
