"""Claim: on quadratics, barriers of pairs, of the mean, of layers and of subsets are their closed forms."""

from itertools import combinations

import numpy as np
import pytest
import torch

from lmc_curvature import measure_barriers, predict_barriers
from lmc_curvature.landscapes import Quadratic, landscape_loss

NAMES = ("north", "east", "south", "west")
WEIGHTS = np.array([0.4, 0.3, 0.2, 0.1])
LAYERS = {"first": 2, "second": 1, "third": 3}
OPTIONS = {"loss_fn": landscape_loss, "names": NAMES, "weights": WEIGHTS, "progress": False}


class Landscape:
    """A quadratic, four networks on it, and batches of shifts."""

    def __init__(self, seed=0, count=4):
        rng = np.random.default_rng(seed)
        root = rng.normal(size=(6, 6))
        # Neither definite nor the same for all layers.
        self.hessian = root + root.T + 2 * np.eye(6)
        self.minimum, self.places = rng.normal(size=6), rng.normal(size=(count, 6))
        self.shifts = rng.normal(size=(7, 6))
        self.owner = np.repeat(list(LAYERS), list(LAYERS.values()))
        parts = torch.from_numpy(self.shifts).split([3, 2, 2])
        self.loader = [(part, part) for part in parts]

    def models(self):
        options = {"minimum": torch.from_numpy(self.minimum), "layers": LAYERS, "offset": 0.7}
        A = torch.from_numpy(self.hessian)
        return [Quadratic(A, position=torch.from_numpy(place), **options) for place in self.places]

    def loss(self, place):
        away = place - self.minimum - self.shifts
        return 0.7 + np.einsum("ni,ij,nj->n", away, self.hessian, away).mean() / 2

    def set_barrier(self, weights, members):
        mean, inside = weights @ self.places, np.isin(self.owner, members)
        moved = [self.loss(np.where(inside, mean, place)) - self.loss(place) for place in self.places]
        return weights @ moved

    def subset(self, weights, members):
        y = weights[members] / weights[members].sum()
        loss = self.loss(y @ self.places[members])
        return loss, loss - y @ [self.loss(place) for place in self.places[members]]


SETS = [["first"], ["third", "second"], list(LAYERS)]
SUBSETS = [list(some) for size in range(1, 5) for some in combinations(range(4), size)]


@pytest.fixture(scope="module")
def landscape():
    return Landscape()


@pytest.fixture(scope="module")
def prediction(landscape):
    return predict_barriers(landscape.models(), landscape.loader, **OPTIONS)


@pytest.fixture(scope="module")
def measurement(landscape):
    subsets = [[NAMES[number] for number in some] for some in SUBSETS]
    return measure_barriers(
        landscape.models(), landscape.loader, sets=SETS, subsets=subsets, metrics=("loss",), **OPTIONS
    )


def test_losses_and_the_mean_are_known(landscape, prediction, measurement):
    losses = [landscape.loss(place) for place in landscape.places]
    mean = landscape.loss(WEIGHTS @ landscape.places)
    for found in (prediction.losses, measurement.network_values()):
        np.testing.assert_allclose(found, losses, rtol=1e-12)
    assert prediction.mean_loss == pytest.approx(mean, rel=1e-12)
    assert measurement.mean_value() == pytest.approx(mean, rel=1e-12)
    for found in (prediction, measurement):
        assert found.mean_barrier() == pytest.approx(mean - WEIGHTS @ losses, abs=1e-11)


