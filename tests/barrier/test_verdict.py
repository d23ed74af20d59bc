"""Claim: a verdict begins with the answer that the evaluated midpoint gives, and ends with what to do next."""

import dataclasses
import re

import numpy as np
import pytest

from lmc_curvature.barrier.midpoint import predicted_midpoint
from lmc_curvature.barrier.verdict import look_unrelated, verdict
from tests.support.predictions import prediction_of


def evaluated(ends, middle, errors=None, *, spread=1e-5, batch_size=10_000, **fields):
    """A prediction of two layers with these losses, and errors at the three anchors, from three batches."""
    losses = [ends[0], middle, ends[1]]
    flat = prediction_of(np.zeros((3, 2)), np.zeros((3, 2, 2)), losses, spread=spread)
    anchors = tuple(
        anchor._replace(projection=dataclasses.replace(anchor.projection, batch_sizes=np.full(3, batch_size)))
        for anchor in flat.anchors
    )
    known = None if errors is None else np.array(errors)
    return dataclasses.replace(flat, anchors=anchors, errors=known, **fields)


@pytest.mark.parametrize(
    ("ends", "middle", "errors", "answer"),
    [
        ((0.5, 0.5), 0.505, None, "Yes: +1 % loss."),
        ((0.02, 0.02), 0.03, (0.01, 0.012, 0.01), "Yes: +0.01 loss (0.02 → 0.03), error (1 % → 1.2 %)."),
        ((0.5, 0.52), 0.45, (0.1, 0.1, 0.2), "Yes, and the average is better than the mean of the two: -11.8 % loss"),
        ((1.0, 1.0), 1.06, (0.021, 0.021, 0.021), "At a cost: +6 % loss, error unchanged (2.1 % → 2.1 %)."),
        # A loss that doubles beside an error that stays, and an error that rises beside a loss that hardly does.
        ((0.4, 0.4), 0.8, (0.02, 0.025, 0.02), "At a cost: +100 % loss, error (2 % → 2.5 %)."),
        # Of tiny losses percents say little, and do not order the answers.
        ((0.01, 0.01), 0.0168, None, "Yes: +0.0068 loss (0.01 → 0.0168)."),
        ((0.01, 0.01), 0.05, (0.002, 0.004, 0.002), "At a cost: +0.04 loss (0.01 → 0.05), error (0.2 % → 0.4 %)."),
        ((0.15, 0.15), 0.25, (0.05, 0.16, 0.05), "No: +0.1 loss (0.15 → 0.25), error (5 % → 16 %)."),
        ((0.01, 0.01), 0.01 + 1e-9, None, "Yes: +0 loss (0.01 → 0.01)."),
        ((2.0, 2.0), 2.8, (0.3, 0.39, 0.3), "At a cost: +40 % loss, error (30 % → 39 %)."),
        ((2.0, 2.0), 2.01, (0.3, 0.39, 0.3), "At a cost: +0.5 % loss, error (30 % → 39 %)."),
        ((2.0, 2.0), 2.8, (0.0, 0.42, 0.0), "No: +40 % loss, error (0 % → 42 %)."),
        ((2.0, 2.0), 2.8, None, "At a cost: +40 % loss."),
        ((2.0, 2.0), 3.2, None, "No: +60 % loss."),
        ((0.1, 0.1), 1.9, (0.02, 0.42, 0.03), "No: +1.8 loss (0.1 → 1.9), error (2.5 % → 42 %)."),
        ((0.3, 0.3), 3.9, (0.02, 0.42, 0.03), "No: loss 0.3 → 3.9, error (2.5 % → 42 %)."),
        ((-1.0, -3.0), -1.5, None, "At a cost: loss -2 → -1.5. model_b alone has less loss (-3)."),
        ((-1.0, -3.0), 0.5, None, "No: loss -2 → 0.5."),
    ],
)
def test_the_first_words_are_the_answer(ends, middle, errors, answer):
    found = verdict(evaluated(ends, middle, errors))
    assert found[0].startswith(answer)
    text = " ".join(found)
    assert f"The averaged network has a loss of {middle:.4g} (evaluated at α = 1/2 on the data given" in text
    assert "`measure_barrier` on data that neither" in text if answer.startswith("Yes") else "`select_layers(" in text


