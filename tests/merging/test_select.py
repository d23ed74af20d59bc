"""Claim: the selection is the heaviest set within the budget, whatever the curvature, the base and the conditions."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc_curvature import select_layers
from lmc_curvature.averages import standard_error
from lmc_curvature.errors import OptionError, PartitionError
from lmc_curvature.merging import select
from lmc_curvature.merging.rises import rise_in_words
from tests.support.predictions import prediction_of, random_prediction

POSITIONS = [(0.0, 1.0), (0.0, 0.5, 1.0), (0.0, 0.3, 0.6, 1.0)]


def rises_of(prediction, members, base):
    """The rises of sets, straight from their definition."""
    first, second = (end.loss for end in prediction.endpoints)
    if base == "mean":
        return np.mean([rises_of(prediction, members, each) for each in "ab"], axis=0)
    half = np.array(members, dtype=float) / 2
    return prediction.loss_at(half if base == "a" else 1 - half) - (first + second) / 2


def rise_of(prediction, members, base):
    return float(rises_of(prediction, [members], base)[0])


def brute_force(prediction, budget, bases, weights, required=(), excluded=()):
    """The largest weight within the budget, and every (set, base) that has it; None if there is none."""
    every, found = list(itertools.product([False, True], repeat=len(weights))), []
    for base in bases:
        for members, rise in zip(every, rises_of(prediction, every, base), strict=True):
            names = {name for name, member in zip(prediction.layers, members, strict=True) if member}
            if names >= set(required) and not names & set(excluded) and rise <= budget + 1e-9:
                found.append((float(np.dot(members, weights)), names, base))
    if not found:
        return None
    heaviest = max(weight for weight, _, _ in found)
    return heaviest, [(names, base) for weight, names, base in found if weight > heaviest - 1e-9]


@st.composite
def questions(draw):
    count = draw(st.integers(1, 8))
    prediction = random_prediction(
        count, draw(st.integers(0, 10**6)), positions=draw(st.sampled_from(POSITIONS)), definite=draw(st.booleans())
    )
    kinds = draw(
        st.lists(st.sampled_from(["free", "free", "free", "required", "excluded"]), min_size=count, max_size=count)
    )
    required, excluded = (
        [name for name, kind in zip(prediction.layers, kinds, strict=True) if kind == wanted]
        for wanted in ("required", "excluded")
    )
    weight = draw(st.sampled_from(["parameters", "distance", "numbers"]))
    numbers = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    return (
        prediction,
        draw(st.floats(0, 3)),
        draw(st.sampled_from(["a", "b", "mean", None])),
        required,
        excluded,
        weight,
        numbers,
    )


@settings(max_examples=40, deadline=None)
@given(questions())
def test_the_selection_is_that_of_brute_force(drawn):
    prediction, budget, base, required, excluded, weight, numbers = drawn
    numbers = {"parameters": prediction.parameters, "distance": prediction.distances, "numbers": numbers}[weight]
    if weight == "numbers":
        weight = dict(zip(prediction.layers, numbers, strict=True))
    options = {"base": base, "weight": weight, "required": required, "excluded": excluded}
    expected = brute_force(prediction, budget, "ab" if base is None else [base], numbers, required, excluded)
    if expected is None:
        with pytest.raises(OptionError, match="no set of layers stays within it"):
            select_layers(prediction, budget, **options)
        return
    found = select_layers(prediction, budget, **options)
    heaviest, sets = expected
    assert found.weight == pytest.approx(heaviest, abs=1e-9)
    assert (set(found.members), found.base) in sets
    # Of sets of one weight, the one with the least rise.
    least = min(rise_of(prediction, [name in names for name in prediction.layers], base) for names, base in sets)
    assert found.rise == pytest.approx(least, abs=1e-9)
    assert found.exact


@pytest.mark.check(after=1)
@pytest.mark.parametrize(("seed", "definite"), [(0, False), (1, False), (2, True)])
def test_twelve_layers_are_selected_as_by_brute_force(seed, definite):
    prediction = random_prediction(12, seed, definite=definite)
    for budget, base in [(0.1, "a"), (0.5, "b"), (1.0, "mean")]:
        expected = brute_force(prediction, budget, [base], prediction.parameters)
        if expected is None:
            with pytest.raises(OptionError, match="no set of layers"):
                select_layers(prediction, budget, base=base)
        else:
            assert select_layers(prediction, budget, base=base).weight == expected[0]


def additive(weights, energies):
    """A prediction in which rises add up: the loss is 1 + ½ Σ e_ℓ x_ℓ (1 − x_ℓ), so that of a set is ⅛ Σ e_ℓ."""
    energies = np.asarray(energies, dtype=float)
    curvatures, slopes = -np.tile(np.diag(energies), (3, 1, 1)), np.outer([0.5, 0.0, -0.5], energies)
    losses = np.array([1.0, 1 + energies.sum() / 8, 1.0])
    return prediction_of(slopes, curvatures, losses, parameters=np.asarray(weights), spread=0.0)


def knapsack(weights, energies, most):
    """The largest weight of a set whose energies sum to at most `most`, by dynamic programming over weights."""
    least = np.full(sum(weights) + 1, math.inf)
    least[0] = 0
    for weight, energy in zip(weights, energies, strict=True):
        least[weight:] = np.minimum(least[weight:], least[: len(least) - weight] + energy)
    return int(np.flatnonzero(least <= most + 1e-12).max())


@pytest.mark.parametrize(("count", "base"), [(18, "a"), (24, "b"), pytest.param(40, "mean", marks=pytest.mark.check)])
def test_where_rises_add_up_the_selection_is_that_of_a_knapsack(count, base):
    rng = np.random.default_rng(count)
    weights, energies = rng.integers(1, 30, count), rng.integers(1, 50, count) / 100
    prediction = additive(weights, energies)
    for part in (0.1, 0.5, 1.0):
        found = select_layers(prediction, part * energies.sum() / 8, base=base)
        assert found.exact == (count <= 20)
        assert found.weight == knapsack(weights, energies, part * energies.sum())
        members = [name in found.members for name in prediction.layers]
        assert found.rise == pytest.approx(energies[members].sum() / 8, abs=1e-9)


@pytest.mark.check
def test_a_search_finds_what_brute_force_finds(monkeypatch):
    same = 0
    for seed in range(6):
        prediction = random_prediction(13, seed)
        exact = select_layers(prediction, 0.4)
        monkeypatch.setattr(select, "_EXHAUSTIVE", 4)
        found = select_layers(prediction, 0.4)
        monkeypatch.undo()
        assert (exact.exact, found.exact) == (True, False)
        assert found.rise <= 0.4
        assert found.weight <= exact.weight
        same += found.weight == exact.weight
    assert same >= 5


def test_the_better_base_is_chosen():
    prediction = random_prediction(6, 4)
    each = {base: select_layers(prediction, 2.0, base=base, excluded=["layer0"]) for base in "ab"}
    better = max(each.values(), key=lambda found: (found.weight, -found.rise))
    found = select_layers(prediction, 2.0, excluded=["layer0"])
    assert (found.members, found.base) == (better.members, better.base)


@pytest.mark.parametrize("budget", [0.02, 1.5])
def test_the_selection_says_what_is_predicted_of_it(budget):
    prediction = random_prediction(6, 1)
    for base in ("a", "b", "mean"):
        found = select_layers(prediction, budget, base=base)
        members = np.array([name in found.members for name in prediction.layers])
        assert found.rise == pytest.approx(rise_of(prediction, members, base), abs=1e-12)
        points = {"a": [members / 2], "b": [1 - members / 2], "mean": [members / 2, 1 - members / 2]}[base]
        ends = np.mean([end.batch_losses for end in prediction.endpoints], axis=0)
        batches = np.mean([prediction.batch_losses(point) for point in points], axis=0) - ends
        assert batches.mean() == pytest.approx(found.rise, abs=1e-12)
        assert found.standard_error == pytest.approx(float(standard_error(batches, np.ones(3))))
        # The middle of all layers is an anchor, where nothing is expanded.
        assert members.all() or found.expansion_error > 0
        assert found.weight == prediction.parameters[members].sum()
        assert found.share == pytest.approx(found.weight / prediction.parameters.sum())
        text = str(found)
        assert f"Average {members.sum()} of 6 layers, {found.share:.1%} of the weight" in text
        assert f"{found.rise:.4g} ± {found.standard_error:.2g} (sampling)" in text
        # That of all layers was evaluated.
        error = "" if members.all() else f", expansion error about {found.expansion_error:.2g}"
        assert f"(sampling){error}; budget {budget}" in text
        assert "unreliable" not in text
    # The mean of both bases is a barrier, whose sampling error is known elsewhere.
    several = prediction._cube.batch_barriers(members, 0.5, "anchored")
    assert found.standard_error == pytest.approx(float(standard_error(several, np.ones(3))))


def test_a_relative_budget_is_a_part_of_the_mean_loss():
    prediction = random_prediction(5, 3)
    mean = (prediction.endpoints[0].loss + prediction.endpoints[1].loss) / 2
    found = select_layers(prediction, relative_budget=0.3)
    assert found.budget == pytest.approx(0.3 * mean)
    assert found.members == select_layers(prediction, 0.3 * mean).members
    assert str(found).splitlines()[2].endswith(f"budget {0.3 * mean:.4g}")
    assert f"budget {10 * mean:.4g} (10 times the mean loss)\n" in str(select_layers(prediction, relative_budget=10))


def test_a_predicted_rise_is_told_with_what_is_known_of_it():
    prediction = random_prediction(5, 3)
    strangers = dataclasses.replace(prediction, cosine=0.01)
    assert rise_in_words(prediction, 0.5, 0.01, 0.123) == "0.5 ± 0.01 (sampling), expansion error about 0.12"
    assert rise_in_words(prediction, 0.5, np.nan, 0.123) == "0.5 ± unknown (one batch), expansion error about 0.12"
    unreliable = ", unreliable between different initialisations: measure"
    assert rise_in_words(strangers, 0.5, 0.01, 0.123).endswith(f"about 0.12{unreliable}")
    assert unreliable in str(select_layers(strangers, 0.2, excluded="layer0"))
    # At the midpoint the loss was evaluated, whoever the networks are.
    assert rise_in_words(strangers, 0.5, 0.01, 1e-15) == "0.5 ± 0.01 (sampling)"


def test_where_nothing_can_be_averaged_that_is_said():
    prediction = prediction_of(np.zeros((3, 2)), np.zeros((3, 2, 2)), [0.1, 5.0, 0.1])
    nothing = select_layers(prediction, 1e-6, base="b")
    assert str(nothing).startswith("Nothing can be averaged within the budget: all layers from model_b\n")
    excluded = select_layers(prediction, 9.0, base="b", excluded=prediction.layers)
    assert str(excluded).startswith("No layer is averaged: all layers from model_b\n")


def test_the_curve_holds_what_every_budget_selects():
    prediction = random_prediction(8, 2)
    selection = select_layers(prediction, 0.5, base="b", required="layer1")
    curve = selection.curve()
    assert (np.diff(curve["weight"]) > 0).all()
    assert (np.diff(curve["rise"]) > 0).all()
    for rise, weight in zip(curve["rise"], curve["weight"], strict=True):
        if rise >= 0:
            again = select_layers(prediction, rise, base="b", required="layer1")
            assert again.weight == weight
    for row in curve.itertuples():
        assert "layer1" in row.layers
        members = [name in row.layers for name in prediction.layers]
        assert row.rise == pytest.approx(rise_of(prediction, members, "b"), abs=1e-12)
    assert np.abs(curve["rise"] - selection.rise).min() < 1e-12


@pytest.mark.check
def test_the_curve_of_many_layers_is_searched():
    rng = np.random.default_rng(1)
    prediction = additive(rng.integers(1, 30, 22), rng.integers(1, 50, 22) / 100)
    curve = select_layers(prediction, 0.1, base="a").curve()
    assert (len(curve["layers"].iloc[0]), len(curve["layers"].iloc[-1])) == (0, 22)
    assert len(curve) > 15
    assert (np.diff(curve["rise"]) > 0).all()


PREDICTION = random_prediction(4, 0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, OptionError, "Give budget, .* or relative_budget.*neither was given"),
        ({"budget": 0.1, "relative_budget": 0.2}, OptionError, "got 0.1 and 0.2"),
        ({"budget": math.inf}, OptionError, "budget=inf: expected a finite number"),
        ({"budget": -9.0}, OptionError, "budget=-9: no set of layers stays within it"),
        ({"relative_budget": -2}, OptionError, "relative_budget=-2: expected"),
        ({"budget": math.nan}, OptionError, "budget=nan: expected"),
        ({"budget": "much"}, OptionError, "budget='much': expected"),
        ({"budget": 1, "base": "c"}, OptionError, "base='c' is not a choice"),
        (
            {"budget": 1, "weight": "distances"},
            OptionError,
            "weight='distances' is not a choice: did you mean 'distance'",
        ),
        ({"budget": 1, "required": "layer9"}, PartitionError, "no layer 'layer9': did you mean"),
        ({"budget": 1, "excluded": ["layer9"]}, PartitionError, "no layer 'layer9'"),
        ({"budget": 1, "required": ["layer1", "layer2"], "excluded": "layer2"}, PartitionError, "'layer2' is both"),
        ({"budget": 1, "weight": {"layer0": 1}}, PartitionError, "weight has no number for layer 'layer1'"),
        ({"budget": 1, "weight": {f"layer{k}": k - 1 for k in range(4)}}, OptionError, r"weight\['layer0'\]=-1"),
        ({"budget": 1, "weight": {f"layer{k}": k for k in range(5)}}, PartitionError, "no layer 'layer4'"),
    ],
)
def test_bad_input_is_named(options, error, message, untyped):
    with pytest.raises(error, match=message):
        select_layers(PREDICTION, **options)


def test_files_of_earlier_versions_have_no_parameters():
    old = dataclasses.replace(PREDICTION, parameters=None)
    with pytest.raises(OptionError, match="weight='parameters'.*earlier version.*weight='distance'.*predict again"):
        select_layers(old, 1.0)
    assert (
        select_layers(old, 1.0, weight="distance").members == select_layers(PREDICTION, 1.0, weight="distance").members
    )


def test_a_budget_that_no_set_keeps_is_told_the_least_rise():
    prediction = additive([1, 1, 1], [3.0, 2.0, 1.0])
    with pytest.raises(
        OptionError, match="budget=0.1: no set .* with base b; the least rise found is 0.25, by .* layer1"
    ):
        select_layers(prediction, 0.1, base="b", required="layer1")
    with pytest.raises(OptionError, match="with base a or b"):
        select_layers(prediction, 0.1, required="layer1")
