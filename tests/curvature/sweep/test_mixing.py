"""Claim: a network that mixes the examples of a batch is told from one that does not, near a state."""

import pytest
import torch

from lmc_curvature import Objective
from lmc_curvature.curvature.problem import Tiling
from lmc_curvature.curvature.sweep import compile_batch, copies_stay_apart, tiles_join
from lmc_curvature.objective.batches import Batch
from tests.support.mixing import ByAGate, ByMarks, ByNearness, ByTheMean
from tests.support.networks import randomized
from tests.support.sweeping import TwoLayers, layer_directions, posed, vectors


class _ByTheFirst(TwoLayers):
    """Adds the first example to all."""

    def forward(self, x):
        return self.second(torch.tanh(self.first(x) + x[:1, :1]))


@pytest.mark.parametrize(
    ("make", "joins", "stays_apart"),
    [
        (TwoLayers, True, True),
        (ByTheMean, False, True),
        (ByAGate, False, True),
        # No two examples of this batch are near each other.
        (ByNearness, True, False),
        (ByMarks, True, False),
        (_ByTheFirst, False, True),
    ],
)
def test_mixing_shows_between_tiles_or_among_copies(make, joins, stays_apart):
    model = randomized(make().double())
    if make is ByAGate:
        model.gate.data.zero_()
    objective = Objective(model, vectors(6))
    problem = posed(objective, layer_directions(objective, "tensor"), tiling=Tiling(2, 99, keeps_values=True))
    (point,), batch = problem.points, Batch(0, 6, objective.loader[0])
    compiled = compile_batch(problem, batch, whole=False)
    assert compiled.is_tiled
    assert tiles_join(problem, compiled, point, batch) == joins
    assert copies_stay_apart(problem, compiled, point, batch) == stays_apart
