"""Claim: a network that mixes the examples of a batch is told from one that does not, near a state."""

import pytest
import torch

from lmc_curvature import Objective
from lmc_curvature.curvature.problem import Tiling
from lmc_curvature.curvature.sweep import compile_batch, evaluate_batch, mixes_examples
from lmc_curvature.objective.batches import Batch
from tests.support.mixing import ByAGate, ByCount, ByMarks, ByNearness, ByTheMean
from tests.support.networks import randomized
from tests.support.sweeping import TwoLayers, layer_directions, posed, vectors


class _ByTheFirst(TwoLayers):
    """Adds the first example to all."""

    def forward(self, x):
        return self.second(torch.tanh(self.first(x) + x[:1, :1]))


class _ByTheLast(TwoLayers):
    """Adds the last example to all."""

    def forward(self, x):
        return self.second(torch.tanh(self.first(x) + x[-1:, :1]))


class _ByThoseBefore(TwoLayers):
    """Adds up all examples so far."""

    def forward(self, x):
        return self.second(torch.tanh(self.first(x).cumsum(0)))


class _ByTheNeighbour(TwoLayers):
    """Adds the next example to each."""

    def forward(self, x):
        return self.second(torch.tanh(self.first(x) + x.roll(1, 0)[:, :1]))


class _ByHalves(TwoLayers):
    """Adds the second half of a batch to its first, with a weight that is zero at first."""

    def __init__(self):
        super().__init__()
        self.gate = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x):
        half = len(x) // 2
        other = torch.cat([x[half : 2 * half], 0 * x[half:]])
        return self.second(torch.tanh(self.first(x) + self.gate * other[:, :1]))


class _ByOrder(TwoLayers):
    """Weighs the units of an example by how many examples are larger."""

    def forward(self, x):
        larger = (x[:, :1] > x[:, 0]).sum(1, keepdim=True)
        return self.second(torch.tanh(self.first(x)) * (1 + larger))


@pytest.mark.check(after=2)
@pytest.mark.parametrize("size", [6, 9, 40])
@pytest.mark.parametrize(
    "make",
    [
        TwoLayers,
        ByTheMean,
        ByAGate,
        ByCount,
        # No two examples of this batch are near each other, or have the same mark.
        ByNearness,
        ByMarks,
        _ByTheFirst,
        _ByTheLast,
        _ByThoseBefore,
        _ByTheNeighbour,
        _ByHalves,
        _ByOrder,
    ],
)
def test_mixing_shows_in_the_company_of_others_and_of_copies(make, size):
    model = randomized(make().double())
    if hasattr(model, "gate"):
        model.gate.data.zero_()
    objective = Objective(model, vectors(size))
    problem = posed(objective, layer_directions(objective, "tensor"), tiling=Tiling(2, 99, keeps_values=True))
    (point,), batch = problem.points, Batch(0, size, objective.loader[0])
    compiled = compile_batch(problem, batch, evaluate_batch(objective, point, batch), whole=False)
    assert compiled.is_tiled
    assert mixes_examples(problem, compiled, point, batch) == (make is not TwoLayers)
