"""Predictions from numbers instead of networks: random ones, and those of a function of the cube."""

import numpy as np

from lmc_curvature import BarrierPrediction, Projection
from lmc_curvature.barrier.cube import Anchor


def prediction_of(slopes, curvatures, losses, parameters=None, positions=(0.0, 0.5, 1.0), spread=0.1, seed=0):
    """A prediction whose anchors have these means, (anchors, …), and three batches around them."""
    rng, count = np.random.default_rng(seed), slopes.shape[1]

    def batches(mean):
        noise = spread * rng.normal(size=(3, *np.shape(mean)))
        # The second derivatives of every batch are symmetric.
        noise = (noise + noise.swapaxes(1, 2)) / 2**0.5 if noise.ndim == 3 else noise
        return np.asarray(mean) + noise - noise.mean(0)

    anchors = []
    for position, loss, slope, curvature in zip(positions, losses, slopes, curvatures, strict=True):
        projection = Projection(np.full(3, 8), batches(loss), batches(slope), batches(curvature))
        anchors.append(Anchor(position, projection))
    layers = tuple(f"layer{index}" for index in range(count))
    sizes = rng.integers(1, 100, count) if parameters is None else parameters
    return BarrierPrediction(layers, tuple(anchors), rng.random(count) + 0.1, "interpolate", (), sizes)


def random_prediction(count, seed=0, *, positions=(0.0, 0.5, 1.0), definite=False):
    """A prediction of random numbers, with indefinite curvature unless it is asked to be definite."""
    rng, anchors = np.random.default_rng(seed), len(positions)
    roots = rng.normal(size=(anchors, count, count))
    curvatures = roots @ roots.transpose(0, 2, 1) if definite else roots + roots.transpose(0, 2, 1)
    return prediction_of(
        rng.normal(size=(anchors, count)), curvatures, rng.random(anchors) + 0.5, positions=positions, seed=seed
    )
