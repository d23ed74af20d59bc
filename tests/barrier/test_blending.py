"""Claim: the blend is exact where the loss is known, and where it is of second order; its sums for sets are right."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmc_curvature.barrier.blending import Features, combine, layer_shares, point_weights, set_weights

LAYERS = 4


class Known:
    """Loss, slopes and curvature at anchors: random ones, or those of a function of the cube."""

    def __init__(self, positions, function=None, seed=0):
        rng = np.random.default_rng(seed)
        self.positions = np.array(positions)
        count = len(positions)
        self.losses, self.slopes = rng.normal(size=count), rng.normal(size=(count, LAYERS))
        curvatures = rng.normal(size=(count, LAYERS, LAYERS))
        self.curvatures = curvatures + curvatures.transpose(0, 2, 1)
        if function is not None:
            found = [function(alpha * np.ones(LAYERS)) for alpha in positions]
            self.losses, self.slopes, self.curvatures = (np.array(column) for column in zip(*found, strict=True))
        self.shares = layer_shares(self.curvatures)

    def features(self, x):
        along = self.curvatures.sum(2)
        totals = [self.losses, self.slopes.sum(1), along.sum(1)]
        own = np.einsum("nl,alm,nm->an", x, self.curvatures, x)
        return Features(*(np.tile(t[:, None], len(x)) for t in totals), self.slopes @ x.T, along @ x.T, own)

    def loss(self, x):
        return combine(point_weights(self.positions, x @ self.shares, x**2 @ self.shares), self.features(x))

    def barrier(self, members, alpha):
        return combine(set_weights(self.positions, alpha, members @ self.shares), self.features(members))


POSITIONS = [[0.0, 1.0], [0.0, 0.5, 1.0], [0.0, 0.2, 0.55, 1.0]]


@pytest.mark.parametrize("positions", POSITIONS)
def test_value_slopes_and_curvature_are_those_of_the_anchors(positions):
    known = Known(positions)
    sides = np.stack(np.meshgrid(*[[-1.0, 0.0, 1.0]] * LAYERS, indexing="ij"), -1).reshape(-1, LAYERS)

    def rest(number, step):
        d = step * sides
        expansion = known.losses[number] + d @ known.slopes[number]
        expansion += np.einsum("nl,lm,nm->n", d, known.curvatures[number], d) / 2
        return np.abs(known.loss(d + positions[number]) - expansion).max()

    for number in range(len(positions)):
        assert rest(number, 0.0) < 1e-14
        # Of third order: a thousandth at a tenth of the distance.
        assert rest(number, 1e-4) < 2e-3 * rest(number, 1e-3)


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_function_of_second_order_is_predicted_exactly(positions):
    rng = np.random.default_rng(1)
    A, b = rng.normal(size=(LAYERS, LAYERS)), rng.normal(size=LAYERS)
    H = A + A.T
    known = Known(positions, lambda x: (1.5 + b @ x + x @ H @ x / 2, b + H @ x, H))
    x = rng.random((50, LAYERS))
    expected = 1.5 + x @ b + np.einsum("nl,lm,nm->n", x, H, x) / 2
    np.testing.assert_allclose(known.loss(x), expected, atol=1e-12)


@given(
    st.integers(0, 100), st.sampled_from(POSITIONS), st.floats(0, 1), st.lists(st.booleans(), min_size=4, max_size=4)
)
def test_barriers_of_sets_are_those_of_their_two_points(seed, positions, alpha, chosen):
    known, members = Known(positions, seed=seed), np.array([chosen], dtype=float)
    near, far = known.loss(alpha * members), known.loss(1 - (1 - alpha) * members)
    chord = (1 - alpha) * known.losses[0] + alpha * known.losses[-1]
    found = known.barrier(members, np.array([alpha]))
    np.testing.assert_allclose(found, (1 - alpha) * near + alpha * far - chord, atol=1e-9)


def test_the_scale_of_the_loss_does_not_matter():
    known, larger = Known([0.0, 0.5, 1.0]), Known([0.0, 0.5, 1.0])
    for name in ("losses", "slopes", "curvatures"):
        setattr(larger, name, 1e6 * getattr(known, name))
    larger.shares = layer_shares(larger.curvatures)
    x = np.random.default_rng(2).random((20, LAYERS))
    np.testing.assert_allclose(larger.loss(x), 1e6 * known.loss(x), rtol=1e-9)


def test_shares_are_of_the_energy_at_the_ends_and_never_zero():
    curvatures = np.zeros((3, 3, 3))
    assert layer_shares(curvatures).tolist() == [1 / 3] * 3
    curvatures[0, 0, 0], curvatures[2, 0, 0], curvatures[2, 1, 1], curvatures[1, 2, 2] = 1, -3, 2, 100
    shares = layer_shares(curvatures)
    np.testing.assert_allclose(shares[:2], [2 / 3, 1 / 3], rtol=1e-5)
    assert 0 < shares[2] < 1e-5
