"""Claim: a recorded function has no side effects, and is made of operations that the rules know."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from lmc_curvature.curvature.sweep.capture import capture
from lmc_curvature.errors import CaptureError
from tests.support.capturing import captured_right, counts, numbers, run

aten = torch.ops.aten


def _captured(model, *data):
    """Both stages of a network in evaluation mode, and its state."""
    names, state = zip(*{**dict(model.named_parameters()), **dict(model.named_buffers())}.items(), strict=True)

    def function(*tensors):
        entries = dict(zip(names, tensors, strict=False))
        return functional_call(model, entries, tensors[len(names) :])

    state = [tensor.detach() for tensor in state]
    return capture(function, state, data), state


def _in_place(w, x):
    z = x @ w
    z += 1
    z[:, 0] *= 2
    z[:, 1:].clamp_(min=0.1)
    view = z.view(-1)
    view[::2] = 0.5
    return F.relu_(z)


def _by_mask_in_place(w, x):
    mask = torch.zeros(3, 3, dtype=torch.float64).masked_fill_(torch.ones(3, 3).triu(1).bool(), -1.0)
    return F.pad((x @ w + mask.sum(0)).unsqueeze(1), (1, 1), mode="circular")


@pytest.mark.parametrize("function", [_in_place, _by_mask_in_place])
def test_changes_in_place_become_functions(function):
    stages = captured_right(function, [numbers(5, 3)], [numbers(4, 5)])
    for stage in stages:
        assert not any(node.target._schema.is_mutable for node in stage.operations if hasattr(node.target, "_schema"))


@pytest.mark.check
@pytest.mark.parametrize("module", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_come_apart(module):
    layer = module(3, 4, num_layers=2, bidirectional=True, batch_first=True).double()
    x = numbers(2, 5, 3)

    class Outputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x)[0]

    stages, state = _captured(Outputs(), x)
    with torch.no_grad():
        torch.testing.assert_close(run(stages, state, [x]), layer(x)[0])
    assert not any("rnn" in str(node.target) or "lstm" in str(node.target) for node in stages[1].operations)
    assert torch.backends.mkldnn.enabled


def test_constants_are_kept():
    mask = torch.tensor([[True, False, True]])
    captured_right(lambda w, x: (x @ w).masked_fill(mask, 0.3) + torch.arange(3), [numbers(5, 3)], [numbers(4, 5)])


def test_what_torch_takes_for_a_constant_is_detached():
    def function(w, x):
        z = x @ w
        with torch.no_grad():
            top = (2 * z).amax(-1, keepdim=True)
        return z - top

    _, second = captured_right(function, [numbers(5, 3)], [numbers(4, 5)])
    detached = [node for node in second.operations if node.target is aten.detach.default]
    assert detached
    (difference,) = (node for node in second.operations if node.target is aten.sub.Tensor)
    assert difference.args[1] in detached


def test_assertions_about_values_have_no_part():
    class Tripled(nn.Module):
        def forward(self, x):
            x.shape[0]
            unused = x.sin()
            unused.add_(1)
            return 3 * x

    (_, second), _ = _captured(nn.Sequential(nn.Linear(2, 2).double(), Tripled()), numbers(3, 2))
    assert counts(second)["aten.sin.default"] == 0


def test_numbers_of_constants_may_be_read():
    mask = torch.ones(4, 4).triu(1).bool()

    def function(w, x):
        causal = torch.ones_like(mask).triu(1)
        # Asked in each of the ways in which torch reads a number.
        is_causal = bool((mask == causal).all()) and torch.equal(mask, causal) and int(causal.sum()) == 6
        return (x @ w).masked_fill(causal, 0.0) if is_causal else x

    captured_right(function, [numbers(5, 4)], [numbers(4, 5)])


@pytest.mark.parametrize("read", [lambda w, x: x, lambda w, x: w, lambda w, x: torch.zeros(()) + 0 * x.detach().sum()])
def test_numbers_of_inputs_may_not(read):
    with pytest.raises(CaptureError, match="a number is read off a tensor"):
        captured_right(lambda w, x: x @ w * int(read(w, x).abs().sum() > -1), [numbers(5, 3)], [numbers(4, 5)])