@pytest.mark.parametrize(
    ("ends", "middle", "errors", "answer"),
    [
        (
            (0.475, 0.0155),
            0.055,
            None,
            "Keep model_b: the average is better than the mean of the two, -0.19 loss (0.245 → 0.055), but worse than "
            "model_b alone (0.0155).",
        ),
        (
            (0.4, 0.6),
            0.505,
            (0.1, 0.12, 0.2),
            "Keep model_a: the average is no worse than the mean of the two, +1 % loss, error (15 % → 12 %), but worse "
            "than model_a alone (0.4).",
        ),
        # An average that errs less than either is not worse for its loss alone.
        ((0.4, 0.6), 0.45, (0.1, 0.08, 0.2), "Yes, and the average is better than the mean of the two: -10 % loss"),
        ((0.4, 0.6), 0.41, None, "Yes, and the average is better than the mean of the two: -18 % loss."),
        ((0.1, 0.7), 0.5, None, "At a cost: +25 % loss. model_a alone has less loss (0.1)."),
        ((0.5, 1.5), 1.7, None, "No: +70 % loss. model_a alone has less loss (0.5)."),
    ],
)
def test_the_average_is_compared_with_the_better_of_the_two(ends, middle, errors, answer):
    found = verdict(evaluated(ends, middle, errors))
    assert found[0].startswith(answer)
    # The other way round it is the other network.
    swapped = verdict(evaluated(ends[::-1], middle, None if errors is None else errors[::-1]))
    names = {"model_a": "model_b", "model_b": "model_a"}
    assert swapped[0] == re.sub("model_[ab]", lambda name: names[name[0]], found[0])
    assert ("best_point" in found[2]) == answer.startswith("Keep")


def test_no_network_is_kept_for_what_sampling_may_be():
    noisy, sharp = (evaluated((0.4, 0.6), 0.47, spread=spread) for spread in (0.2, 1e-5))
    assert verdict(sharp)[0].startswith("Keep model_a: ")
    assert not verdict(noisy)[0].startswith("Keep")
    midpoint = predicted_midpoint(noisy)
    gaps = noisy.anchors[1].projection.batch_losses - noisy.endpoints[0].batch_losses
    assert midpoint.gap_error == pytest.approx(gaps.std(ddof=1) / np.sqrt(3))
    assert 2 * midpoint.gap_error > 0.07


def test_a_rise_within_its_sampling_error_is_no_plain_yes():
    noisy, sharp = (evaluated((0.5, 0.5), 0.6, spread=spread) for spread in (0.5, 1e-5))
    assert 2 * noisy.standard_error(alpha=0.5) > 0.1
    assert verdict(noisy)[0].startswith("These data do not tell: ")
    assert verdict(sharp)[0].startswith("At a cost: +20 % loss")
    # Of an error that rises by points, sampling of the loss says nothing.
    wrong = dataclasses.replace(noisy, errors=np.array([0.1, 0.18, 0.1]))
    assert verdict(wrong)[0].startswith("At a cost: ")


def test_errors_of_few_examples_may_differ_by_chance():
    few, many = (evaluated((0.5, 0.5), 0.5, (0.3, 0.39, 0.3), batch_size=size) for size in (8, 80))
    assert verdict(few)[0].startswith("Yes: +0 % loss, error (30 % → 39 %)")
    assert verdict(many)[0].startswith("At a cost: +0 % loss, error (30 % → 39 %)")


@pytest.mark.parametrize(
    ("ends", "errors", "question"),
    [
        ((2.3, 2.3), (0.89, 0.89, 0.89), "Both networks err on 89 %: are data, labels and normalisation those"),
        ((2.3, 3.3), (0.81, 0.5, 0.9), "Both networks err on 81 % and 90 %: are data"),
        ((11.0, 13.0), (0.5, 0.5, 0.6), "Both networks have a loss of 11 and 13: are data"),
    ],
)
def test_networks_that_are_useless_on_the_data_get_a_question(ends, errors, question):
    found = verdict(evaluated(ends, min(ends), errors))
    assert found[0].startswith(question)
    assert not any(word in " ".join(found) for word in ("Yes", "At a cost", "No:", "Next:"))
    assert "The averaged network has a loss of" in found[1]


@pytest.mark.parametrize(
    ("ends", "errors"), [((2.3, 2.3), (0.89, 0.7, 0.79)), ((11.0, 13.0), None), ((9.0, 13.0), (0.5, 0.5, 0.6))]
)
def test_one_useful_network_or_a_loss_of_another_kind_is_no_question(ends, errors):
    assert not verdict(evaluated(ends, min(ends), errors))[0].startswith("Both networks")


def test_networks_of_different_initialisations_are_told_what_aligning_means():
    apart, near = (evaluated((0.5, 0.5), 0.5, cosine=cosine) for cosine in (0.01, 0.2))
    assert (look_unrelated(apart), look_unrelated(near), look_unrelated(evaluated((1, 1), 1))) == (True, False, False)
    assert (
        "align their units first (permutation matching, such as Git Re-Basin; not part of this library)"
        in (verdict(apart)[-1])
    )
    assert "align" not in " ".join(verdict(near))


def test_without_a_midpoint_there_is_no_answer():
    flat = prediction_of(np.zeros((2, 2)), np.zeros((2, 2, 2)), [0.5, 0.5], positions=(0.0, 1.0))
    assert verdict(flat)[0].startswith("The averaged network was not evaluated")
    useless = dataclasses.replace(flat, errors=np.array([0.9, 0.9]))
    assert verdict(useless)[0].startswith("Both networks err on 90 %")
