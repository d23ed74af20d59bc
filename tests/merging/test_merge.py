"""Claim: the merged network is the point of the cube that was asked for, and nothing else changes."""

import copy
import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn

from lmc_curvature import LayerPartition, measure_barrier, merge
from lmc_curvature.errors import ArchitectureMismatchError, NonFiniteError, OptionError, PartitionError
from tests.support.cases import CASES
from tests.support.networks import joined, plain_loss, randomized

CONV = CASES["conv, batch"]
LAYERS = ("conv1", "conv2", "fc")


@pytest.fixture
def pair():
    first, second = (randomized(CONV.model(0), seed) for seed in (1, 2))
    for count, model in ((3, first), (5, second)):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.num_batches_tracked.fill_(count)
    return first, second


def _expected(first, second, coordinates, counters):
    """The entries by the formula, layer by layer, with the counters of one of the networks."""
    layer_of = LayerPartition.of(first).layer_of
    entries = {}
    for name, a in first.state_dict().items():
        b = second.state_dict()[name]
        entries[name] = (
            counters.state_dict()[name]
            if name.endswith("num_batches_tracked")
            else a + coordinates[layer_of(name)] * (b - a)
        )
    return entries


@pytest.mark.parametrize(
    ("options", "coordinates"),
    [
        ({}, (0.5, 0.5, 0.5)),
        ({"alpha": 0.3, "layers": ["conv2"]}, (0, 0.3, 0)),
        ({"alpha": 0.3, "layers": "conv2", "base": "b"}, (1, 0.3, 1)),
        ({"alpha": {"conv1": 1.0, "fc": 0.125}}, (1, 0, 0.125)),
        ({"alpha": {"conv1": 0.75}, "layers": ["conv1"], "base": "b"}, (0.75, 1, 1)),
        ({"alpha": 0.25, "layers": []}, (0, 0, 0)),
    ],
)
def test_entries_are_those_of_the_point_and_of_the_base(pair, options, coordinates):
    merged = merge(*pair, **options)
    base = pair[1] if options.get("base") == "b" else pair[0]
    expected = _expected(*pair, dict(zip(LAYERS, coordinates, strict=True)), base)
    torch.testing.assert_close(merged.state_dict(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", [case for name, case in CASES.items()], ids=list(CASES))
def test_networks_of_every_kind_are_averaged_and_left_alone(case):
    first, second = case.model(0), case.model(1)
    before = [copy.deepcopy(model.state_dict()) for model in (first, second)]
    merged = merge(first, second, alpha=0.25)
    for model, state in zip((first, second), before, strict=True):
        torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    for name, entry in merged.state_dict().items():
        if entry.is_floating_point():
            torch.testing.assert_close(entry, 0.75 * before[0][name] + 0.25 * before[1][name], rtol=1e-6, atol=1e-9)
    # Tied entries are one parameter still.
    assert len(list(merged.parameters())) == len(list(first.parameters()))
    assert not any(module.training for module in merged.modules())


def test_losses_are_those_that_a_measurement_finds(pair):
    batches = CONV.batches((6, 5))
    measured = measure_barrier(*pair, batches, sets=[["conv1", "fc"]], alphas=[0.0, 0.25, 1.0], progress=False)
    data = joined(batches)
    whole, of_a, of_b = (
        plain_loss(merge(*pair, alpha=0.25, layers=layers, base=base), data).item()
        for layers, base in ((None, "a"), (["conv1", "fc"], "a"), (["conv1", "fc"], "b"))
    )
    assert measured.values()[1] == pytest.approx(whole, rel=1e-10)
    chord = 0.75 * measured.ends()[0] + 0.25 * measured.ends()[1]
    assert measured.layer_curves()[0, 1] == pytest.approx(0.75 * of_a + 0.25 * of_b - chord, rel=1e-9)


def test_another_partition_names_other_layers(pair):
    merged = merge(*pair, layers=["bn1"], partition="module")
    for name, entry in merged.state_dict().items():
        moved = name.startswith("bn1") and entry.is_floating_point()
        assert torch.equal(entry, pair[0].state_dict()[name]) != moved, name


def test_wrappers_are_left_out_and_modes_stay(pair):
    pair[0].train()
    merged = merge(nn.DataParallel(pair[0]), pair[1])
    assert type(merged) is type(pair[0])
    assert pair[0].training
    with torch.inference_mode():
        inside = merge(*pair)
    torch.testing.assert_close(inside.state_dict(), merged.state_dict(), rtol=0, atol=0)
    next(inside.parameters()).sum().backward()


def _mean_loss(model, batches):
    data = joined(batches)
    with torch.no_grad():
        return F.cross_entropy(model(data[0]), data[1]).item()


def _trained_like(seed, batches):
    """A network whose running statistics are those of some data."""
    model = CONV.model(seed)
    update_bn([x for x, _ in batches], model)
    return model.eval()


def test_statistics_are_estimated_anew_and_both_losses_reported():
    batches, others = CONV.batches((6, 6)), [(3 * x + 1, y) for x, y in CONV.batches((8, 8), seed=5)]
    pair = [_trained_like(seed, others) for seed in (0, 1)]
    with warnings.catch_warnings():
        # Of data that the statistics of both networks are those of, there is nothing to warn.
        warnings.simplefilter("error")
        merged = merge(*pair, alpha=0.5, batch_norm="recalibrate", loader=others, recalibration=others, progress=False)
    interpolated = merge(*pair)
    assert merged.recalibration.before == pytest.approx(_mean_loss(interpolated, others), rel=1e-10)
    update_bn([x for x, _ in others], interpolated)
    interpolated.eval()
    for name, entry in interpolated.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(merged.state_dict()[name], entry, rtol=1e-9, atol=1e-12)
    assert merged.recalibration.after == pytest.approx(_mean_loss(interpolated, others), rel=1e-9)
    again = merge(*pair, batch_norm="recalibrate", loader=batches, recalibration=others, progress=False)
    torch.testing.assert_close(again.state_dict(), merged.state_dict(), rtol=1e-12, atol=1e-12)
    assert again.recalibration.after == pytest.approx(_mean_loss(merged, batches), rel=1e-9)


def test_data_that_make_a_network_itself_worse_are_warned_of():
    batches = CONV.batches((6, 6))
    pair = []
    for seed in (0, 1):
        model = _trained_like(seed, batches)
        # Trained on these batches: every other choice of statistics is worse.
        optimizer = torch.optim.Adam(model.parameters(), 0.05)
        for _ in range(60):
            optimizer.zero_grad()
            sum(F.cross_entropy(model(x), y) for x, y in batches).backward()
            optimizer.step()
        pair.append(model)
    strange = [(20 * x - 30, y) for x, y in batches]
    with pytest.warns(UserWarning, match="make model_a worse: loss .* by its own statistics.*recalibration=") as caught:
        merge(*pair, batch_norm="recalibrate", loader=batches, recalibration=strange, progress=False)
    assert any("make model_b worse" in str(warning.message) for warning in caught)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": 1.5}, OptionError, "alpha=1.5 of layer 'conv1' lies outside the cube"),
        ({"alpha": {"conv2": "half"}}, OptionError, "alpha='half' of layer 'conv2'"),
        ({"alpha": {"conv3": 0.5}}, PartitionError, "no layer 'conv3': did you mean 'conv"),
        ({"layers": "fused"}, PartitionError, "no layer 'fused'.*is partition, another option"),
        ({"layers": ["conv1"], "alpha": {"conv2": 0.5}}, OptionError, "'conv1' is in layers and not in alpha"),
        ({"layers": ["fc"], "alpha": {"fc": 0.5, "conv2": 0}}, OptionError, "'conv2' is in alpha and not in layers"),
        ({"base": "c"}, OptionError, "base='c' is not a choice"),
        ({"batch_norm": "batch"}, OptionError, "batch_norm='batch' is not a choice"),
        ({"batch_norm": "recalibrate"}, OptionError, "needs data: pass loader="),
        ({"loader": []}, OptionError, "loader is for batch_norm='recalibrate'"),
        ({"recalibration": []}, OptionError, "recalibration is for batch_norm='recalibrate'"),
        ({"partition": "fusd"}, PartitionError, "did you mean 'fused'"),
    ],
)
def test_bad_options_are_named(pair, options, error, message, untyped):
    with pytest.raises(error, match=message):
        merge(*pair, **options)


