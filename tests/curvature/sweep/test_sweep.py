"""Claim: the sweep gives one answer however a batch is cut, equal to products and to differences of the loss."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmc_curvature import Objective, project_hessian
from lmc_curvature.curvature.problem import Tiling
from lmc_curvature.sources.resnets import resnet20
from tests.support.cases import CASES
from tests.support.networks import randomized
from tests.support.sweeping import (
    TwoLayers,
    assert_projections_agree,
    assert_sweep_agrees,
    compiled_batches,
    layer_directions,
    swept,
    vectors,
)


def _objective(name, sizes=(6, 6, 3), **options):
    case = CASES[name]
    return Objective(case.model(), case.batches(sizes), **{**case.options, **options})


# --- However it is cut


@pytest.mark.check
@pytest.mark.parametrize(
    ("name", "keeps_values"),
    [("conv, interpolate", False), ("attention", True), ("LSTM", True), ("tied weights", False)],
)
def test_tiles_of_examples_change_nothing(name, keeps_values):
    objective = _objective(name, (3, 3))
    directions = layer_directions(objective)
    whole = swept(objective, directions)
    tiling = Tiling(2, 99, keeps_values)
    assert_projections_agree(swept(objective, directions, tiling=tiling), whole, relative=1e-12)
    # The last tile of a batch is smaller.
    # Those of the tiles, and that of the batch, which is small enough to be compared whole.
    assert [set(each.networks) for each in compiled_batches(objective, directions, tiling=tiling)] == [{2, 1, 3}] * 2


@pytest.mark.check(after=1)
@pytest.mark.parametrize("together", [2, 3])
@pytest.mark.parametrize("name", ["conv, interpolate", "conv, batch", "LayerNorm and GELU", "dict batches"])
def test_groups_of_directions_change_nothing(name, together):
    objective = _objective(name, (4, 4))
    directions = layer_directions(objective)
    whole = swept(objective, directions)
    cut = swept(objective, directions, tiling=Tiling(4, together, keeps_values=True))
    assert_projections_agree(cut, whole, relative=1e-12)


@pytest.mark.check
def test_groups_of_directions_in_tiles_whose_values_are_computed_anew():
    objective = _objective("conv, interpolate", (4, 3))
    assert_sweep_agrees(objective, tiling=Tiling(2, 2, keeps_values=False))


@pytest.mark.check
@pytest.mark.parametrize(
    ("weights", "ignored"),
    [([0.2, 1.0, 3.0], -100), (None, 0), ([0.2, 1.0, 3.0], 2)],
    ids=["weighted", "ignoring", "both"],
)
def test_losses_that_weigh_examples_are_cut_right(weights, ignored):
    loss = nn.CrossEntropyLoss(weight=torch.tensor(weights) if weights else None, ignore_index=ignored)
    assert_sweep_agrees(_objective("LayerNorm and GELU", loss_fn=loss), tiling=Tiling(1, 99, keeps_values=True))


def test_a_table_with_as_many_rows_as_there_are_examples():
    class Table(TwoLayers):
        def forward(self, inputs):
            return self.second(torch.tanh(self.first(inputs["x"] + inputs["table"].mean(0))))

    batches = [({"x": x, "table": x.flip(0).square()}, y) for x, y in vectors(4, 4)]
    assert_sweep_agrees(Objective(randomized(Table().double()), batches), tiling=Tiling(1, 99, keeps_values=True))


# --- Against what is not autograd


@pytest.mark.check
@pytest.mark.parametrize("name", ["conv, interpolate", "conv, batch", "LayerNorm and GELU", "LSTM", "dict batches"])
def test_random_combinations_equal_second_differences_of_the_loss(name):
    objective = _objective(name)
    state, directions = objective.state(), layer_directions(objective)
    found = swept(objective, directions)
    rng = np.random.default_rng(0)
    for _ in range(3):
        coefficients = rng.standard_normal(len(directions))
        along = {entry: torch.zeros_like(tensor) for entry, tensor in state.items()}
        for coefficient, direction in zip(coefficients, directions.values(), strict=True):
            for entry, tensor in direction.items():
                along[entry] += coefficient * tensor

        def loss(step, along=along):
            return objective.loss({entry: state[entry] + step * along[entry] for entry in state})

        h = 2e-3
        # Fourth order, so that the differences' own error is far below the tolerance.
        slope = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)
        curvature = (16 * (loss(h) + loss(-h)) - (loss(2 * h) + loss(-2 * h)) - 30 * loss(0)) / (12 * h * h)
        assert coefficients @ found.slopes == pytest.approx(slope, rel=1e-7, abs=1e-9)
        assert coefficients @ found.curvature @ coefficients == pytest.approx(curvature, rel=1e-6, abs=1e-7)


def test_the_dense_hessian_of_a_small_network():
    model = randomized(nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.LayerNorm(4), nn.Linear(4, 3)).double())
    ((x, y),) = vectors(7)
    objective = Objective(model, [(x, y)])
    state = objective.state()
    shapes = [tensor.shape for tensor in state.values()]
    sizes = [tensor.numel() for tensor in state.values()]

    def loss(vector):
        parts = [part.view(shape) for part, shape in zip(vector.split(sizes), shapes, strict=True)]
        return F.cross_entropy(torch.func.functional_call(model, dict(zip(state, parts, strict=True)), (x,)), y)

    dense = torch.autograd.functional.hessian(loss, torch.cat([tensor.flatten() for tensor in state.values()]))
    units = [
        dict(zip(state, (part.view(s) for part, s in zip(unit.split(sizes), shapes, strict=True)), strict=True))
        for unit in torch.eye(sum(sizes), dtype=torch.float64)
    ]
    np.testing.assert_allclose(swept(objective, units).curvature, dense.numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.check
def test_single_precision_agrees_as_well_as_it_can():
    torch.manual_seed(0)
    model = resnet20().eval()
    objective = Objective(model, [(torch.randn(4, 3, 32, 32), torch.arange(4))])
    directions = layer_directions(objective, "fused", most=6)
    found = swept(objective, directions).curvature
    expected = project_hessian(objective, {}, directions, method="hvp").curvature
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    exact = project_hessian(Objective(model.double(), objective.loader), {}, directions, method="hvp").curvature
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-5 * np.abs(exact).max())
