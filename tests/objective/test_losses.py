"""Claim: a loss is a real, finite mean over examples, and what is none is refused by name."""

import functools
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmc_curvature import BatchLoss, HessianOperator, Objective, project_hessian
from lmc_curvature.errors import LoaderError, LossError, NonFiniteError
from lmc_curvature.objective.batches import Batch
from lmc_curvature.objective.losses import check_reduction, finite_loss
from tests.support.cases import CASES, DictNet
from tests.support.networks import NETWORKS, in_float32, joined, plain_loss, randomized, untouched

VECTORS = NETWORKS["LayerNorm and GELU"]
X, Y = torch.zeros(5, 2), torch.zeros(5, dtype=torch.int64)
Pair = namedtuple("Pair", ["x", "y"])


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_a_loss_module_with_weights_weighs_batches_by_examples(dtype):
    batches, model = in_float32(VECTORS.batches()), VECTORS.model().float()
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0]))
    expected = sum(len(x) * loss_fn(model(x), y) for x, y in batches).item() / 15
    with untouched(model, loss_fn):
        assert Objective(model, batches, loss_fn=loss_fn, dtype=dtype).loss() == pytest.approx(expected, rel=1e-6)


def test_a_loss_module_is_evaluated_without_its_dropout():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, output, target):
            return F.cross_entropy(self.dropout(output), target)

    model, loss_fn = VECTORS.model(), Wrapped()
    expected = plain_loss(model, joined(VECTORS.batches())).item()
    with untouched(model, loss_fn):
        assert Objective(model, VECTORS.batches(), loss_fn=loss_fn).loss() == pytest.approx(expected, rel=1e-12)


def test_batch_losses_weigh_by_their_size():
    def token_loss(model, batch):
        return F.cross_entropy(model.head(model.embedding(batch["ids"])).flatten(0, 1), batch["labels"].flatten())

    batches = CASES["dict batches"].batches((4, 3))
    batches[0]["labels"][:, 1:] = -100
    model = randomized(DictNet())
    loss_fn = BatchLoss(token_loss, size=lambda batch: (batch["labels"] != -100).sum())
    expected = token_loss(model, joined(batches)).item()
    assert Objective(model, batches, loss_fn=loss_fn).loss() == pytest.approx(expected, rel=1e-6)
    assert Objective(model, batches, loss_fn=BatchLoss(token_loss)).loss() != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("count", [0, -1])
def test_a_batch_without_examples_by_its_own_size_is_refused(count):
    loss_fn = BatchLoss(lambda model, batch: model(batch[0]).mean(), size=lambda batch: count)
    with pytest.raises(LoaderError, match=f"Batch 0 of the loader holds {count} examples; expected at least one"):
        Objective(VECTORS.model(), VECTORS.batches(), loss_fn=loss_fn).loss()


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda output, target: output.sum(1), r"loss has shape \(6,\); expected a scalar.*reduction='mean'"),
        (lambda output, target: output.mean().item(), "loss is an object of type float; expected a scalar tensor"),
        (lambda output, target: (output.mean(), 1), "loss is a tuple of length 2; expected a scalar tensor"),
        (lambda output, target: output.argmax(), "loss has type torch.int64; expected a real floating-point scalar"),
        (lambda output, target: output.mean() + 0j, "loss has type torch.complex128; expected a real floating-point"),
        (BatchLoss(lambda model, batch: {"loss": 1}), "loss is a mapping with keys 'loss'; expected a scalar"),
    ],
)
def test_bad_losses_are_described(untyped, loss_fn, message):
    with pytest.raises(LossError, match=message):
        Objective(VECTORS.model(), VECTORS.batches(), loss_fn=loss_fn).loss()


def test_a_loss_that_is_not_finite_is_placed():
    assert finite_loss(torch.tensor(0.5), Batch(3, 7, None)) == 0.5
    with pytest.raises(NonFiniteError, match=r"The loss is inf at batch 3 \(7 examples\), at alpha=0.5\. Check"):
        finite_loss(torch.tensor(torch.inf), Batch(3, 7, None), ", at alpha=0.5")


@pytest.mark.parametrize("use", ["gradient", "project", "product"])
def test_a_loss_cut_off_from_the_network_is_refused(use):
    objective = Objective(VECTORS.model(), VECTORS.batches(), loss_fn=lambda out, y: F.cross_entropy(out.detach(), y))
    direction = {name: torch.ones_like(tensor) for name, tensor in objective.state().items()}
    with pytest.raises(LossError, match=r"does not depend on any entry.*\.detach\(\)"):
        {
            "gradient": objective.gradient,
            "project": lambda: project_hessian(objective, {}, [direction]),
            "product": lambda: HessianOperator(objective) @ direction,
        }[use]()


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (nn.CrossEntropyLoss(reduction="sum"), r"CrossEntropyLoss\(reduction='sum'\).*use reduction='mean'"),
        (nn.MSELoss(reduction="none"), r"MSELoss\(reduction='none'\).*use reduction='mean'"),
        (functools.partial(F.cross_entropy, reduction="sum"), "reduction='sum'.*use reduction"),
        (nn.CrossEntropyLoss, r"pass an instance such as torch.nn.CrossEntropyLoss\(\)"),
        (3, "loss_fn=3 is not a function of output and target"),
    ],
)
def test_what_is_no_mean_is_refused(loss_fn, message):
    with pytest.raises(LossError, match=message):
        check_reduction(loss_fn)


@pytest.mark.parametrize("loss_fn", [None, F.mse_loss, nn.MSELoss(), BatchLoss(lambda model, batch: None)])
def test_means_are_no_faults(loss_fn):
    check_reduction(loss_fn)
