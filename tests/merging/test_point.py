"""Claim: the best point has the least predicted loss in the cube, and its measured loss is a plain network's."""

import numpy as np
import pytest

from lmc_curvature import best_point, predict_barrier
from tests.merging.test_verify import LOADER, MODELS, OTHERS, plain_rise
from tests.support.predictions import prediction_of, random_prediction


def quadratic(minimum, hessian):
    """The prediction of a loss 1 + ½ (x − m)ᵀ H (x − m)."""
    ones = np.ones(len(minimum))
    away = np.array([0.0, 0.5, 1.0])[:, None] * ones - minimum
    losses = 1 + np.einsum("al,lm,am->a", away, hessian, away) / 2
    return prediction_of(away @ hessian, np.tile(hessian, (3, 1, 1)), losses, spread=0.0)


def test_the_minimum_of_a_quadratic_is_found():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(5, 5))
    minimum = rng.uniform(0.1, 0.9, 5)
    found = best_point(quadratic(minimum, root @ root.T + np.eye(5)))
    np.testing.assert_allclose(list(found.alphas.values()), minimum, atol=1e-3)
    assert found.loss == pytest.approx(1.0, abs=1e-6)
    assert list(found.alphas) == [f"layer{k}" for k in range(5)]


def test_a_minimum_outside_the_cube_is_found_at_its_boundary():
    # The Hessian is diagonal, so every coordinate is its own.
    found = best_point(quadratic(np.array([-0.5, 0.25, 1.5]), np.diag([2.0, 1.0, 3.0])))
    np.testing.assert_allclose(list(found.alphas.values()), [0, 0.25, 1], atol=1e-4)
    assert "itself" not in str(found)


@pytest.mark.parametrize(("minimum", "name"), [((-0.5, -0.2), "model_a"), ((1.5, 1.2), "model_b")])
def test_a_corner_is_said_to_be_one_of_the_two(minimum, name):
    assert f"\n  this is {name} itself\n" in str(best_point(quadratic(np.array(minimum), np.diag([2.0, 1.0]))))


@pytest.mark.check
@pytest.mark.parametrize("seed", range(2))
def test_no_other_point_is_predicted_lower(seed):
    prediction = random_prediction(4, seed)
    found = best_point(prediction)
    grid = np.stack(np.meshgrid(*[np.linspace(0, 1, 9)] * 4, indexing="ij"), -1).reshape(-1, 4)
    assert found.loss <= prediction.loss_at(grid).min() + 1e-6
    x = np.array([list(found.alphas.values())])
    assert found.loss == pytest.approx(float(prediction.loss_at(x)[0]))
    ends = prediction.endpoints
    assert found.rise == pytest.approx(found.loss - (ends[0].loss + ends[1].loss) / 2)
    assert found.expansion_error == pytest.approx(float(prediction.loss_errors(x)[0]))
    if found.loss < 0:
        assert "below zero" in str(found)


@pytest.mark.check
def test_measured_points_are_plain_networks():
    prediction = predict_barrier(*MODELS, LOADER, progress=False)
    found = best_point(prediction).verify(*MODELS, LOADER, measurements=3, held_out=OTHERS, progress=False)
    assert 1 <= len(found.trials) <= 3
    for trial in [*found.trials, found.chosen]:
        assert trial.rise == pytest.approx(plain_rise(MODELS, LOADER, trial.alphas), abs=1e-10)
    assert found.held_out.rise == pytest.approx(plain_rise(MODELS, OTHERS, found.point.alphas), abs=1e-10)
    assert found.chosen.rise == min(found.chosen.rise, *(trial.rise for trial in found.trials))
    # Never above the better of the two networks.
    ends = [plain_rise(MODELS, LOADER, dict.fromkeys(prediction.layers, end)) for end in (0.0, 1.0)]
    assert found.chosen.rise <= min(ends) + 1e-12
    assert f"on held-out     {found.held_out.rise:.4g}" in str(found)
    assert str(found).count("expected") == len(found.trials)
