"""Claim: a margin that a loss gives the right class is no part of what a network says; other readings stay."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmc_curvature import measure_barrier
from lmc_curvature.errors import OptionError

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(30, 5, generator=GENERATOR).double(), torch.randint(4, (30,), generator=GENERATOR)


def _pair(make):
    torch.manual_seed(0)
    return [make().double() for _ in range(2)]


def _ends(pair, batches, loss_fn):
    return measure_barrier(*pair, batches, loss_fn=loss_fn, metrics=("error",), alphas=3, progress=False).ends("error")


def _errors(pair):
    return [(network(X).argmax(1) != Y).double().mean().item() for network in pair]


class Angular(nn.Module):
    """An additive angular margin, on cosines that the network gives."""

    def forward(self, output, target):
        cosines = F.normalize(output).clamp(-0.99, 0.99)
        angles = cosines.acos() + 1.2 * F.one_hot(target, 4)
        return F.cross_entropy(8 * angles.cos(), target)


MARGINS = {
    "angular": Angular(),
    "subtracted": lambda o, y: F.nll_loss(torch.log_softmax(o.scatter_add(1, y[:, None], o * 0 - 1.5), 1), y),
    "by class": lambda o, y: F.cross_entropy(o - torch.tensor([1.0, 2.0, 0.5, 1.5])[y, None] * F.one_hot(y, 4), y),
    "soft labels": lambda o, y: F.cross_entropy(o - 2 * F.one_hot(y, 4), F.one_hot(y, 4).double()),
}


@pytest.mark.parametrize("sizes", [(30,), (7, 22, 1)])
@pytest.mark.parametrize("loss_fn", MARGINS.values(), ids=MARGINS)
def test_a_margin_is_left_out(loss_fn, sizes):
    pair = _pair(lambda: nn.Linear(5, 4))
    batches = list(zip(X.split(sizes), Y.split(sizes), strict=True))
    expected = _errors(pair)
    assert _ends(pair, batches, loss_fn) == pytest.approx(expected, rel=1e-12)
    # It would make a difference.
    assert F.cross_entropy(pair[0](X), Y) > 0 and max(expected) < 1


@pytest.mark.parametrize("label", range(4))
def test_a_batch_of_one_class_tells_a_margin(label):
    pair, rows = _pair(lambda: nn.Linear(5, 4)), label == Y
    found = _ends(pair, [(X[rows], Y[rows])], MARGINS["by class"])
    assert found == pytest.approx([(network(X[rows]).argmax(1) != label).double().mean().item() for network in pair])


def test_a_margin_of_next_tokens_is_left_out():
    def loss_fn(output, target):
        logits, labels = output[:, :-1].flatten(0, 1), target[:, 1:].flatten()
        return F.cross_entropy(logits - 5 * F.one_hot(labels, 4), labels)

    pair = _pair(lambda: nn.Linear(5, 4))
    with pytest.raises(OptionError, match="depends on them, as a margin does"):
        _ends(pair, [(X.view(6, 5, 5), Y.view(6, 5))], loss_fn)


def test_a_margin_of_another_form_of_outputs_is_refused():
    class Named(nn.Linear):
        def forward(self, input):
            return {"logits": super().forward(input)}

    with pytest.raises(OptionError, match=r"depends on them, as a margin does.*metrics=\('loss',\)"):
        _ends(_pair(lambda: Named(5, 4)), [(X, Y)], lambda o, y: MARGINS["by class"](o["logits"], y))


READINGS = {
    "temperature": (lambda o, y: F.cross_entropy(o / 3, y), lambda o, y: (o, y)),
    "prior": (
        lambda o, y: F.cross_entropy(o + torch.tensor([0.0, 2.0, 0.0, 1.0]), y),
        lambda o, y: (o + torch.tensor([0.0, 2.0, 0.0, 1.0]), y),
    ),
    "some rows": (lambda o, y: F.cross_entropy(o[y > 0], y[y > 0]), lambda o, y: (o[y > 0], y[y > 0])),
    "opposite": (lambda o, y: F.cross_entropy(-o, y), lambda o, y: (-o, y)),
}


@pytest.mark.filterwarnings("ignore:The loss of batch")
@pytest.mark.parametrize(("loss_fn", "read"), READINGS.values(), ids=READINGS)
def test_outputs_are_read_as_a_loss_without_margins_does(loss_fn, read):
    pair = _pair(lambda: nn.Linear(5, 4))
    expected = []
    for network in pair:
        output, target = read(network(X), Y)
        expected.append((output.argmax(1) != target).double().mean().item())
    assert _ends(pair, [(X, Y)], loss_fn) == pytest.approx(expected, rel=1e-12)
