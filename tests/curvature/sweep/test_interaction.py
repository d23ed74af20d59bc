"""Claim: a network that mixes the examples of a batch is told from one that does not, near a state."""

import pytest
import torch

from lmc_curvature import Objective
from lmc_curvature.curvature.problem import Tiling
from lmc_curvature.curvature.sweep import compile_batch, copies_stay_apart, tiles_join
from lmc_curvature.objective.batches import Batch
from tests.support.networks import randomized
from tests.support.sweeping import TwoLayers, layer_directions, posed, vectors


class _ByTheMean(TwoLayers):
    """Mixes all examples, with a weight that is zero at first."""

    def __init__(self):
        super().__init__()
        self.gate = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        return self.second(hidden + self.gate * hidden.mean(0))


class _Neighbours(TwoLayers):
    """Adds up the hidden units of inputs that are near each other."""

    def forward(self, x):
        near = ((x[:, None] - x).norm(dim=-1) < 0.1).to(x.dtype)
        return self.second(torch.tanh(near @ self.first(x)))


class _ByTheFirst(TwoLayers):
    """Adds the first example to all."""

    def forward(self, x):
        return self.second(torch.tanh(self.first(x) + x[:1, :1]))


@pytest.mark.parametrize(
    ("make", "joins", "stays_apart"),
    [
        (TwoLayers, True, True),
        (_ByTheMean, False, True),
        # No two examples of this batch are near each other.
        (_Neighbours, True, False),
        (_ByTheFirst, False, True),
    ],
)
def test_mixing_shows_between_tiles_or_among_copies(make, joins, stays_apart):
    model = randomized(make().double())
    if make is _ByTheMean:
        model.gate.data.zero_()
    objective = Objective(model, vectors(6))
    problem = posed(objective, layer_directions(objective, "tensor"), tiling=Tiling(2, 99, keeps_values=True))
    (point,), batch = problem.points, Batch(0, 6, objective.loader[0])
    compiled = compile_batch(problem, batch, whole=False)
    assert compiled.is_tiled
    assert tiles_join(problem, compiled, point, batch) == joins
    assert copies_stay_apart(problem, compiled, point, batch) == stays_apart
