"""Claim: means over the data do not depend on how the data are cut into batches."""

import functools
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lmc_curvature import (
    BarrierMeasurement,
    BarrierPrediction,
    BatchLoss,
    GGNOperator,
    HessianOperator,
    Objective,
    measure_barrier,
    predict_barrier,
)
from lmc_curvature.curvature.blocks import cross_layer_hessian

WEIGHTS = torch.tensor([1.0, 10.0, 0.1, 2.0], dtype=torch.float64)
SIZE, CLASSES = 11, 4


def _vectors(generator):
    return torch.randn(SIZE, 3, generator=generator).double(), torch.randint(CLASSES, (SIZE,), generator=generator)


def _pixels(generator):
    x = torch.randn(SIZE, 3, 2, 2, generator=generator).double()
    y = torch.randint(CLASSES, (SIZE, 2, 2), generator=generator)
    # Whole examples, and single positions, do not count.
    y[::3], y[:, 0, 1] = 255, 255
    return x, y


def _soft(generator):
    x, y = _vectors(generator)
    return x, 0.9 * F.one_hot(y, CLASSES).double() + 0.1 / CLASSES


def _ignoring(generator):
    x, y = _vectors(generator)
    y[[0, 1, 2, 3, 7]] = -100
    return x, y


def _linear():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()


def _convolutions():
    return nn.Sequential(nn.Conv2d(3, 5, 1), nn.Tanh(), nn.Conv2d(5, CLASSES, 1)).double()


def _weighed_by_hand(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], weight=WEIGHTS)


MODULE = nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.2)
KINDS = {
    "class weights, module": (_linear, _vectors, MODULE),
    "class weights, partial": (_linear, _vectors, functools.partial(F.cross_entropy, weight=WEIGHTS)),
    "class weights, one of them zero": (_linear, _vectors, nn.CrossEntropyLoss(weight=WEIGHTS * (WEIGHTS != 2))),
    "class weights, probabilities": (_linear, _soft, MODULE),
    "ignored examples": (_linear, _ignoring, None),
    "ignored examples and weights": (_linear, _ignoring, functools.partial(F.cross_entropy, weight=WEIGHTS.float())),
    "ignored positions": (_convolutions, _pixels, nn.CrossEntropyLoss(ignore_index=255)),
    "ignored positions and weights": (_convolutions, _pixels, nn.CrossEntropyLoss(WEIGHTS, ignore_index=255)),
    "log-probabilities": (
        lambda: nn.Sequential(_linear(), nn.LogSoftmax(1)),
        _ignoring,
        nn.NLLLoss(weight=WEIGHTS),
    ),
    "log-probabilities, partial": (
        lambda: nn.Sequential(_convolutions(), nn.LogSoftmax(1)),
        _pixels,
        functools.partial(F.nll_loss, ignore_index=255),
    ),
    "real sizes": (_linear, _vectors, BatchLoss(_weighed_by_hand, size=lambda batch: WEIGHTS[batch[1]].sum())),
}


def _data(kind, seed=0):
    make, data, loss_fn = KINDS[kind]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make(), make(), data(generator), loss_fn


def _cut(data, at):
    bounds = [0, *sorted(at), SIZE]
    return [tuple(part[a:b] for part in data) for a, b in itertools.pairwise(bounds)]


def _plain_loss(model, data, loss_fn):
    return (
        loss_fn.fn(model, data)
        if isinstance(loss_fn, BatchLoss)
        else (loss_fn or F.cross_entropy)(model(data[0]), data[1])
    )


kinds = pytest.mark.parametrize("kind", KINDS)
cuts = given(at=st.sets(st.integers(1, SIZE - 1), max_size=6), seed=st.integers(0, 100))
few = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _in_float64(loss_fn):
    # A plain call takes weights of the output's type.
    if isinstance(loss_fn, functools.partial) and "weight" in loss_fn.keywords:
        return functools.partial(loss_fn.func, weight=loss_fn.keywords["weight"].double())
    return loss_fn


