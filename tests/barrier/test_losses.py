"""Claim: a loss is known by its name, which is that of the default for plain cross-entropy alone."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmc_curvature import BatchLoss, measure_barrier, predict_barrier
from lmc_curvature.barrier.losses import data_in_words, loss_name


def focal(output, target):
    return F.cross_entropy(output, target) ** 2


def cross_entropy(output, target):
    return F.cross_entropy(output / 3, target)


def tokens(batch):
    return int((batch["y"] >= 0).sum())


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
        (cross_entropy, "another cross_entropy"),
        (Margin(), "Margin"),
        (BatchLoss(focal), "BatchLoss(focal)"),
        (BatchLoss(F.cross_entropy), "BatchLoss(cross_entropy)"),
        (BatchLoss(focal, size=tokens), "BatchLoss(focal, size=tokens)"),
    ],
)
def test_names(loss_fn, name):
    assert loss_name(loss_fn) == name


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (None, "6 examples"),
        ("BatchLoss(fn)", "6 examples"),
        ("BatchLoss(fn, size=count_tokens)", "6 tokens"),
        ("BatchLoss(tokens, size=<lambda>)", "6 units (as the size of its loss counts)"),
    ],
)
def test_data_are_counted_in_words(loss, words):
    assert data_in_words(6, np.array([2, 4]), loss) == words
    assert data_in_words(6, np.array([2, 40.5]), loss) == f"{words} that weigh 42.5"


def _of_tokens(model, batch):
    return F.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten())


def test_tokens_are_called_tokens():
    torch.manual_seed(0)
    models = [nn.Linear(3, 4) for _ in range(2)]
    batches = [{"x": torch.randn(2, 5, 3), "y": torch.randint(4, (2, 5))} for _ in range(2)]
    options = {"loss_fn": BatchLoss(_of_tokens, size=tokens), "progress": False}
    predicted = predict_barrier(*models, batches, **options)
    measured = measure_barrier(*models, batches, metrics=("loss",), **options)
    for result in (predicted, measured):
        assert " 20 tokens, " in str(result)
        assert " 20 tokens" in repr(result).splitlines()[0]
    # The same data, counted in rows: what they weigh is said.
    options["loss_fn"] = BatchLoss(_of_tokens)
    assert "from 4 examples that weigh 20, " in str(predict_barrier(*models, batches, **options))
