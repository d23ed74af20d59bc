"""Claim: what is said of a selection and its verification holds what decides, and nothing of a merge that is none."""

import dataclasses

import numpy as np
import pytest

from lmc_curvature import select_layers
from lmc_curvature.merging import Selection, Verification
from lmc_curvature.merging.conclusion import conclusion
from lmc_curvature.merging.rises import Base
from lmc_curvature.merging.trials import SetTrial
from tests.support.predictions import prediction_of


def flat(ends, middle, layers=4):
    """A prediction of these losses at its three anchors, the same for whatever moves."""
    return prediction_of(np.zeros((3, layers)), np.zeros((3, layers, layers)), [ends[0], middle, ends[1]], spread=1e-6)


def trial(members, rise, error=0.001, base: Base = "a", **fields):
    numbers = {"weight": float(len(members)), "predicted": 0.1, "expected": 0.1} | fields
    return SetTrial(members=tuple(members), base=base, rise=rise, standard_error=error, **numbers)


def empty(prediction, budget):
    """A selection of no layer."""
    choice = select_layers(prediction, budget, base="a").choice
    return Selection.of(choice, np.zeros(len(prediction.layers), dtype=bool), "a")


def texts(selection, verification=None):
    """The same in print, in a notebook and in sentences."""
    shown = verification or selection
    return str(shown), repr(shown), " ".join(conclusion(selection, verification))


@pytest.mark.parametrize(
    ("ends", "middle", "said"),
    [
        ((0.475, 0.0155), 0.055, "model_b alone has less loss (0.0155)"),
        ((0.0155, 0.475), 0.055, "model_a alone has less loss (0.0155)"),
        ((0.475, 0.0155), 0.02, None),
        ((0.1, 0.1), 0.11, None),
    ],
)
def test_a_network_that_alone_has_less_loss_is_named(ends, middle, said):
    selection = select_layers(flat(ends, middle), 0.05)
    assert selection.is_whole
    measured = trial(selection.members, middle - sum(ends) / 2)
    for text in (*texts(selection), *texts(selection, Verification(selection, (measured,), measured, 2.0))):
        assert ("alone has less loss" in text) == (said is not None)
        assert said is None or said in text


def test_the_measured_rise_decides_whether_one_alone_has_less():
    selection = select_layers(flat((0.475, 0.0155), 0.055), 0.05)
    measured = trial(selection.members, 0.016 - 0.24525)
    assert "alone has less" not in " ".join(conclusion(selection, Verification(selection, (measured,), measured, 2.0)))


def test_a_budget_below_zero_asks_for_less_loss_than_the_mean():
    prediction = flat((0.4, 0.2), 0.25)
    rises = [select_layers(prediction, budget).rise for budget in (0.0, -0.04, -0.09)]
    assert all(rise <= budget for rise, budget in zip(rises, (0.0, -0.04, -0.09), strict=True))
    # The better network alone has 0.1 less than the mean.
    alone = select_layers(prediction, -0.1 + 1e-9, excluded=prediction.layers)
    assert (alone.base, alone.rise) == ("b", pytest.approx(-0.1))


def test_where_all_layers_are_averaged_there_are_no_others():
    prediction = flat((0.1, 0.1), 0.1)
    whole, part = select_layers(prediction, 0.1), select_layers(prediction, 0.1, excluded="layer1")
    assert not any("the others" in text or "base of others" in text for text in texts(whole))
    assert "; the others from model_a" in str(part)
    assert "base of others" in repr(part)


def test_nothing_has_no_rise_and_is_no_merge():
    prediction = flat((0.1, 0.1), 5.0)
    nothing = empty(prediction, 1e-6)
    chosen = trial((), 0.0)
    none = Verification(nothing, (trial(nothing.choice.names(np.ones(4, bool)), 4.9), chosen), chosen, 2.0, chosen)
    for text in (*texts(nothing), *texts(nothing, none)):
        assert "rise" not in text.replace("rises", "").partition("measured sets")[0]
        assert "merged" not in text
        assert "uncertain" not in text
    assert "on held-out" not in str(none)


