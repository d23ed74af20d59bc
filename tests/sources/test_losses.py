"""Claim: a loss is found by its name, and what is no loss is explained."""

import pytest
import torch
from torch.nn import functional as F

from lmc_curvature import BatchLoss, Objective
from lmc_curvature.errors import ConfigurationError
from lmc_curvature.sources import find_loss
from tests.support.texts import make_gpt2, texts

OUTPUT = torch.tensor([[0.5, -1.0], [2.0, 0.1]])
own = BatchLoss(lambda model, batch: model(batch).mean())


@pytest.mark.parametrize(
    ("name", "target", "expected"),
    [
        ("cross-entropy", torch.tensor([0, 1]), -OUTPUT.log_softmax(1)[[0, 1], [0, 1]].mean()),
        ("mse", torch.ones(2, 2), ((OUTPUT - 1) ** 2).mean()),
        ("bce", torch.ones(2, 2), torch.log1p(torch.exp(-OUTPUT)).mean()),
        ("torch.nn.functional:l1_loss", torch.ones(2, 2), (OUTPUT - 1).abs().mean()),
        ("torch.nn:SoftMarginLoss", torch.ones(2, 2), torch.log1p(torch.exp(-OUTPUT)).mean()),
    ],
)
def test_losses_by_name(name, target, expected):
    assert find_loss(name)(OUTPUT, target).item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_loss_of_a_whole_batch_may_be_named():
    assert find_loss(f"{__name__}:own") is own
    assert find_loss("torch.nn.functional:cross_entropy") is F.cross_entropy


def test_the_loss_of_a_language_model_is_a_mean_over_tokens():
    pytest.importorskip("transformers")
    model, batches = make_gpt2().eval(), texts(batches=2, size=4)
    with torch.no_grad():
        logits = torch.cat([model(batch["input_ids"]).logits for batch in batches])[:, :-1]
    labels = torch.cat([batch["labels"] for batch in batches])[:, 1:]
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    single = [{name: tensor[row : row + 1] for name, tensor in batch.items()} for batch in batches for row in range(4)]
    for cut in (batches, single):
        found = Objective(model, cut, loss_fn=find_loss("next-token")).loss()
        assert found == pytest.approx(expected.item(), rel=1e-6)
    # A network that returns its loss itself, which counts examples.
    own = find_loss("own").fn(model, batches[0])
    assert own == model(**batches[0]).loss


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cross-entrpy", "loss 'cross-entrpy' is unknown: did you mean 'cross-entropy'"),
        ("hinge", "choose from 'cross-entropy', 'mse', 'bce', 'own', 'next-token'.*package.module:name"),
        ("no.such:loss", "loss 'no.such:loss': the module 'no.such' cannot be imported"),
        ("torch.nn.functional:msee_loss", "has no function 'msee_loss': did you mean 'mse_loss'"),
        ("torch.nn.functional:GRID_SAMPLE_PADDING_MODES", "has no function 'GRID_SAMPLE_PADDING_MODES'"),
        ("torch.nn:AdaptiveLogSoftmaxWithLoss", "cannot be made without arguments"),
    ],
)
def test_what_is_no_loss_is_explained(name, message):
    with pytest.raises(ConfigurationError, match=message):
        find_loss(name)
