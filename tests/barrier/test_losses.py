"""Claim: a loss is known by its name, which is that of the default for plain cross-entropy alone."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmc_curvature import BatchLoss
from lmc_curvature.barrier.losses import loss_name


def focal(output, target):
    return F.cross_entropy(output, target) ** 2


class Margin(nn.Module):
    def forward(self, output, target):
        return F.multi_margin_loss(output, target)


WEIGHTS = torch.ones(3)


@pytest.mark.parametrize(
    ("loss_fn", "name"),
    [
        (F.cross_entropy, "cross_entropy"),
        (nn.CrossEntropyLoss(), "cross_entropy"),
        (functools.partial(F.cross_entropy, ignore_index=-100), "cross_entropy"),
        (nn.CrossEntropyLoss(label_smoothing=0.1), "CrossEntropyLoss"),
        (nn.CrossEntropyLoss(WEIGHTS), "CrossEntropyLoss"),
        (nn.CrossEntropyLoss(ignore_index=0), "CrossEntropyLoss"),
        (functools.partial(F.cross_entropy, weight=WEIGHTS), "cross_entropy with options"),
        (F.mse_loss, "mse_loss"),
        (nn.MSELoss(), "MSELoss"),
        (focal, "focal"),
        (Margin(), "Margin"),
        (BatchLoss(focal), "BatchLoss(focal)"),
        (BatchLoss(F.cross_entropy), "BatchLoss(cross_entropy)"),
    ],
)
def test_names(loss_fn, name):
    assert loss_name(loss_fn) == name