def test_a_set_that_is_within_but_uncertain_is_why_nothing_is_averaged():
    prediction = flat((0.1, 0.1), 5.0)
    nothing = empty(prediction, 0.2)
    near, far, chosen = trial(["layer0"], 0.15, 0.05), trial(["layer1"], 0.3), trial((), 0.0)
    for found, measured in (((near, far), ()), ((far,), (far, near, chosen))):
        verification = Verification(nothing, found, chosen, 2.0, None, measured)
        for text in texts(nothing, verification):
            assert "One measured set is within the budget, but too uncertain" in text
        for text in texts(nothing, verification)[::2]:
            assert "by less than 2 standard errors: use more data, or a lower caution." in text
    both = Verification(nothing, (near, dataclasses.replace(near, members=("layer2",))), chosen, 2.0)
    assert "2 measured sets are within" in str(both)
    assert Verification(nothing, (far,), chosen, 2.0).doubt is None
    some = select_layers(prediction, 9.0, base="a")
    assert Verification(some, (near,), near, 2.0).doubt is None


def test_the_chosen_set_is_listed_and_marked_and_a_switched_base_is_said():
    prediction = flat((0.1, 0.1), 0.1)
    selection = select_layers(prediction, 0.2, excluded="layer1")
    tried = trial(selection.members, 0.3, base="b"), trial(["layer0"], 0.1, base="a")
    other = trial(selection.members, 0.15, base="a")
    text = str(Verification(selection, tried, other, 2.0))
    rows = [line for line in text.splitlines() if "of the weight: " in line]
    assert [row.split()[0] for row in rows] == ["1.", "2.", "+"]
    assert [row.endswith(" (selected)") for row in rows] == [False, False, True]
    assert "the base was switched from b to a by what was measured" in text
    said = "The base was switched from B to A by what was measured."
    assert said in conclusion(selection, Verification(selection, tried, other, 2.0))
    assert said not in conclusion(selection, Verification(selection, tried[:1], tried[0], 2.0))
    text = str(Verification(selection, tried, tried[1], 2.0))
    rows = [line for line in text.splitlines() if "of the weight: " in line]
    assert [row.endswith(" (selected)") for row in rows] == [False, True]
    assert "base was switched" in text
    assert "switched" not in str(Verification(selection, (tried[1],), tried[1], 2.0))


def test_a_prediction_above_the_budget_of_a_set_within_it_does_not_decide():
    prediction = flat((0.1, 0.1), 0.3)
    selection = select_layers(prediction, 0.3)
    strict = dataclasses.replace(selection, budget=0.15)
    within, above = trial(selection.members, 0.1), trial(selection.members, 0.16)
    found = Verification(strict, (within,), within, 2.0)
    assert "what was measured decides: the prediction alone has it above the budget" in str(found)
    sentence = "Measured on the data that it was chosen on, it is 0.1 ± 0.001, within the budget"
    assert f"{sentence}, which decides: the prediction alone has it above." in conclusion(strict, found)
    assert "decides" not in " ".join(texts(strict, Verification(strict, (above,), above, 2.0)))
    assert "decides" not in " ".join(texts(selection, Verification(selection, (within,), within, 2.0)))


@pytest.mark.parametrize(
    ("middle", "budget", "said"),
    [
        # Up to 0.0202 counts as no rise where the two have 0.01.
        (
            0.0168,
            0.001,
            "The average of all layers has a rise of 0.0068: above this budget, but up to 0.02 counts as none.",
        ),
        (0.05, 0.1, "The budget allows the rise of all layers, 0.04, of which 0.02 would count as none."),
        (0.0168, 0.1, None),
        (0.05, 0.001, None),
    ],
)
def test_where_verdict_and_budget_disagree_it_is_said_why(middle, budget, said):
    found = conclusion(select_layers(flat((0.01, 0.01), middle), budget), None)
    assert said is None or said in found
    assert any("as none" in text for text in found) == (said is not None)
