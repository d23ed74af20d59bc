"""Claim: what is said of a point of the cube beside its loss: each batch's loss, and how far the loss may be off."""

import numpy as np
import pytest

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
