"""Claim: the precision that a network rounds to on its way is found, with the module that does so."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmc_curvature import HessianOperator, Objective
from lmc_curvature.objective.precisions import precisions_met


class Rounding(nn.Linear):
    def __init__(self, inputs, outputs, dtype):
        super().__init__(inputs, outputs)
        self.lower = dtype

    def forward(self, x):
        return F.linear(x.to(self.lower), self.weight.to(self.lower), self.bias.to(self.lower)).to(x)


def _network(*dtypes):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 4), nn.ModuleDict({"in": Rounding(4, 4, dtypes[0])})["in"], nn.Tanh(), Rounding(4, 3, dtypes[-1])
    )


def test_every_type_is_met_where_it_is_first():
    network, x = _network(torch.float16, torch.bfloat16), torch.randn(5, 4)
    result, met = precisions_met(network, lambda: network(x))
    torch.testing.assert_close(result, network(x), rtol=0, atol=0)
    assert met == {torch.float32: "0", torch.float16: "1", torch.bfloat16: "3"}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    shifted = nn.Sequential(nn.Identity())
    assert precisions_met(shifted, lambda: shifted(x).double().sum())[1] == {torch.float64: ""}


def test_hooks_are_removed_after_an_error():
    network = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(RuntimeError):
        precisions_met(network, lambda: network(torch.ones(2, 4)))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_module_in_lower_precision_is_named_where_derivatives_could_not_be_compared(dtype):
    objective = Objective(_network(dtype), [(torch.randn(12, 4), torch.arange(12) % 3)])
    name = str(dtype).removeprefix("torch.")
    with pytest.warns(
        UserWarning, match=rf"compared with differences of the loss \(module '1' computes in {name}\): see"
    ):
        HessianOperator(objective).to_dense()
    (note,) = objective.notes
    assert note.endswith(f"(module '1' computes in {name})")


def test_a_loss_in_lower_precision_is_named():
    objective = Objective(
        nn.Linear(4, 3),
        [(torch.randn(12, 4), torch.arange(12) % 3)],
        loss_fn=lambda output, target: F.cross_entropy(output.bfloat16(), target).float(),
    )
    with pytest.warns(UserWarning, match=r"\(the loss computes in bfloat16\)"):
        HessianOperator(objective).to_dense()
