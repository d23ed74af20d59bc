"""Claim: where a length is exactly zero at the state, derivatives that are lost with it are found, and no others."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmc_curvature import BatchLoss, HessianOperator, Objective, predict_barrier
from lmc_curvature.errors import UnsupportedModelError
from lmc_curvature.objective.zeros import meets_zeros

X, Y = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)).double(), torch.arange(12) % 3


def _network(activation=nn.Tanh):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 3)).double()
    for layer in (network[0], network[2]):
        nn.init.zeros_(layer.bias)
    return network


def _penalized(penalty):
    return BatchLoss(
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]) + sum(map(penalty, model.parameters()))
    )


LOST = {
    "scaled length": lambda p: (p.norm() / 3) ** 2,
    "spread": lambda p: p.std() ** 2,
    "signs": lambda p: (p.sign() * p * p * p.sign()).sum(),
    "pooled": lambda p: F.lp_pool1d(p.flatten()[None, None, :3], 2, 3).pow(2).sum(),
}


@pytest.mark.parametrize("penalty", LOST.values(), ids=LOST)
def test_curvature_that_is_lost_with_a_length_of_nothing_is_found(penalty):
    objective = Objective(_network(), [(X, Y)], loss_fn=_penalized(penalty))
    with pytest.raises(UnsupportedModelError):
        HessianOperator(objective).to_dense()
    assert objective.loss() > 0


def test_it_is_said_what_to_write():
    objective = Objective(_network(), [(X, Y)], loss_fn=_penalized(LOST["scaled length"]))
    with pytest.raises(UnsupportedModelError, match=r"^A norm, .* is exactly zero.*p.pow\(2\).sum\(\).*by differences"):
        HessianOperator(objective).to_dense()


def test_a_length_that_is_zero_at_the_other_end_is_found():
    a, b = _network(), _network()
    with torch.no_grad():
        for parameter in a.parameters():
            parameter.add_(torch.randn(parameter.shape).double())
    with pytest.raises(UnsupportedModelError, match="exactly zero"):
        predict_barrier(a, b, [(X, Y)], loss_fn=_penalized(LOST["scaled length"]), progress=False)


KEPT = {
    "absolute values": lambda p: 0.1 * p.abs().sum(),
    "lengths": lambda p: 0.1 * p.norm(),
    "squares of lengths": lambda p: p.norm() ** 2,
    "cubes": lambda p: p.norm() ** 3,
    "roots": lambda p: (p.square() + 1e-3).sqrt().sum(),
    "directions": lambda p: F.normalize(p.flatten(), dim=0, eps=0.1).sum(),
}


@pytest.mark.check(after=3)
@pytest.mark.parametrize("penalty", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_what_is_right_raises_no_alarm(penalty, activation):
    objective = Objective(_network(activation), [(X, Y)], loss_fn=_penalized(penalty))
    assert HessianOperator(objective).to_dense().isfinite().all()
    assert not objective.notes


class _Normalized(nn.Module):
    """Tokens of length one, of which some are padding: their length is zero, whatever the entries are."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5, bias=False), nn.Linear(5, 3)

    def forward(self, x):
        padded = torch.cat([x, torch.zeros_like(x[:2])])
        return self.last(F.normalize(self.first(padded)))[: len(x)]


def test_padded_tokens_raise_no_alarm():
    torch.manual_seed(0)
    objective = Objective(_Normalized().double(), [(X, Y)])
    assert meets_zeros(objective.network_loss, objective._entries, (X, Y))
    assert HessianOperator(objective).to_dense().isfinite().all()


def test_powers_with_whole_exponents_are_smooth():
    network = _network()
    for penalty, met in ((lambda p: (p**2).sum(), False), (lambda p: (p * 0 + p.abs()).pow(1.5).sum(), True)):
        objective = Objective(network, [(X, Y)], loss_fn=_penalized(penalty))
        assert meets_zeros(objective.network_loss, objective._entries, (X, Y)) == met