def test_networks_that_cannot_be_averaged_are_named(pair):
    with pytest.raises(ArchitectureMismatchError, match="not of one architecture"):
        merge(pair[0], nn.Linear(2, 2))
    with torch.no_grad():
        pair[1].fc.bias[0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"fc\.bias.*model_b"):
        merge(*pair, layers=["conv1"])


class _Heads(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.heads, self.out = heads, nn.Linear(8, 2)

    def forward(self, x):
        return self.out(F.layer_norm(x.unflatten(1, (self.heads, -1)), (8 // self.heads,)).flatten(1))


class _Fused(nn.Module):
    """Two branches that become one weight in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fused = nn.Linear(4, 3), nn.Linear(4, 3), None

    def train(self, mode=True):
        super().train(mode)
        self.fused = None if mode else (self.a.weight + self.b.weight).detach()
        return self

    def forward(self, x):
        return F.linear(x, self.a.weight + self.b.weight if self.fused is None else self.fused, self.a.bias)


class _Kept(nn.Linear):
    """Its weight's exponential is computed at the first call in evaluation mode."""

    kept = None

    def forward(self, input):
        if self.training:
            return F.linear(input, torch.matrix_exp(self.weight))
        if self.kept is None:
            self.kept = torch.matrix_exp(self.weight).detach()
        return F.linear(input, self.kept)


@pytest.mark.parametrize(
    ("first", "second", "named"),
    [
        (_Heads(2), _Heads(4), "heads: 2 in model_a, 4 in model_b"),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 4), nn.GELU()), "module 1: ReLU"),
    ],
)
def test_settings_that_differ_are_warned_of(first, second, named):
    with pytest.warns(UserWarning, match=f"differ in more than their entries: {named}"):
        merge(first, second)


@pytest.mark.parametrize("mode", [True, False])
def test_what_modules_make_of_their_entries_is_that_of_the_merged_ones(mode, recwarn):
    pair, x = [_Fused().train(mode) for _ in range(2)], torch.randn(5, 4)
    weight = sum(each.a.weight + each.b.weight for each in pair) / 2
    torch.testing.assert_close(merge(*pair)(x), F.linear(x, weight, (pair[0].a.bias + pair[1].a.bias) / 2))
    assert not recwarn


def test_what_a_network_keeps_of_its_entries_is_warned_of():
    pair, x = [_Kept(4, 4).eval() for _ in range(2)], torch.randn(5, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Nothing is kept yet.
        torch.testing.assert_close(
            merge(*pair)(x), F.linear(x, torch.matrix_exp((pair[0].weight + pair[1].weight) / 2))
        )
    for each in pair:
        each(x)
    with pytest.warns(UserWarning, match="kept: .*computed from its entries"):
        merge(*pair)


class _Remembers(nn.Linear):
    """What it has computed last stays on it, and every call writes over it."""

    def forward(self, input):
        self.seen = super().forward(input)
        return self.seen.tanh()


def test_what_every_call_writes_over_is_nobodys_business():
    pair = [_Remembers(4, 3).eval() for _ in range(2)]
    for each in pair:
        each(torch.randn(5, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge(*pair)


class _Reaching(nn.Module):
    """Calls its second layer in one of several ways."""

    def __init__(self, way):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.step = {
            "function": lambda h: self.second(h),
            "partial": functools.partial(lambda layer, h: layer(h), self.second),
            "list": [torch.tanh, lambda h: self.second(h)],
            "default": lambda h, layer=self.second: layer(h),
            "method": self.apply_second,
        }[way]

    def apply_second(self, h):
        return self.second(h)

    def forward(self, x):
        for step in self.step if isinstance(self.step, list) else [self.step]:
            x = step(x)
        return x


@pytest.mark.parametrize("way", ["function", "list", "default"])
def test_what_the_merged_network_reaches_for_in_the_first_is_warned_of(way):
    with pytest.warns(UserWarning, match="reaches for modules of model_a itself in 'step'"):
        merge(_Reaching(way), _Reaching(way))


@pytest.mark.parametrize("way", ["partial", "method"])
def test_what_is_copied_with_the_network_is_not_warned_of(way):
    pair = _Reaching(way), _Reaching(way)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = merge(*pair)
    x = torch.randn(3, 4)
    mean = {name: (a + pair[1].state_dict()[name]) / 2 for name, a in pair[0].state_dict().items()}
    torch.testing.assert_close(merged(x), F.linear(x, mean["second.weight"], mean["second.bias"]))


@pytest.fixture
def three(pair):
    third = randomized(CONV.model(3), 3)
    return (*pair, third)


def _weighted(models, weights, layers, counters):
    """The entries Σ w_k θ_k of some layers, the others and the counters being those of one of the networks."""
    layer_of = LayerPartition.of(models[0]).layer_of
    states = [model.state_dict() for model in models]
    return {
        name: sum(w * state[name] for w, state in zip(weights, states, strict=True))
        if entry.is_floating_point() and layer_of(name) in layers
        else entry
        for name, entry in counters.state_dict().items()
    }


@pytest.mark.parametrize(
    ("options", "weights", "layers", "base"),
    [
        ({}, [1 / 3] * 3, LAYERS, 0),
        ({"weights": [0.5, 0.3, 0.2]}, [0.5, 0.3, 0.2], LAYERS, 0),
        ({"weights": {"model_c": 0.5, "model_b": 0.25, "model_a": 0.25}}, [0.25, 0.25, 0.5], LAYERS, 0),
        ({"weights": [0.5, 0.3, 0.2], "layers": ["conv2"], "base": "b"}, [0.5, 0.3, 0.2], ("conv2",), 1),
        ({"layers": "bn1", "partition": "module"}, [1 / 3] * 3, (), 0),
    ],
)
def test_several_networks_are_averaged_by_their_weights(three, options, weights, layers, base):
    before = [copy.deepcopy(model.state_dict()) for model in three]
    merged = merge(*three, **options)
    expected = _weighted(three, weights, layers, three[base])
    if "partition" in options:
        mean = _weighted(three, weights, LAYERS, three[base])
        expected |= {name: entry for name, entry in mean.items() if name.startswith("bn1.")}
    torch.testing.assert_close(merged.state_dict(), expected, rtol=1e-12, atol=1e-14)
    for model, state in zip(three, before, strict=True):
        torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_weights_of_two_networks_are_a_place_between_them(pair):
    with torch.inference_mode():
        found = merge(*pair, weights=[0.7, 0.3])
    torch.testing.assert_close(found.state_dict(), merge(*pair, alpha=0.3).state_dict(), rtol=1e-14, atol=1e-15)
    next(found.parameters()).sum().backward()


def test_statistics_of_several_networks_are_estimated_anew():
    batches = CONV.batches((6, 6))
    three = [_trained_like(seed, batches) for seed in range(3)]
    merged = merge(*three, batch_norm="recalibrate", loader=batches, progress=False)
    expected = merge(*three)
    assert merged.recalibration.before == pytest.approx(_mean_loss(expected, batches), rel=1e-10)
    update_bn([x for x, _ in batches], expected)
    assert merged.recalibration.after == pytest.approx(_mean_loss(expected.eval(), batches), rel=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.5}, "alpha=0.5 is a place between two networks"),
        ({"weights": [0.5, 0.6, -0.1]}, "weight of network 'model_c' is -0.1"),
        ({"weights": [0.5, 0.1, 0.1]}, "weights sum to 0.7"),
        ({"base": "c"}, "base='c' is not a choice"),
        ({"loader": []}, "loader is for batch_norm='recalibrate'"),
    ],
)
def test_bad_options_of_several_networks_are_named(three, options, message, untyped):
    with pytest.raises(OptionError, match=message):
        merge(*three, **options)


def test_the_one_of_several_networks_that_does_not_fit_is_named(three):
    with pytest.raises(ArchitectureMismatchError, match=r"'model_a' \(model_a\) and 'model_d' \(model_b\): The two"):
        merge(*three, nn.Linear(2, 2))
    with pytest.raises(PartitionError, match="no layer 'fused'.*is partition, another option"):
        merge(*three, layers="fused")
    heads = [_Heads(heads) for heads in (2, 2, 4)]
    with pytest.warns(UserWarning, match=r"'model_c' \(model_b\) differ in more than .*: heads: 2 in model_a, 4"):
        merge(*heads)
