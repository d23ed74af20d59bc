"""Claim: a segment lies between two networks if no entry, tie or fixed buffer tells them apart."""

import pytest
import torch
from torch import nn

from lmc_curvature import Segment
from lmc_curvature.errors import ArchitectureMismatchError
from tests.support.cases import TiedNet


def _mlp(*modules):
    return nn.Sequential(nn.Linear(2, 2), *modules)


def _with_buffer(value):
    model = _mlp()
    model.register_buffer("scale", torch.tensor(value))
    return model


class _Triple(nn.Module):
    """Three layers, the last tied to one of the others."""

    def __init__(self, like):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(2, 2, bias=False) for _ in range(3))
        self.c.weight = getattr(self, like).weight


def _untied():
    model = TiedNet()
    model.decoder.weight = nn.Parameter(model.decoder.weight.detach().clone())
    return model


@pytest.mark.parametrize(
    ("a", "b", "lines"),
    [
        (
            _mlp(nn.Linear(2, 3)),
            _mlp(nn.Linear(2, 4)),
            [r"1.weight: shape \(3, 2\) in model_a, \(4, 2\) in model_b", r"1.bias: shape \(3,\) in model_a, \(4,\)"],
        ),
        (
            _mlp(nn.Linear(2, 2)),
            _mlp(),
            [
                "model_a has 2 modules with parameters, model_b has 1 module\\)",
                r"1.weight: only in model_a, with shape \(2, 2\)",
                r"1.bias: only in model_a, with shape \(2,\)",
            ],
        ),
        (_mlp(), _mlp(nn.Linear(2, 2)), ["model_b has 2", r"1.weight: only in model_b, with shape \(2, 2\)"]),
        (_mlp(), _mlp().double(), ["0.weight: type torch.float32 in model_a, torch.float64 in model_b"]),
        (
            _mlp(nn.ReLU(), nn.Linear(2, 3)),
            _mlp(nn.GELU(), nn.Linear(2, 4)),
            [r"2.weight: shape \(3, 2\)", "module 1: ReLU in model_a, GELU in model_b"],
        ),
        (
            _mlp(nn.LeakyReLU(0.1), nn.Dropout(0.1)),
            _mlp(nn.LeakyReLU(0.2), nn.Dropout(0.2)).double(),
            [
                "0.weight: type torch.float32 in model_a, torch.float64",
                "1.negative_slope: 0.1 in model_a, 0.2 in model_b",
            ],
        ),
        (_with_buffer(1.0), _with_buffer(2.0), ["buffer scale: its values differ.*equal in both, or a parameter"]),
        (TiedNet(), _untied(), [r"decoder.weight: only in model_b, with shape \(6, 6\)"]),
        (_Triple("a"), _Triple("b"), ["c.weight: tied to a.weight in model_a, to b.weight in model_b"]),
        (
            _mlp(*[nn.Linear(2, 2) for _ in range(10)]),
            _mlp(),
            [r"(?s)(  \d+\.(weight|bias): .*?\n){10}  … and 20 more"],
        ),
    ],
)
def test_different_architectures_are_compared_entry_by_entry(a, b, lines):
    with pytest.raises(
        ArchitectureMismatchError, match="(?s)not of one architecture.*Both must be built alike"
    ) as caught:
        Segment(a, b)
    for line in lines:
        assert caught.match(line)


def test_equal_fixed_buffers_are_no_difference():
    assert Segment(_with_buffer(1.0), _with_buffer(1.0)).start.keys() == {"0.weight", "0.bias"}


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3, stride=2)),
        (nn.BatchNorm1d(3, momentum=0.1), nn.BatchNorm1d(3, eps=1.0, momentum=0.3)),
        (nn.LSTM(3, 2, 2, dropout=0.1), nn.LSTM(3, 2, 2, dropout=0.3)),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.ModuleList([nn.Linear(2, 2), nn.Dropout()])),
    ],
)
def test_modules_are_compared_by_losses_alone(a, b):
    assert Segment(a, b).layers == Segment(a, a).layers


def test_counters_of_batches_may_differ():
    a, b = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    b(torch.ones(2, 3))
    segment = Segment(nn.Sequential(a), nn.Sequential(b))
    assert "0.num_batches_tracked" not in segment.start
    assert Segment(a, b).start.keys() == {"weight", "bias", "running_mean", "running_var"}
