"""Claim: losses of any kind go through the sweep, and agree with Hessian-vector products."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmc_curvature import Objective
from tests.support.networks import randomized
from tests.support.sweeping import assert_sweep_agrees

# All of them together take seconds.


def _numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


_LABELS = torch.tensor([0, 3, 1, 2])
_PROBABILITIES = torch.softmax(_numbers(4, 4, seed=5), 1)
_TARGETS = _numbers(4, 4, seed=6)
_CLASS_WEIGHTS = torch.tensor([0.3, 1.0, 2.0, 0.7])
LOSSES = {
    "cross-entropy": (nn.CrossEntropyLoss(), _LABELS),
    "cross-entropy, weighted": (nn.CrossEntropyLoss(weight=_CLASS_WEIGHTS), _LABELS),
    "cross-entropy, smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), _LABELS),
    "cross-entropy, smoothed and weighted": (nn.CrossEntropyLoss(_CLASS_WEIGHTS, label_smoothing=0.1), _LABELS),
    "cross-entropy, soft": (nn.CrossEntropyLoss(), _PROBABILITIES),
    "cross-entropy, soft, weighted and smoothed": (
        nn.CrossEntropyLoss(_CLASS_WEIGHTS, label_smoothing=0.1),
        _PROBABILITIES,
    ),
    "cross-entropy, ignoring": (nn.CrossEntropyLoss(ignore_index=3), _LABELS),
    "cross-entropy, ignoring, weighted and smoothed": (
        nn.CrossEntropyLoss(_CLASS_WEIGHTS, ignore_index=3, label_smoothing=0.1),
        _LABELS,
    ),
    "negative log-likelihood": (lambda out, y: F.nll_loss(F.log_softmax(out, 1), y), _LABELS),
    "negative log-likelihood, weighted": (
        lambda out, y: F.nll_loss(F.log_softmax(out, 1), y, weight=_CLASS_WEIGHTS.double(), ignore_index=1),
        _LABELS,
    ),
    "squared error": (nn.MSELoss(), _TARGETS),
    "squared error of probabilities": (lambda out, y: F.mse_loss(out.softmax(1), y), _PROBABILITIES),
    "binary cross-entropy of logits": (nn.BCEWithLogitsLoss(), _PROBABILITIES),
    "binary cross-entropy of logits, weighted": (
        nn.BCEWithLogitsLoss(weight=_CLASS_WEIGHTS, pos_weight=1 + _CLASS_WEIGHTS),
        _PROBABILITIES.round(),
    ),
    "binary cross-entropy": (lambda out, y: F.binary_cross_entropy(torch.sigmoid(out), y), _PROBABILITIES),
    "Huber": (nn.HuberLoss(delta=0.7), _TARGETS),
    "smooth L1": (nn.SmoothL1Loss(beta=0.7), _TARGETS),
    "L1": (nn.L1Loss(), _TARGETS),
    "Kullback-Leibler": (
        lambda out, y: F.kl_div(F.log_softmax(out, 1), y, reduction="batchmean"),
        _PROBABILITIES,
    ),
    "Kullback-Leibler of logarithms": (
        lambda out, y: F.kl_div(F.log_softmax(out, 1), y.log(), reduction="batchmean", log_target=True),
        _PROBABILITIES,
    ),
    "Poisson": (nn.PoissonNLLLoss(), _PROBABILITIES),
    "soft margins": (nn.MultiLabelSoftMarginLoss(), _PROBABILITIES),
    "focal": (
        lambda out, y: (
            (1 - out.softmax(1).gather(1, y[:, None])) ** 2 * F.cross_entropy(out, y, reduction="none")[:, None]
        ).mean(),
        _LABELS,
    ),
}


def _mlp():
    return randomized(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double())


@pytest.mark.check(after=1)
@pytest.mark.parametrize(("loss_fn", "target"), LOSSES.values(), ids=LOSSES)
def test_losses(loss_fn, target):
    batches = [(_numbers(4, 5), target), (_numbers(3, 5, seed=1), target[:3])]
    assert_sweep_agrees(Objective(_mlp(), batches, loss_fn=loss_fn))


@pytest.mark.check(after=2)
@pytest.mark.parametrize(
    "loss_fn",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(_CLASS_WEIGHTS, ignore_index=1),
        nn.CrossEntropyLoss(label_smoothing=0.1),
    ],
    ids=["plain", "weighted, ignoring", "smoothed"],
)
@pytest.mark.parametrize("axes", [1, 2])
def test_cross_entropy_at_every_position(loss_fn, axes):
    convolution = (nn.Conv1d, nn.Conv2d)[axes - 1]
    model = nn.Sequential(convolution(2, 3, 3, padding=1), nn.GELU(), convolution(3, 4, 1))
    shape = (3, 2, *(5, 4)[:axes])
    target = torch.randint(4, (3, *shape[2:]), generator=torch.Generator().manual_seed(0))
    assert_sweep_agrees(Objective(randomized(model.double()), [(_numbers(*shape), target)], loss_fn=loss_fn))
