"""Claim: what is known of single networks, pairs and all of them is what the formula for subsets gives back."""

from itertools import combinations

import numpy as np
import pytest

from lmc_curvature.barrier.many.ranking import pair_matrix
from lmc_curvature.barrier.many.subsets import every_subset, pair_rises, search_subsets, shares, triples

WEIGHTS = np.array([0.1, 0.2, 0.3, 0.15, 0.25])
COUNT = len(WEIGHTS)


@pytest.fixture
def known():
    """Barriers of pairs and of all, for two batches."""
    rng = np.random.default_rng(0)
    return pair_matrix(rng.normal(size=(10, 2)), COUNT), rng.normal(size=2)


def test_pairs_of_networks_are_a_symmetric_matrix():
    found = pair_matrix(np.arange(1.0, 4.0), 3)
    assert found.tolist() == [[0, 1, 2], [1, 0, 3], [2, 3, 0]]
    assert pair_matrix(np.ones((3, 5)), 3).shape == (5, 3, 3)


def test_all_subsets_are_there_once():
    members = every_subset(4)
    assert members.shape == (15, 4)
    assert len({tuple(row) for row in members.tolist()}) == 15
    assert members.any(axis=1).all()
    np.testing.assert_allclose(shares(WEIGHTS[:4], members).sum(axis=1), 1)
    assert not shares(WEIGHTS[:4], members)[~members].any()


def test_what_is_known_comes_back(known):
    pairs, whole = known
    members = every_subset(COUNT)
    found = pair_rises(WEIGHTS, pairs, members) + triples(WEIGHTS, pairs, whole, members)
    assert found.shape == (2, 31)
    for column, row in zip(found.T, members, strict=True):
        chosen = np.flatnonzero(row)
        if len(chosen) == 1:
            np.testing.assert_allclose(column, 0, atol=1e-14)
        elif len(chosen) == 2:
            np.testing.assert_allclose(column, pairs[:, chosen[0], chosen[1]], atol=1e-13)
        elif len(chosen) == COUNT:
            np.testing.assert_allclose(column, whole, atol=1e-13)


def test_what_pairs_do_not_make_is_spread_over_triples(known):
    pairs, whole = known
    members, every = every_subset(COUNT), np.ones((1, COUNT), dtype=bool)

    def third(y):
        return sum(y[i] * y[j] * y[k] for i, j, k in combinations(range(COUNT), 3))

    rest = whole - pair_rises(WEIGHTS, pairs, every)[:, 0]
    parts = [third(y) / third(WEIGHTS) for y in shares(WEIGHTS, members)]
    np.testing.assert_allclose(triples(WEIGHTS, pairs, whole, members), np.outer(rest, parts), atol=1e-14)
    # Two networks make no triples.
    assert not triples(WEIGHTS[:2], pairs[:, :2, :2], whole, every_subset(2)).any()


def test_a_search_goes_from_the_best_network_to_all():
    values = np.array([3.0, 1.0, 2.0, 5.0])
    looked_at = search_subsets(4, lambda members: np.array([values[row].mean() for row in members]))
    found = {tuple(np.flatnonzero(row)) for row in looked_at}
    # Single networks, all but one, all; pairs with the best, and triples with the best two.
    assert found == {
        *((number,) for number in range(4)),
        *((0, 1), (1, 2), (1, 3)),
        *((0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)),
        (0, 1, 2, 3),
    }
    assert len(looked_at) == len(found)
