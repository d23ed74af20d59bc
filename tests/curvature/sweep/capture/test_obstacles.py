"""Claim: what cannot be captured is refused, with the operation and the line that it comes from."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lmc_curvature import project_hessian
from lmc_curvature.errors import CaptureError, FallbackWarning
from tests.support.sweeping import around, layer_directions


def _branching(x):
    if x.sum() > 0:
        return x
    return 2 * x


def _reading(x):
    scale = x.abs().max().item()
    return x / scale


def _strided(x):
    return x.as_strided((3, 2), (6, 2))


def _selecting(x):
    return x[x > 0].mean() * x


def _counting(x):
    return x * torch.nonzero(x).shape[0]


def _packing(x):
    lengths = 1 + (x[:, 0, 0] > 0).long()
    return pad_packed_sequence(pack_padded_sequence(x, lengths, True, False), True, total_length=2)[0]


def _sloping(x):
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        return x + torch.autograd.grad(leaf.sin().sum(), leaf)[0]


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return g


class _StraightToo(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.sign()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g


def _straight(x):
    return _Straight.apply(x)


def _straight_too(x):
    return _StraightToo.apply(x)


_REFUSED = {
    "branch": (_branching, r"a number is read off a tensor.*test_obstacles.py:\d+, in _branching: if x.sum\(\) > 0:"),
    "item": (_reading, r"a number is read off a tensor.*in _reading: scale = x.abs\(\).max\(\).item\(\)"),
    "strides": (
        _strided,
        r"as_strided.*layout of its argument in memory \(at test_obstacles.py:\d+, in _strided: return x",
    ),
    "mask": (_selecting, r"index.*has a result whose shape depends on values \(at test_obstacles.py.*in _selecting: "),
    "nonzero": (
        _counting,
        r"nonzero.*has a result whose shape depends on values \(at test_obstacles.py.*in _counting: ",
    ),
    "lengths": (
        lambda x: _packing(x.unflatten(1, (2, 3))),
        r"a number is read off a tensor.*in _packing: return pad_packed_sequence",
    ),
    "gradient": (_sloping, r"autograd is called inside of it; .*torch.func.grad.*in _sloping: leaf = x.detach"),
    "function": (_straight, r"an autograd.Function has derivatives of its own.*in _straight: return _Straight.apply"),
    "new function": (_straight_too, r"an autograd.Function has derivatives of its own.*in _straight_too: "),
}


@pytest.mark.check(after=1)
@pytest.mark.parametrize(("function", "message"), _REFUSED.values(), ids=_REFUSED)
def test_what_cannot_be_captured_is_named_with_its_line(function, message):
    objective = around(function, (6,), witness=False)
    directions = layer_directions(objective)
    with pytest.raises(CaptureError, match=message):
        project_hessian(objective, {}, directions, method="sweep")
    with pytest.warns(FallbackWarning, match=f"{message}.*Falling back on one Hessian-vector product a direction"):
        found = project_hessian(objective, {}, directions)
    expected = project_hessian(objective, {}, directions, method="hvp")
    torch.testing.assert_close(found.curvature, expected.curvature, rtol=0, atol=0)


def test_an_operation_without_a_second_derivative_is_named_with_its_line():
    def margins(output, target):
        return F.multi_margin_loss(output, target)

    objective = around(torch.tanh, (6,), loss_fn=margins)
    with pytest.raises(
        CaptureError, match=r"multi_margin_loss.*cannot be swept \(at test_obstacles.py.*in margins: return"
    ):
        project_hessian(objective, {}, layer_directions(objective), method="sweep")
