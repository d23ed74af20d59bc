"""Claim: what is said of a point of the cube beside its loss: each batch's loss, and how far the loss may be off."""

import numpy as np
import pytest

from lmc_curvature import Projection
from lmc_curvature.barrier.cube import Anchor, Cube
from lmc_curvature.errors import OptionError
from tests.support.predictions import prediction_of, random_prediction


def test_losses_of_batches_have_the_predicted_loss_as_their_mean():
    prediction = random_prediction(5, 0)
    for point in np.random.default_rng(0).random((4, 5)):
        batches = prediction.batch_losses(point)
        assert batches.shape == (3,)
        assert np.ptp(batches) > 0
        assert batches.mean() == pytest.approx(float(prediction.loss_at(point[None])[0]), abs=1e-12)


def test_losses_are_known_at_anchors_and_less_so_away_from_them():
    prediction = random_prediction(5, 1, positions=(0.0, 0.3, 1.0))
    anchors = np.array([0.0, 0.3, 1.0])[:, None] * np.ones(5)
    np.testing.assert_allclose(prediction.loss_errors(anchors), 0, atol=1e-9)
    away = prediction.loss_errors(np.random.default_rng(0).random((20, 5)))
    assert (away > 0).all()
    # In units of the loss.
    scaled = prediction_of(
        *(
            10 * np.stack([getattr(each.projection, name) for each in prediction.anchors])
            for name in ("slopes", "curvature", "loss")
        ),
        positions=(0.0, 0.3, 1.0),
    )
    points = np.random.default_rng(0).random((20, 5))
    np.testing.assert_allclose(scaled.loss_errors(points), 10 * away, rtol=1e-9)


def test_points_outside_the_cube_are_refused():
    prediction = random_prediction(3, 0)
    for call in (prediction.loss_at, prediction.loss_errors):
        with pytest.raises(OptionError, match=r"points: expected an array \(n, 3\) of numbers in \[0, 1\]"):
            call(np.full((2, 3), 1.5))


def _cube(batches):
    """Three anchors of two layers whose values scatter from batch to batch."""
    generator = np.random.default_rng(0)
    anchors = []
    for alpha in (0.0, 0.5, 1.0):
        curvatures = generator.normal(size=(batches, 2, 2)) + np.diag([3.0, 1.0])
        curvatures = curvatures + curvatures.swapaxes(1, 2)
        slopes, losses = generator.normal(size=(batches, 2)), generator.normal(size=batches)
        anchors.append(Anchor(alpha, Projection(np.arange(2, 2 + batches), losses, slopes, curvatures)))
    return Cube(("a", "b"), tuple(anchors))


def test_pseudo_values_are_those_of_batches_where_the_barrier_is_linear_in_them():
    cube, all_of_them = _cube(7), np.array([[True, True]])
    found = cube.pseudo_barriers(all_of_them, 0.3, "second-order")
    np.testing.assert_allclose(found[:, 0], cube.batch_barriers(all_of_them[0], 0.3, "second-order"), rtol=1e-9)


def test_pseudo_values_are_a_jackknife_of_the_anchored_barrier():
    cube, member = _cube(5), np.array([[True, False]])
    found = cube.pseudo_barriers(member, 0.5, "anchored")[:, 0]
    weights = cube.anchors[0].projection.weights
    (whole,) = cube.barriers(member, np.array([[0.5]]), "anchored")[0]
    for batch in range(5):
        kept = np.arange(5) != batch
        anchors = [
            Anchor(
                a, Projection(p.batch_sizes[kept], p.batch_losses[kept], p.batch_slopes[kept], p.batch_curvatures[kept])
            )
            for a, p in cube.anchors
        ]
        (without,) = Cube(cube.layers, tuple(anchors)).barriers(member, np.array([[0.5]]), "anchored")[0]
        share = weights.sum() / weights[batch]
        assert found[batch] == pytest.approx(share * whole - (share - 1) * without, rel=1e-9)