@pytest.mark.check(after=1)
@kinds
@few
@cuts
def test_loss_and_gradient_are_those_of_one_batch(kind, at, seed):
    model, _, data, loss_fn = _data(kind, seed)
    objective = Objective(model, _cut(data, at), loss_fn=loss_fn)
    loss = _plain_loss(model, data, _in_float64(loss_fn))
    assert objective.loss() == pytest.approx(loss.item(), rel=1e-12)
    expected = dict(
        zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True)
    )
    torch.testing.assert_close(objective.gradient(), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.check
@kinds
def test_curvature_is_that_of_one_batch(kind):
    model, _, data, loss_fn = _data(kind)
    cut, whole = (Objective(model, _cut(data, at), loss_fn=loss_fn) for at in ((2, 3, 7), ()))
    vector = torch.randn(HessianOperator(whole).shape[1], dtype=torch.float64)
    dense = HessianOperator(whole).to_dense()
    close = functools.partial(torch.testing.assert_close, rtol=1e-11, atol=1e-12)
    close(HessianOperator(cut) @ vector, dense @ vector)
    close(HessianOperator(cut).to_dense(), dense)
    close(HessianOperator(cut).diagonal(), dense.diagonal())
    if whole.has_output:
        close(GGNOperator(cut) @ vector, GGNOperator(whole) @ vector)
    layers = HessianOperator(whole).partition.names
    close(cross_layer_hessian(cut, None, *layers[-2:]), cross_layer_hessian(whole, None, *layers[-2:]))


@pytest.mark.check
@kinds
def test_predictions_and_measurements_are_those_of_one_batch(kind, tmp_path):
    a, b, data, loss_fn = _data(kind)
    cut, whole = (
        [compute(a, b, _cut(data, at), loss_fn=loss_fn, progress=False) for compute in (predict_barrier, _measure)]
        for at in ((2, 3, 7), ())
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-12)
    for end, expected in zip(cut[0].endpoints, whole[0].endpoints, strict=True):
        close(end.loss, expected.loss)
        close(end.slopes, expected.slopes)
        close(end.curvature, expected.curvature)
    for metric in cut[1].metrics:
        close(cut[1].values(metric), whole[1].values(metric))
        close(cut[1].curve(metric), whole[1].curve(metric))
        assert np.isfinite(cut[1].standard_error(metric))
    plain = [_plain_loss(net, data, _in_float64(loss_fn)).item() for net in (a, b)]
    close(cut[1].ends(), plain)
    close([end.loss for end in cut[0].endpoints], plain)
    for result in cut:
        result.save(tmp_path / "result")
        again = type(result).load(tmp_path / "result")
        assert str(again) == str(result)


def _measure(a, b, batches, *, loss_fn, progress):
    metrics = ("loss",) if isinstance(loss_fn, BatchLoss) else ("loss", "error")
    return measure_barrier(a, b, batches, loss_fn=loss_fn, alphas=3, metrics=metrics, progress=progress)


@pytest.mark.check(after=1)
@pytest.mark.parametrize("kind", ["ignored examples", "ignored positions and weights", "log-probabilities"])
@few
@cuts
def test_the_error_is_the_share_of_what_counts(kind, at, seed):
    a, b, (x, y), loss_fn = _data(kind, seed)
    found = _measure(a, b, _cut((x, y), at), loss_fn=loss_fn, progress=False)
    counted = y != getattr(loss_fn, "ignore_index", -100)
    expected = [(net(x).argmax(1) != y)[counted].double().mean().item() for net in (a, b)]
    np.testing.assert_allclose(found.ends("error"), expected, rtol=1e-12)
    assert found.examples == SIZE


def test_tokens_of_varying_lengths_weigh_by_their_number():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, CLASSES), _Transposed()).double()
    batches = []
    for count, length in ((3, 5), (2, 9), (4, 1)):
        ids = torch.randint(7, (count, length), generator=generator)
        batches.append((ids, ids % CLASSES))
    batches[1][1][:, 4:] = -100
    flat = [torch.cat([part.flatten() for part in parts]) for parts in zip(*batches, strict=True)]
    expected = F.cross_entropy(model[0](flat[0]), flat[1]).item()
    assert Objective(model, batches).loss() == pytest.approx(expected, rel=1e-12)


class _Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


@pytest.mark.parametrize("at", [(3,), (3, 7), (1, 2, 3)])
def test_batches_in_which_nothing_counts_are_left_out(at):
    model, other, (x, y), _ = _data("ignored examples")
    y = torch.where(torch.arange(SIZE) < 3, -100, y.clamp(min=0))
    rest = [(x[3:], y[3:])]
    batches = _cut((x, y), at)
    objective, expected = Objective(model, batches), Objective(model, rest)
    assert objective.loss() == pytest.approx(expected.loss(), rel=1e-12)
    torch.testing.assert_close(HessianOperator(objective).to_dense(), HessianOperator(expected).to_dense())
    found, right = (_measure(model, other, loader, loss_fn=None, progress=False) for loader in (batches, rest))
    for metric in ("loss", "error"):
        np.testing.assert_allclose(found.values(metric), right.values(metric), rtol=1e-12)
    with objective.one_pass() as visited:
        assert [batch.index for batch in visited] == list(range(len(batches)))[at.index(3) + 1 :]


def test_statistics_are_reestimated_from_all_examples():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES)).double()
    x, y = _vectors(torch.Generator().manual_seed(0))
    y[:4] = -100
    batches = _cut((x, y), (2, 4, 8))
    found = Objective(model, batches, batch_norm="recalibrate").recalibrated([{}])[0]
    labelled = [(part, torch.zeros(len(part), dtype=torch.long)) for part, _ in batches]
    expected = Objective(model, labelled, batch_norm="recalibrate").recalibrated([{}])[0]
    torch.testing.assert_close(found, expected)


def test_results_without_weights_are_as_before(tmp_path):
    a, b, data, _ = _data("class weights, module")
    batches = _cut(data, (2, 6))
    prediction = predict_barrier(a, b, batches, progress=False)
    measurement = _measure(a, b, batches, loss_fn=None, progress=False)
    assert measurement.batch_weights is None
    assert all(end.batch_weights is None for end in prediction.endpoints)
    assert measurement.weights("error").tolist() == prediction.endpoints[0].weights.tolist() == [2, 4, 5]
    for kind, result in ((BarrierPrediction, prediction), (BarrierMeasurement, measurement)):
        result.save(tmp_path / "result")
        assert str(kind.load(tmp_path / "result")) == str(result)


def test_whole_sizes_count_examples_and_real_ones_weigh_them():
    model, _, data, _ = _data("class weights, module")
    for size, expected in (
        (lambda batch: 7, (7, 7.0)),
        (lambda batch: 7.5, (SIZE, 7.5)),
        (lambda batch: 7.0, (SIZE, 7.0)),
    ):
        objective = Objective(model, [data], loss_fn=BatchLoss(_weighed_by_hand, size=size))
        with objective.one_pass() as batches:
            batch = next(batches)
        assert (batch.size, batch.weight) == expected
    nothing = Objective(model, ["text"], loss_fn=BatchLoss(_weighed_by_hand, size=lambda batch: 2.5))
    with nothing.one_pass() as batches:
        assert next(batches).size == 3
