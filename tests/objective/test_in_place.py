"""Who writes into what is handed out, a network into its inputs or a user into a state, changes nothing."""

import pytest
import torch
from torch import nn

from lmc_curvature import GGNOperator, HessianOperator, Objective, measure_barrier, predict_barrier, project_hessian

WRITERS = {
    "subtract and divide": lambda x: x.sub_(0.5).div_(0.25),
    "multiply": lambda x: x.mul_(2),
    "an item": lambda x: x.__setitem__((slice(None), 0), 3.0) or x,
}


class Writer(nn.Module):
    """Prepares its inputs in place."""

    def __init__(self, write, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.write, self.layers = write, nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x):
        return self.layers(self.write(x))


def _loader():
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(3)]


@pytest.mark.check
@pytest.mark.filterwarnings("ignore:.*cannot be captured")
@pytest.mark.parametrize("write", list(WRITERS.values()), ids=list(WRITERS))
def test_a_network_may_write_into_its_inputs(write):
    loader = _loader()
    first, second = Writer(write), Writer(write, 1)
    # What the networks compute, of data that are prepared beforehand.
    ready = [(write(x.clone()), y) for x, y in loader]
    plain = [network.layers for network in (first, second)]
    of = {
        "written": (first, second, loader),
        "ready": (*plain, ready),
    }
    found = {}
    for name, (a, b, data) in of.items():
        objective = Objective(a, data)
        vector = torch.ones(HessianOperator(objective).shape[1])
        entries = [{entry: torch.ones_like(tensor)} for entry, tensor in objective.state().items()]
        prediction = predict_barrier(a, b, data)
        found[name] = [
            *((operator(objective) @ vector).tolist() for operator in (HessianOperator, GGNOperator, GGNOperator)),
            *project_hessian(objective, {}, entries).curvature.tolist(),
            [*prediction.curve([0.25, 0.5]), *(end.loss for end in prediction.endpoints)],
            [*measure_barrier(a, b, data, alphas=3).ends()],
        ]
    for one, other in zip(*found.values(), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    for (x, _), (before, _) in zip(loader, _loader(), strict=True):
        assert torch.equal(x, before)


def test_a_state_is_a_copy():
    objective = Objective(Writer(lambda x: x), _loader())
    before, matrix = objective.loss(), HessianOperator(objective)
    vector = torch.ones(matrix.shape[1])
    product, state = matrix @ vector, objective.state()
    elsewhere = HessianOperator(objective, state)
    for name, gradient in objective.gradient().items():
        state[name] -= 0.5 * gradient
    assert objective.loss() == before != objective.loss(state)
    for operator in (matrix, elsewhere, HessianOperator(objective)):
        torch.testing.assert_close(operator @ vector, product, rtol=0, atol=0)
