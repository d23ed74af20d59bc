"""Claim: what a selection or a point merges is what was predicted, with its layers, frozen parts and statistics."""

import copy
import dataclasses
import functools
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmc_curvature import (
    BarrierPrediction,
    BatchLoss,
    best_point,
    measure_barrier,
    merge,
    predict_barrier,
    select_layers,
)
from lmc_curvature.errors import LoaderError, OptionError
from lmc_curvature.merging.trials import Bench
from tests.support.networks import randomized


class Network(nn.Module):
    """A convolution with batch normalisation, and two linear layers."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.hidden, self.head = nn.Linear(16, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.hidden(self.norm(self.conv(x)).tanh().flatten(1)).tanh())


MODELS = [randomized(Network().double(), seed) for seed in (1, 2)]
X, Y = torch.randn(64, 2, 4, 4, generator=torch.Generator().manual_seed(0)).double(), torch.arange(64) % 3
LOADER = [(X[:32], Y[:32]), (X[32:], Y[32:])]


def loss_of(network):
    with torch.no_grad():
        return F.cross_entropy(network(X), Y).item()


@pytest.mark.check
@pytest.mark.parametrize("base", ["a", "b"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers": "module"},
        {"layers": "tensor"},
        {"frozen": "hidden"},
        {"frozen": "weight$", "base": "b"},
        {"frozen": "norm", "layers": "module", "base": "b"},
    ],
    ids=str,
)
def test_a_selection_merges_what_was_predicted_and_measured(tmp_path, options, base):
    prediction = predict_barrier(*MODELS, LOADER, progress=False, **options)
    prediction.save(tmp_path / "prediction")
    for known in (prediction, BarrierPrediction.load(tmp_path / "prediction")):
        chosen = known.layers[::2]
        selection = select_layers(
            known, 1e9, base=base, required=chosen, excluded=[name for name in known.layers if name not in chosen]
        )
        merged = loss_of(selection.merge(*MODELS))
        # A point of the measurement, by the options of the prediction.
        x = {name: 0.5 if name in chosen else float(base == "b") for name in known.layers}
        measured = measure_barrier(*MODELS, LOADER, points=[x], alphas=3, metrics=("loss",), progress=False, **options)
        assert merged == pytest.approx(measured.rises()[0] + sum(measured.ends()) / 2, rel=1e-9)
        # Verified without a word of the partition.
        verified = selection.verify(*MODELS, LOADER, measurements=1, progress=False)
        assert verified.trials[0].rise == pytest.approx(measured.rises()[0], rel=1e-9)
        end = MODELS[base == "b"].state_dict()
        for name in known.groups:
            assert name in known.layers
        held = {entry for members in known.groups.values() for entry in members}
        still = MODELS[known.base == "b"].state_dict()
        for name, tensor in selection.merge(*MODELS).state_dict().items():
            if name not in held and not name.endswith("tracked"):
                torch.testing.assert_close(tensor, still[name], rtol=0, atol=0)
            elif any(name in known.groups[layer] for layer in known.layers if layer not in chosen):
                torch.testing.assert_close(tensor, end[name], rtol=0, atol=0)


@pytest.mark.check
def test_a_point_merges_what_was_predicted():
    prediction = predict_barrier(*MODELS, LOADER, anchors=5, frozen="head", base="b", progress=False)
    point = best_point(prediction)
    verified = point.verify(*MODELS, LOADER, measurements=1, progress=False)
    found = loss_of(verified.point.merge(*MODELS))
    ends = prediction.endpoints
    assert found == pytest.approx(verified.chosen.rise + (ends[0].loss + ends[1].loss) / 2, rel=1e-9)


@pytest.mark.check
def test_batch_normalisation_is_that_of_the_prediction():
    predicted = predict_barrier(*MODELS, LOADER, batch_norm="recalibrate", progress=False)
    selection = select_layers(predicted, 1e9, base="a")
    with pytest.raises(OptionError, match="batch_norm='recalibrate' needs data"):
        selection.merge(*MODELS)
    merged = selection.merge(*MODELS, loader=LOADER, progress=False)
    expected = nn.Sequential(merged.conv)(X)
    torch.testing.assert_close(merged.norm.running_mean, expected.mean((0, 2, 3)), rtol=1e-9, atol=1e-12)
    averaged = (MODELS[0].norm.running_mean + MODELS[1].norm.running_mean) / 2
    plain = selection.merge(*MODELS, batch_norm="interpolate")
    torch.testing.assert_close(plain.norm.running_mean, averaged, rtol=1e-12, atol=1e-12)
    with pytest.raises(OptionError, match="batch_norm='interpolate': the prediction was made under 'recalibrate'"):
        selection.verify(*MODELS, LOADER, batch_norm="interpolate", progress=False)
    by_batches = select_layers(predict_barrier(*MODELS, LOADER, batch_norm="batch", progress=False), 1e9, base="a")
    with pytest.raises(OptionError, match="made under batch_norm='batch'"):
        by_batches.merge(*MODELS)


def test_running_statistics_are_those_of_the_base_whatever_the_layers():
    by_tensors = predict_barrier(*MODELS, LOADER, batch_norm="recalibrate", layers="tensor", progress=False)
    chosen = by_tensors.layers[0]
    others = [name for name in by_tensors.layers if name != chosen]
    selection = select_layers(by_tensors, 1e9, base="b", required=[chosen], excluded=others)
    merged = selection.merge(*MODELS, batch_norm="interpolate")
    torch.testing.assert_close(merged.norm.running_mean, MODELS[1].norm.running_mean, rtol=0, atol=0)
    mapping = {"first": ["conv"], "rest": ["weight", "bias"]}
    by_names = predict_barrier(*MODELS, LOADER, batch_norm="recalibrate", layers=mapping, progress=False)
    with pytest.raises(OptionError, match="its layers name no running statistics"):
        select_layers(by_names, 1e9, base="b").merge(*MODELS, batch_norm="interpolate")


def test_other_networks_and_the_other_order_are_refused():
    prediction = predict_barrier(*MODELS, LOADER, progress=False)
    chosen, other = select_layers(prediction, 1e9), randomized(Network().double(), 3)
    for asked in (chosen, best_point(prediction)):
        for use in (lambda *pair, asked=asked: asked.verify(*pair, LOADER, progress=False), asked.merge):
            with pytest.raises(OptionError, match="not the networks of the prediction: of layer"):
                use(MODELS[0], other)
            with pytest.raises(OptionError, match="the other way round"):
                use(*MODELS[::-1])


@pytest.mark.check
def test_measurements_are_of_one_loss_and_of_the_same_data():
    prediction = predict_barrier(*MODELS, LOADER, progress=False)

    class Loader:
        """Other batches in every pass."""

        passes = 0

        def __iter__(self):
            self.passes += 1
            yield 0.01 * self.passes + X[:40], Y[:40]

    strict, points = select_layers(prediction, 0.02), np.zeros((1, len(prediction.layers)))
    bench = Bench(prediction, *MODELS, Loader(), {"progress": False})
    bench.measure(points)
    with pytest.raises(LoaderError, match=r"other data in every pass: .*list\(loader\)"):
        bench.measure(points)
    smooth = functools.partial(F.cross_entropy, label_smoothing=0.4)
    with pytest.warns(UserWarning, match="an option such as loss_fn is not"):
        strict.verify(*MODELS, LOADER, measurements=1, loss_fn=smooth, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        strict.verify(*MODELS, LOADER, measurements=2, progress=False)


def _negative_likelihood(output, target):
    """Of a density, far below zero."""
    return F.cross_entropy(output, target) - 5


def _focal(output, target):
    """Cross-entropy, but little of what is nearly right (Lin et al. 2017)."""
    each = F.cross_entropy(output, target, reduction="none")
    return ((1 - (-each).exp()) ** 2 * each).mean()


def _of_batch(model, batch):
    return _focal(model(batch["x"]), batch["y"])


NAMED = [{"x": x, "y": y} for x, y in LOADER]


@pytest.mark.check
@pytest.mark.parametrize(
    ("loss_fn", "loader"), [(_focal, LOADER), (BatchLoss(_of_batch), NAMED)], ids=["function", "batch loss"]
)
def test_the_loss_is_that_of_the_prediction(loss_fn, loader, tmp_path):
    options = {"batch_norm": "recalibrate", "progress": False}
    prediction = predict_barrier(*MODELS, loader, loss_fn=loss_fn, progress=False)
    normalised = predict_barrier(*MODELS, loader, loss_fn=loss_fn, **options)

    def loss(model):
        with torch.no_grad():
            return np.average(
                [_focal(model.eval()(x), y).item() for x, y in LOADER], weights=[len(y) for _, y in LOADER]
            )

    selection = select_layers(prediction, 1e9)
    mean = sum(map(loss, MODELS)) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        verified = selection.verify(*MODELS, loader, measurements=1, held_out=loader, progress=False)
        point = best_point(prediction).verify(*MODELS, loader, measurements=1, progress=False)
    assert verified.chosen.rise == pytest.approx(loss(selection.merge(*MODELS)) - mean, rel=1e-9)
    assert verified.held_out.rise == pytest.approx(verified.chosen.rise, rel=1e-9)
    assert point.chosen.rise == pytest.approx(loss(point.point.merge(*MODELS)) - mean, rel=1e-9)
    merged = select_layers(normalised, 1e9).merge(*MODELS, loader=loader, progress=False)
    assert merged.recalibration.after == pytest.approx(loss(merged), rel=1e-9)

    # Read from a file, it is known by its name alone.
    for number, each in enumerate((prediction, normalised)):
        each.save(tmp_path / f"{number}.safetensors")
    again, other = (BarrierPrediction.load(tmp_path / f"{number}.safetensors") for number in range(2))
    assert (again.loss, again.loss_fn) == (prediction.loss, None)
    selection, error = select_layers(again, 1e9), r"made with the loss .*_(focal|of_batch).*verify\(…, loss_fn=…\)"
    for use in (
        lambda: selection.verify(*MODELS, [], progress=False),
        lambda: best_point(again).verify(*MODELS, [], progress=False),
        lambda: select_layers(other, 1e9).merge(*MODELS, loader=loader, progress=False),
    ):
        with pytest.raises(OptionError, match=error):
            use()
    given = selection.verify(*MODELS, loader, measurements=1, loss_fn=loss_fn, progress=False)
    assert given.chosen.rise == verified.chosen.rise
    merged = select_layers(other, 1e9).merge(*MODELS, loader=loader, loss_fn=loss_fn, progress=False)
    assert merged.recalibration.after == pytest.approx(loss(merged), rel=1e-9)
    # A merge that looks at no data needs no loss.
    select_layers(again, 1e9).merge(*MODELS)


def test_cross_entropy_is_known_from_a_file(tmp_path):
    prediction = predict_barrier(*MODELS, LOADER, loss_fn=nn.CrossEntropyLoss(), progress=False)
    prediction.save(tmp_path / "p.safetensors")
    again = BarrierPrediction.load(tmp_path / "p.safetensors")
    # Those of earlier versions do not say.
    for each in (again, dataclasses.replace(again, loss=None)):
        found = select_layers(each, 1e9).verify(*MODELS, LOADER, measurements=1, progress=False)
        assert found.chosen.rise == pytest.approx(found.chosen.predicted, abs=1e-9)


@pytest.mark.check
def test_losses_below_zero_are_losses():
    prediction = predict_barrier(*MODELS, LOADER, loss_fn=_negative_likelihood, progress=False)
    above = predict_barrier(*MODELS, LOADER, progress=False)
    size = -sum(end.loss for end in prediction.endpoints) / 2
    assert size > 0
    relative = select_layers(prediction, relative_budget=0.1)
    assert relative.budget == pytest.approx(0.1 * size)
    assert relative.members == select_layers(above, 0.1 * size).members
    assert "below zero" not in str(best_point(prediction))
    options = {"alphas": 11, "metrics": ("loss",), "progress": False}
    ends = [MODELS[0], copy.deepcopy(MODELS[0])]
    with torch.no_grad():
        ends[1].head.bias.add_(0.1 * torch.arange(3))
    kinds = [measure_barrier(*ends, LOADER, loss_fn=f, **options).kind for f in (None, _negative_likelihood)]
    assert kinds == ["flat", "flat"]


@pytest.mark.check
@pytest.mark.parametrize("anchors", [2, 3])
def test_the_mean_of_both_merges_has_its_own_rise_and_error(anchors):
    prediction = predict_barrier(*MODELS, LOADER, anchors=anchors, progress=False)
    chosen = ["conv", "head"]
    options = {"required": chosen, "excluded": ["hidden"]}
    mean, *sides = (select_layers(prediction, 1e9, base=base, **options) for base in ("mean", "a", "b"))
    assert mean.rise == pytest.approx((sides[0].rise + sides[1].rise) / 2, rel=1e-9)
    points = [{n: 0.5 if n in chosen else rest for n in prediction.layers} for rest in (0.0, 1.0)]
    small = [part for x, y in LOADER for part in zip(x.split(8), y.split(8), strict=True)]
    found = mean.verify(*MODELS, small, measurements=1, progress=False).trials[0]
    measured = measure_barrier(*MODELS, small, points=points, alphas=3, metrics=("loss",), progress=False)
    batches = measured.batch_points[:, 0].mean(axis=1) - measured.batch_ends[:, 0].mean(axis=1)
    assert found.rise == pytest.approx(batches.mean(), rel=1e-9)
    assert found.standard_error == pytest.approx(batches.std(ddof=1) / len(batches) ** 0.5, rel=1e-6)


@pytest.mark.check
def test_held_out_data_do_not_make_the_statistics():
    """Under "recalibrate" the network that is measured in the end is the one that was chosen."""
    prediction = predict_barrier(*MODELS, LOADER, batch_norm="recalibrate", progress=False)
    others = [(2 * X[:32] + 1, Y[:32])]
    found = select_layers(prediction, 1e9, base="a").verify(
        *MODELS, LOADER, measurements=1, held_out=others, progress=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        networks = [found.selection.merge(*MODELS, loader=LOADER, progress=False)]
        networks += [merge(model, model, batch_norm="recalibrate", loader=LOADER, progress=False) for model in MODELS]
    with torch.no_grad():
        losses = [F.cross_entropy(network(others[0][0]), others[0][1]).item() for network in networks]
    assert found.held_out.rise == pytest.approx(losses[0] - sum(losses[1:]) / 2, rel=1e-6)


def test_what_is_no_merge_or_not_known_is_refused():
    prediction = predict_barrier(*MODELS, LOADER, progress=False)
    with pytest.raises(OptionError, match="base='mean' is the mean of two merges"):
        select_layers(prediction, 1e9, base="mean").merge(*MODELS)
    with pytest.raises(OptionError, match="comes from an earlier version"):
        select_layers(dataclasses.replace(prediction, groups=None), 1e9, base="a").merge(*MODELS)