def test_barriers_of_pairs_are_their_closed_form(landscape, prediction, measurement):
    for (i, first), (j, second) in combinations(enumerate(NAMES), 2):
        delta = landscape.places[j] - landscape.places[i]
        energy = delta @ landscape.hessian @ delta
        # Above the chord, the parabola −α(1−α)/2 · ΔᵀAΔ.
        curve = -measurement.alphas * (1 - measurement.alphas) / 2 * energy
        scale = max(1.0, abs(energy))
        pair = prediction.pair(first, second)
        np.testing.assert_allclose(pair.curve(measurement.alphas), curve, atol=1e-10 * scale)
        np.testing.assert_allclose(measurement.pair(second, first).curve(), curve, atol=1e-11 * scale)
        barrier = max(0.0, -energy / 8)
        for found in (prediction, measurement):
            np.testing.assert_allclose(found.barriers(), found.barriers().T, atol=0)
            assert found.barriers()[i, j] == pytest.approx(barrier, abs=1e-10 * scale)
            # Below zero where it nowhere rises.
            assert found.heights()[i, j] == pytest.approx(-energy / 8, abs=1e-10 * scale)


def test_sets_of_layers_towards_the_mean_are_their_closed_form(landscape, prediction, measurement):
    expected = [landscape.set_barrier(WEIGHTS, members) for members in SETS]
    np.testing.assert_allclose(prediction.mean_barriers(SETS), expected, atol=1e-10)
    np.testing.assert_allclose(measurement.set_barriers(), expected, atol=1e-11)
    assert prediction.mean_barrier(SETS[1]) == pytest.approx(expected[1], abs=1e-10)
    layers = [landscape.set_barrier(WEIGHTS, [layer]) for layer in LAYERS]
    np.testing.assert_allclose(prediction.layer_barriers(), layers, atol=1e-10)


def test_every_subset_is_its_closed_form(landscape, prediction, measurement):
    found = {subset.networks: subset for subset in prediction.subsets}
    assert len(found) == 15
    assert [subset.loss for subset in prediction.subsets] == sorted(subset.loss for subset in prediction.subsets)
    for number, some in enumerate(SUBSETS):
        loss, rise = landscape.subset(WEIGHTS, some)
        subset = found[tuple(NAMES[each] for each in some)]
        assert subset.loss == pytest.approx(loss, abs=1e-10)
        assert subset.rise == pytest.approx(rise, abs=1e-10)
        np.testing.assert_allclose(subset.weights, WEIGHTS[some] / WEIGHTS[some].sum())
        assert measurement.subset_values()[number] == pytest.approx(loss, abs=1e-11)
        assert measurement.subset_rises()[number] == pytest.approx(rise, abs=1e-11)


def test_predicted_and_measured_sampling_errors_agree(prediction, measurement):
    # All of second order, so every batch is predicted exactly.
    assert prediction.mean_standard_error() == pytest.approx(measurement.mean_standard_error(), abs=1e-10)
    for number, members in enumerate(SETS):
        expected = measurement.set_standard_errors()[number]
        assert prediction.mean_standard_error(members) == pytest.approx(expected, abs=1e-10)
    measured = dict(zip(measurement.subsets, measurement.subset_standard_errors(), strict=True))
    for subset in prediction.subsets:
        assert subset.standard_error == pytest.approx(measured[subset.networks], abs=1e-10)


@pytest.mark.check
def test_of_many_networks_a_search_finds_the_best_subset_of_a_bowl():
    rng = np.random.default_rng(3)
    places = rng.normal(size=(12, 6))
    A = torch.eye(6, dtype=torch.float64)
    models = [Quadratic(A, layers=LAYERS, position=torch.from_numpy(place)) for place in places]
    found = predict_barriers(
        models, [(torch.zeros(1, 6).double(),) * 2], loss_fn=landscape_loss, anchors=2, progress=False
    )
    assert len(found.subsets) < 200
    sizes = {len(subset.networks) for subset in found.subsets}
    assert sizes == set(range(1, 13))
    for subset in (found.subsets[0], found.subsets[40]):
        some = [found.names.index(name) for name in subset.networks]
        assert subset.loss == pytest.approx((places[some].mean(0) ** 2).sum() / 2, abs=1e-9)
    best, singles = found.subsets[0], [subset.loss for subset in found.subsets if len(subset.networks) == 1]
    assert best.loss < min(singles)
