"""Claim: data in the order of their classes are warned of, and data in a random order are not."""

import itertools
import math
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lmc_curvature import Objective, measure_barrier
from lmc_curvature.objective.sorting import Purity, warn_of_sorted_data


def batches_of(labels, size):
    """Batches with these labels, and inputs that nobody looks at."""
    labels = torch.as_tensor(labels)
    return [(torch.zeros(len(part), 2), part) for part in labels.split(size)]


def warnings_of(batches):
    """The warnings of one pass, which passes on what it is given."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        passed = list(warn_of_sorted_data(iter(batches)))
    assert all(mine is given for mine, given in zip(passed, batches, strict=True))
    return [str(warning.message) for warning in caught]


def purity(labels, size):
    return Purity.of([Counter(y.tolist()) for _, y in batches_of(labels, size)])


counts_of_classes = st.lists(st.integers(1, 120), min_size=1, max_size=12)


@pytest.mark.check
@settings(deadline=None, max_examples=400)
@given(counts_of_classes, st.integers(1, 100), st.integers(0, 2**32 - 1))
def test_a_random_order_is_not_warned_of(counts, size, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    assert not warnings_of(batches_of(labels, size))


@pytest.mark.check
@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(30, 120), min_size=2, max_size=12), st.integers(4, 100), st.randoms())
def test_sorted_data_are_warned_of_once(counts, size, random):
    size = min(size, math.ceil(sum(counts) / 2))
    labels = np.repeat(random.sample(range(-100, 1000), len(counts)), counts)
    (message,) = warnings_of(batches_of(labels, size))
    assert "classes" in message
    assert "Shuffle" in message


@pytest.mark.parametrize("sizes", [(2, 2), (3, 1, 2), (1, 1, 1), (4, 2)])
@pytest.mark.parametrize("labels", ["aabb", "aaab", "abcc", "aabbcc", "aaaaab"])
def test_a_random_order_has_the_mean_that_purity_says_and_no_evidence_on_average(labels, sizes):
    if len(labels) != sum(sizes):
        return
    edges = [0, *itertools.accumulate(sizes)]
    cuts = [
        Purity.of([Counter(order[start:stop]) for start, stop in itertools.pairwise(edges)])
        for order in itertools.permutations(labels)
    ]
    assert np.mean([cut.within for cut in cuts]) == pytest.approx(cuts[0].by_chance)
    assert np.mean([cut.inflation for cut in cuts]) == pytest.approx(1)
    # The claim on which the bound of false alarms rests.
    assert np.mean([math.exp(cut.evidence) for cut in cuts]) <= 1 + 1e-12


def test_evidence_is_the_ratio_of_two_probabilities():
    found = purity([0, 0, 0, 1, 1], 3)
    shares = {0: 3 / 5, 1: 2 / 5}
    # Pólya's urn: each label of a batch makes its class likelier by one.
    drawn = [shares[0] * (shares[0] + 1) / 2 * (shares[0] + 2) / 3, shares[1] * (shares[1] + 1) / 2]
    assert found.evidence == pytest.approx(math.log(drawn[0] * drawn[1] * math.comb(5, 3)))
    assert found.within == 1
    assert found.by_chance == pytest.approx((3 * 2 + 2 * 1) / (5 * 4))


def test_inflation_is_that_of_the_variance_between_batches():
    # Of a quantity that the class decides, over all cuts of which this one is the worst.
    labels = np.repeat([0, 1], 50)
    between = np.var([batch.mean() for batch in labels.reshape(10, 10)], ddof=1)
    by_chance = np.var(labels, ddof=1) / 10
    assert purity(labels, 10).inflation == pytest.approx(between / by_chance, rel=0.1)


@pytest.mark.parametrize(
    "batches",
    [
        batches_of(np.repeat([0, 1], 100), 200),
        batches_of(np.repeat([0, 1], 100), 1),
        batches_of(np.zeros(200), 10),
        batches_of(np.repeat([0, 1], 3), 3),
        batches_of(np.tile([0, 1], 100), 10),
        batches_of(np.random.default_rng(0).normal(size=200).cumsum(), 10),
        [(torch.zeros(20, 2), torch.full((20, 4), k)) for k in range(9)],
        [(torch.zeros(5, 2), torch.full((20,), k)) for k in range(9)],
        [torch.full((20,), k) for k in range(9)],
        [(torch.zeros(20, 2), torch.tensor(k)) for k in range(9)],
        [(torch.zeros(20, 2), [k] * 20) for k in range(9)],
    ],
    ids=[
        "one batch",
        "one example a batch",
        "one class",
        "too few to tell",
        "balanced batches",
        "numbers",
        "labels of pixels",
        "labels of parts",
        "no pairs",
        "a label a batch",
        "no tensor",
    ],
)
def test_where_nothing_can_be_told_nothing_is_said(batches):
    assert not warnings_of(batches)


@pytest.mark.parametrize("form", [lambda y: y, lambda y: y.unsqueeze(1), lambda y: y.float(), lambda y: y.bool()])
def test_labels_of_every_form_are_seen(form):
    assert len(warnings_of([(x, form(y)) for x, y in batches_of(np.repeat([0, 1], 40), 20)])) == 1
    nested = [({"ids": x, "mask": x}, form(y)) for x, y in batches_of(np.repeat([0, 1], 40), 20)]
    assert len(warnings_of(nested)) == 1


FORMS = {
    "one-hot": lambda y: F.one_hot(y, 3),
    "one-hot, real": lambda y: F.one_hot(y, 3).float(),
    "smoothed": lambda y: 0.9 * F.one_hot(y, 3) + 0.1 / 3,
    "smoothed, half": lambda y: (0.9 * F.one_hot(y, 3) + 0.1 / 3).bfloat16(),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_class_probabilities_are_labels(form):
    sorted_, mixed = np.repeat([0, 1, 2], 40), np.random.default_rng(0).permutation(np.repeat([0, 1, 2], 40))
    assert len(warnings_of([(x, form(y)) for x, y in batches_of(sorted_, 20)])) == 1
    assert not warnings_of([(x, form(y)) for x, y in batches_of(mixed, 20)])


@pytest.mark.parametrize("name", ["labels", "label", "target", "y"])
@pytest.mark.parametrize("form", [lambda y: y, *FORMS.values()])
def test_labels_of_named_batches_are_seen(name, form):
    batches = batches_of(np.repeat([0, 1, 2], 40), 20)
    for made in (
        [{"ids": x, name: form(y)} for x, y in batches],
        [{name: form(y), "ids": x} for x, y in batches],
        [({"ids": x}, {"boxes": x, name: form(y)}) for x, y in batches],
    ):
        assert len(warnings_of(made)) == 1


@pytest.mark.parametrize(
    "batch_of",
    [
        lambda x, y: {"ids": x, "lengths": y},
        lambda x, y: {"ids": x[:1], "labels": y},
        lambda x, y: {"labels": y},
        lambda x, y: (x, torch.stack([y, y], 1)),
        lambda x, y: (x, F.one_hot(y, 3).float() - 0.1),
        lambda x, y: (x, torch.stack([y.float(), 0.5 - y.float()], 1)),
        lambda x, y: (x, {"ids": y}),
        lambda x, y: (x, F.one_hot(y, 3)[..., None].expand(-1, -1, 2)),
    ],
    ids=["lengths", "other axes", "no inputs", "two labels", "numbers", "negative", "no label", "labels of parts"],
)
def test_what_is_no_label_is_not_taken_for_one(batch_of):
    assert not warnings_of([batch_of(x, y) for x, y in batches_of(np.repeat([0, 1, 2], 40), 20)])


def test_a_tenth_of_the_data_in_random_places_hides_nothing():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 100)
    strays = rng.choice(len(labels), 100, replace=False)
    labels[strays] = rng.permutation(labels[strays])
    (message,) = warnings_of(batches_of(labels, 50))
    # The first two batches are of one class.
    seen, place = labels[:200], np.repeat(np.arange(4), 50)
    alike, together = (np.equal.outer(each, each)[np.triu_indices(200, k=1)] for each in (seen, place))
    within, any_two = 100 * alike[together].mean(), 100 * alike.mean()
    assert f"in the first 4 batches, two examples of a batch are of one class in {within:.3g} % of cases" in message
    assert f"any two in {any_two:.3g} %" in message


def test_the_warning_comes_when_the_evidence_does():
    seen = []

    def loader():
        for number, batch in enumerate(batches_of(np.repeat(np.arange(100), 50), 50)):
            seen.append(number)
            yield batch

    with pytest.warns(UserWarning, match="first 2 batches"):
        for _ in zip(range(2), warn_of_sorted_data(loader()), strict=False):
            pass
    assert len(seen) <= 3


def test_every_pass_of_an_objective_looks():
    torch.manual_seed(0)
    x, y = torch.randn(90, 4), torch.arange(3).repeat_interleave(30)
    models = [nn.Linear(4, 3) for _ in range(2)]
    data = TensorDataset(x, y)
    with pytest.warns(UserWarning, match="order of their classes"):
        Objective(models[0], DataLoader(data, 30)).gradient()
    with pytest.warns(UserWarning, match="order of their classes"):
        measure_barrier(*models, DataLoader(data, 30), progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure_barrier(*models, DataLoader(Subset(data, torch.randperm(90).tolist()), 30), progress=False)
        measure_barrier(*models, DataLoader(data, 90), progress=False)
        measure_barrier(*models, DataLoader(data, 30, shuffle=True), progress=False)


def test_what_is_raised_between_batches_is_left_alone():
    def loader():
        yield from batches_of(np.repeat([0, 1], 10), 10)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(warn_of_sorted_data(loader()))
