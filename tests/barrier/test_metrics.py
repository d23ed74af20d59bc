"""Claim: the error is the share of what counts and is decided wrongly, and what cannot be read so is refused."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmc_curvature import measure_barrier
from lmc_curvature.errors import LossError, NonFiniteError, OptionError

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(20, 3, generator=GENERATOR)
IMAGES = torch.randn(5, 3, 4, 6, generator=GENERATOR)
BITS = (torch.arange(20) % 3 == 0).float()
CLASSES = torch.arange(20) % 4


class _LastAxis(nn.Module):
    """Classes along the last axis, as language models have them."""

    def __init__(self, classes):
        super().__init__()
        self.linear = nn.Linear(3, classes)

    def forward(self, x):
        return self.linear(x)


def _ends(make, batches, loss_fn, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nets = make(), make()
    found = measure_barrier(*nets, batches, loss_fn=loss_fn, alphas=3, progress=False, **options)
    return nets, found.ends("error")


def _tokens_loss(output, target):
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def _focal(output, target):
    loss = F.cross_entropy(output, target, reduction="none")
    return ((1 - (-loss).exp()) ** 2 * loss).mean()


def _column():
    return nn.Linear(3, 1)


def _numbers():
    return nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))


def _probabilities():
    return nn.Sequential(nn.Linear(3, 1), nn.Sigmoid())


READ = {
    "logits, column": (_column, X, BITS[:, None], F.binary_cross_entropy_with_logits, lambda o: o > 0),
    "logits, module": (_column, X, BITS[:, None], nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0)), lambda o: o > 0),
    "logits, partial": (
        _numbers,
        X,
        BITS,
        functools.partial(F.binary_cross_entropy_with_logits, pos_weight=torch.tensor(3.0)),
        lambda o: o > 0,
    ),
    "logits, all ones": (_column, X, torch.ones(20, 1), F.binary_cross_entropy_with_logits, lambda o: o > 0),
    "probabilities": (_probabilities, X, BITS[:, None], nn.BCELoss(), lambda o: o > 0.5),
    "probabilities, function": (_probabilities, X, BITS[:, None], F.binary_cross_entropy, lambda o: o > 0.5),
    "binary pixels": (
        lambda: nn.Conv2d(3, 1, 1),
        IMAGES,
        (IMAGES[:, :1] > 0).float(),
        nn.BCEWithLogitsLoss(),
        lambda o: o > 0,
    ),
    "classes": (lambda: nn.Linear(3, 4), X, CLASSES, None, lambda o: o.argmax(1)),
    "pixels": (lambda: nn.Conv2d(3, 4, 1), IMAGES, IMAGES.argmax(1), None, lambda o: o.argmax(1)),
    "pixels, any loss": (
        lambda: nn.Conv2d(3, 4, 1),
        IMAGES,
        IMAGES.argmax(1),
        lambda output, target: F.cross_entropy(output, target),
        lambda o: o.argmax(1),
    ),
    "tokens": (lambda: _LastAxis(4), X.view(4, 5, 3), CLASSES.view(4, 5), _tokens_loss, lambda o: o.argmax(-1)),
    "as many tokens as classes, within a function": (
        lambda: _LastAxis(4),
        X.view(5, 4, 3),
        CLASSES.view(5, 4),
        _tokens_loss,
        lambda o: o.argmax(-1),
    ),
    "margins": (lambda: nn.Linear(3, 4), X, CLASSES, nn.MultiMarginLoss(), lambda o: o.argmax(1)),
    "focal": (lambda: nn.Linear(3, 4), X, CLASSES, _focal, lambda o: o.argmax(1)),
    "a penalty": (
        lambda: nn.Linear(3, 4),
        X,
        CLASSES,
        lambda o, t: F.cross_entropy(o, t) + 0.1 * o.square().mean(),
        lambda o: o.argmax(1),
    ),
    "masked logits": (
        lambda: nn.Linear(3, 5),
        X,
        CLASSES,
        lambda o, t: F.cross_entropy(o - 1e9 * (torch.arange(5) == 4), t),
        lambda o: o[:, :4].argmax(1),
    ),
    "as many tokens as classes": (
        lambda: _LastAxis(4),
        X.view(5, 4, 3),
        CLASSES.view(5, 4),
        nn.CrossEntropyLoss(),
        lambda o: o.argmax(1),
    ),
}


@pytest.mark.check(after=4)
@pytest.mark.parametrize(("make", "x", "target", "loss_fn", "decide"), READ.values(), ids=READ)
def test_the_error_is_the_share_of_wrong_decisions(make, x, target, loss_fn, decide):
    for batches in ([(x, target)], [(x[:1], target[:1]), (x[1:], target[1:])]):
        nets, found = _ends(make, batches, loss_fn)
        expected = [(decide(net(x)) != target).double().mean().item() for net in nets]
        assert 0 < sum(expected) < 2
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def _no_sense(output, target):
    return output.square().mean() + 0 * target.sum()


REFUSED = {
    "regression": (_column, X, torch.randn(20, 1, generator=GENERATOR), F.mse_loss),
    "regression of 0 and 1": (_column, X, BITS[:, None], F.mse_loss),
    "regression, more columns": (lambda: nn.Linear(3, 2), X, X[:, :2], F.mse_loss),
    "soft bits": (_column, X, 0.8 * BITS[:, None] + 0.1, F.binary_cross_entropy_with_logits),
    "several labels": (lambda: nn.Linear(3, 2), X, (X[:, :2] > 0).float(), F.binary_cross_entropy_with_logits),
    "targets beyond": (lambda: nn.Linear(3, 3), X, CLASSES, _no_sense),
    "squares of probabilities": (lambda: nn.Linear(3, 2), X, F.one_hot(CLASSES % 2).float(), F.mse_loss),
    "columns that sum to 1": (lambda: nn.Linear(3, 2), X, X[:, :2].softmax(1), lambda o, t: F.mse_loss(o, t)),
    "ordinal": (
        lambda: nn.Linear(3, 4),
        X,
        CLASSES,
        lambda o, t: (o.softmax(1) @ torch.arange(4.0) - t).square().mean(),
    ),
    "written into": (lambda: nn.Linear(3, 4), X, CLASSES, lambda o, t: F.cross_entropy(2 * o.neg_(), t)),
    "the hardest examples alone": (
        lambda: nn.Linear(3, 4),
        X,
        CLASSES,
        lambda o, t: F.cross_entropy(o, t, reduction="none").topk(5).values.mean(),
    ),
    "two losses": (
        lambda: nn.Linear(3, 4),
        X,
        CLASSES,
        lambda o, t: F.cross_entropy(o, t) + F.cross_entropy(o, t.flip(0)),
    ),
    "no loss of torch": (
        lambda: nn.Linear(3, 4),
        X,
        CLASSES,
        lambda o, t: -o.log_softmax(1).gather(1, t[:, None]).mean(),
    ),
    "one class": (_column, X, torch.zeros(20, dtype=torch.long), _no_sense),
    "one column of indices": (lambda: nn.Linear(3, 4), X, CLASSES[:, None], _no_sense),
}


@pytest.mark.check(after=8)
@pytest.mark.parametrize("policy", ["interpolate", "recalibrate"])
@pytest.mark.parametrize(("make", "x", "target", "loss_fn"), REFUSED.values(), ids=REFUSED)
def test_what_it_does_not_understand_is_refused_at_once(make, x, target, loss_fn, policy):
    calls = []

    def counted(output, target):
        calls.append(1)
        return loss_fn(output, target)

    batches = [(x, target)] * 40
    for loss in (loss_fn, counted):
        with pytest.raises(OptionError, match=r"class indices \(n, …\).*one column.*batch 0 has.*metrics=\('loss',\)"):
            _ends(make, batches, loss, batch_norm=policy)
    # Those of the first batch alone.
    assert len(calls) < len(batches)
    batches = batches[:2]
    measure_barrier(make(), make(), batches, loss_fn=loss_fn, metrics=("loss",), alphas=3, progress=False)


def _next_token(output, target):
    return F.cross_entropy(output[:, :-1].flatten(0, 1), target[:, 1:].flatten(), ignore_index=3)


@pytest.mark.parametrize("shape", [(4, 5), (5, 4)])
def test_the_error_is_of_what_a_function_compares(shape):
    """Next tokens of which one is padding, by hand."""
    x, y = X.view(*shape, 3), CLASSES.view(shape)
    for batches in ([(x, y)], [(x[:1], y[:1]), (x[1:], y[1:])]):
        nets, found = _ends(lambda: _LastAxis(4), batches, _next_token)
        counted = y[:, 1:] != 3
        expected = [(net(x)[:, :-1].argmax(-1) != y[:, 1:])[counted].double().mean().item() for net in nets]
        assert counted.any() and not counted.all() and sum(expected) > 0
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def _masked(output, target, reduce):
    each = F.cross_entropy(output.flatten(0, 1), target["classes"].flatten(), reduction="none")
    return reduce(each * target["mask"].flatten(), target["mask"])


def _masked_bits(output, target):
    each = F.binary_cross_entropy_with_logits(output, target["classes"], reduction="none")
    return (each * target["mask"]).sum() / target["mask"].sum()


def _weighed_bits(output, target):
    return F.binary_cross_entropy_with_logits(output, target["classes"], target["mask"])


@pytest.mark.parametrize(
    ("loss_fn", "bits"),
    [
        (functools.partial(_masked, reduce=lambda each, mask: each.sum() / mask.sum()), False),
        (functools.partial(_masked, reduce=lambda each, mask: each.mean()), False),
        (_masked_bits, True),
        (_weighed_bits, True),
    ],
    ids=["mask", "mask, over all", "mask of bits", "weights of bits"],
)
def test_positions_that_a_loss_masks_do_not_count(loss_fn, bits):
    mask = (torch.arange(20) % 3 > 0).double()
    x, y = (X, BITS[:, None]) if bits else (X.view(4, 5, 3), CLASSES.view(4, 5))
    target = {"classes": y, "mask": mask.view(y.shape)}
    nets, found = _ends(_column if bits else lambda: _LastAxis(4), [(x, target)], loss_fn, metrics=("error",))
    wrong = [(net(x) > 0) != y if bits else net(x).argmax(-1) != y for net in nets]
    expected = [each[target["mask"] > 0].double().mean().item() for each in wrong]
    assert expected != [each.double().mean().item() for each in wrong]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_outputs_of_any_form_are_read_as_the_loss_does():
    class Both(nn.Linear):
        def forward(self, input):
            return {"features": input, "logits": super().forward(input)}

    nets, found = _ends(lambda: Both(3, 4), [(X, CLASSES)], lambda o, t: F.cross_entropy(o["logits"], t))
    expected = [(net(X)["logits"].argmax(1) != CLASSES).double().mean().item() for net in nets]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "target", "loss_fn"),
    [
        (lambda: nn.Linear(3, 4), CLASSES, None),
        (lambda: nn.Linear(3, 4), CLASSES, lambda o, t: F.cross_entropy(2 * o, t)),
        (_column, BITS[:, None], F.binary_cross_entropy_with_logits),
    ],
)
@pytest.mark.parametrize("rows", [slice(None), slice(3, 4)])
def test_outputs_that_are_no_numbers_have_no_error(make, target, loss_fn, rows):
    x = X.clone()
    x[rows] = torch.nan
    with pytest.raises(NonFiniteError, match="error is nan at batch 1"):
        _ends(make, [(X, target), (x, target)], loss_fn, metrics=("error",))


def test_positions_that_do_not_count_may_be_no_numbers():
    x, y = X.clone(), CLASSES.clone()
    x[:3], y[:3] = torch.nan, -100
    _, expected = _ends(lambda: nn.Linear(3, 4), [(X, y)], None, metrics=("error",))
    _, found = _ends(lambda: nn.Linear(3, 4), [(x, y)], None, metrics=("error",))
    assert found == expected


@pytest.mark.parametrize(
    ("torch_loss", "error", "words"),
    [
        (F.multi_margin_loss, OptionError, "one loss of torch on an output of batch 0, and none or several on another"),
        # That batches weigh by another divisor is seen before.
        (F.cross_entropy, LossError, "That of a batch is another mean"),
    ],
)
def test_a_loss_that_calls_something_else_in_between_is_refused(torch_loss, error, words):
    def loss_fn(output, target):
        # At the middle of these two networks outputs are zero.
        if output.abs().max() > 1e-6:
            return torch_loss(2 * output, target)
        return output.square().mean()

    a, b = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)
    b.load_state_dict({"weight": -a.weight.detach()})
    with pytest.raises(error, match=words):
        measure_barrier(a, b, [(X, CLASSES)], loss_fn=loss_fn, alphas=3, progress=False)


def test_a_later_batch_is_named():
    batches = [(X, BITS[:, None]), (X, 0.5 * BITS[:, None])]
    with pytest.raises(OptionError, match="batch 1 has"):
        _ends(_column, batches, F.binary_cross_entropy_with_logits)


class _Scores(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x):
        return pytest.importorskip("transformers").modeling_outputs.ImageClassifierOutput(logits=self.linear(x))


def test_outputs_of_transformers_are_read_by_the_names_of_their_parts():
    batches = [(X[:13], CLASSES[:13]), (X[13:], CLASSES[13:])]
    nets, found = _ends(_Scores, batches, lambda output, target: F.cross_entropy(output.logits, target))
    expected = [(net(X).logits.argmax(1) != CLASSES).float().mean().item() for net in nets]
    assert found == pytest.approx(expected, rel=1e-6)


def test_labels_of_bytes_are_not_left_out_by_an_index_that_they_equal_modulo_256():
    torch.manual_seed(0)
    networks = [nn.Linear(4, 200) for _ in range(2)]
    x, y = torch.randn(40, 4), torch.randint(150, 160, (40,)).to(torch.uint8)
    for network in networks:
        with torch.no_grad():
            network.bias[156] = 50.0
    found = measure_barrier(*networks, [(x, y)], alphas=3, progress=False)
    np.testing.assert_allclose(found.values("error"), (y != 156).double().mean().item())
    assert found.weights("error").tolist() == [40]
