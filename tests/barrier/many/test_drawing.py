"""Claim: figures of many networks show the barriers of pairs, and those of layers at the mean, with their errors."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from lmc_curvature import measure_barriers, predict_barriers
from tests.support.cases import CASES

CASE = CASES["LayerNorm and GELU"]


@pytest.fixture(scope="module")
def models():
    return [CASE.model(seed) for seed in range(3)]


def _cells(axes):
    (image,) = axes.images
    return np.ma.filled(image.get_array(), np.nan)


@pytest.mark.check
def test_a_prediction_shows_pairs_and_layers(models, saved, uncut):
    found = predict_barriers(models, CASE.batches(), progress=False)
    figure = found.plot()
    saved(figure)
    uncut(figure)
    pairs, layers = figure.axes
    assert_allclose(_cells(pairs), np.where(np.eye(3) == 1, np.nan, found.heights()))
    assert [label.get_text() for label in pairs.get_yticklabels()] == ["model_a", "model_b", "model_c"]
    assert_allclose([bar.get_width() for bar in layers.containers[0]], found.layer_barriers())
    assert [label.get_text() for label in layers.get_yticklabels()] == list(found.layers)


@pytest.mark.check
def test_a_measurement_shows_pairs_and_sets_of_layers(models, saved, uncut):
    found = measure_barriers(models, CASE.batches(), sets="each", alphas=3, progress=False)
    figure = found.plot()
    saved(figure)
    uncut(figure)
    pairs, rows = figure.axes
    assert_allclose(_cells(pairs), np.where(np.eye(3) == 1, np.nan, found.heights()))
    widths = [bar.get_width() for bar in rows.containers[0]]
    assert_allclose(widths, [*found.set_barriers(), found.mean_barrier()])
    without = measure_barriers(models, CASE.batches(), alphas=3, progress=False).plot()
    assert [label.get_text() for label in without.axes[1].get_yticklabels()] == ["all layers"]
