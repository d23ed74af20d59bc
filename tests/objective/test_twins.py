"""Claim: two networks are one architecture if equal entries give them equal losses; else what differs is named."""

import enum
import functools
import threading
import warnings
from collections import deque
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmc_curvature import BatchLoss, Objective, measure_barrier, predict_barrier
from lmc_curvature.errors import ArchitectureMismatchError, UnsupportedModelError
from tests.support import helpers
from tests.support.cases import CASES
from tests.support.networks import AlwaysDropout, normalized_net, randomized, rng_states, untouched

CPU = torch.Generator().manual_seed(0)
X, Y = torch.randn(12, 8, generator=CPU, dtype=torch.float64), torch.arange(12) % 3
IMAGES = torch.randn(12, 2, 8, 8, generator=CPU, dtype=torch.float64)


class Attributed(nn.Module):
    """A linear layer whose outputs are changed by what its attributes say."""

    def __init__(self, **attributes):
        super().__init__()
        self.linear = nn.Linear(8, 3)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        h = self.linear(x * getattr(self, "mask", 1))
        h = getattr(self, "activation", torch.tanh)(h) * getattr(self, "scale", 1.0)
        for factor in getattr(self, "factors", ()):
            h = h * factor
        if hasattr(self, "scales") and h.max() > 1e6:
            h = h * float(self.scales[-1])
        return h.softmax(-1) if getattr(self, "kind", None) == "softmax" else h


def _mlp(*middle):
    return nn.Sequential(nn.Linear(8, 8), *middle, nn.Linear(8, 3))


def _convolution(channels=4, **options):
    return nn.Sequential(
        nn.Conv2d(2, channels, 3, **options), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3)
    )


def _grouped(groups):
    """A convolution whose weight has one shape for any number of groups."""

    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.groups, self.weight = groups, nn.Parameter(torch.randn(4, 2, 3, 3))
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            x = torch.cat([x, x.flip(1)][: self.groups], dim=1)
            return self.linear(F.conv2d(x, self.weight, groups=self.groups).mean((2, 3)))

    return Grouped()


def _encoder(heads=2, **options):
    layer = nn.TransformerEncoderLayer(4, heads, 8, batch_first=True, **options)
    return nn.Sequential(nn.Unflatten(1, (2, 4)), layer, nn.Flatten(), nn.Linear(8, 3))


MASK = torch.ones(8, dtype=torch.float64)
OTHER_MASK = torch.where(torch.arange(8) < 7, MASK, 0.0)

DIFFERENT = {
    "activation": (lambda: _mlp(nn.ReLU()), lambda: _mlp(nn.GELU()), ["module 1: ReLU in model_a, GELU in model_b"]),
    "approximation": (
        lambda: _mlp(nn.GELU()),
        lambda: _mlp(nn.GELU(approximate="tanh")),
        ["1.approximate: none in model_a, tanh in model_b"],
    ),
    "slope": (
        lambda: _mlp(nn.LeakyReLU(0.1)),
        lambda: _mlp(nn.LeakyReLU(0.11)),
        ["1.negative_slope: 0.1 in model_a, 0.11 in model_b"],
    ),
    "a module more": (
        lambda: nn.Sequential(nn.Linear(8, 3)),
        lambda: nn.Sequential(nn.Linear(8, 3), nn.Tanh()),
        ["module 1: nothing in model_a, Tanh in model_b"],
    ),
    "eps of LayerNorm": (
        lambda: _mlp(nn.LayerNorm(8)),
        lambda: _mlp(nn.LayerNorm(8, eps=1e-6)),
        ["1.eps: 1e-05 in model_a, 1e-06 in model_b"],
    ),
    "groups of a normalisation": (
        lambda: _mlp(nn.GroupNorm(2, 8)),
        lambda: _mlp(nn.GroupNorm(4, 8)),
        ["1.num_groups: 2 in model_a, 4 in model_b"],
    ),
    "eps of BatchNorm": (
        lambda: _mlp(nn.BatchNorm1d(8)),
        lambda: _mlp(nn.BatchNorm1d(8, eps=1e-3, momentum=0.5)),
        ["1.eps: 1e-05 in model_a, 0.001 in model_b"],
    ),
    "heads": (_encoder, lambda: _encoder(heads=4), ["1.self_attn.num_heads: 2 in model_a, 4 in model_b"]),
    "norm first": (_encoder, lambda: _encoder(norm_first=True), ["1.norm_first: False in model_a, True in model_b"]),
    "function": (
        _encoder,
        lambda: _encoder(activation=F.gelu, dropout=0.7),
        ["1.activation: relu in model_a, gelu in model_b"],
    ),
    "a number": (
        lambda: Attributed(scale=1.0),
        lambda: Attributed(scale=2),
        ["scale: 1.0 in model_a, 2 in model_b"],
    ),
    "a number that is missing": (Attributed, lambda: Attributed(scale=3), ["scale: None in model_a, 3 in model_b"]),
    "a word": (
        lambda: Attributed(kind="plain"),
        lambda: Attributed(kind="softmax"),
        ["kind: plain in model_a, softmax in model_b"],
    ),
    "a tuple": (
        lambda: Attributed(factors=(1.0, 2.0)),
        lambda: Attributed(factors=[1.0, 3.0]),
        [r"factors: \(1.0, 2.0\) in model_a, \(1.0, 3.0\) in model_b"],
    ),
    "a tensor": (lambda: Attributed(mask=MASK), lambda: Attributed(mask=OTHER_MASK), ["mask: its values differ"]),
    "a tensor's shape": (
        lambda: Attributed(mask=MASK),
        lambda: Attributed(mask=OTHER_MASK.expand(1, 8)),
        [r"mask: a tensor of shape \(8,\) in model_a, a tensor of shape \(1, 8\) in model_b"],
    ),
    "groups": (lambda: _grouped(1), lambda: _grouped(2), ["groups: 1 in model_a, 2 in model_b"]),
    "stride": (
        _convolution,
        lambda: _convolution(stride=2),
        [r"0.stride: \(1, 1\) in model_a, \(2, 2\) in model_b"],
    ),
    "padding": (
        lambda: _convolution(padding=1),
        lambda: _convolution(padding=1, padding_mode="circular"),
        ["0.padding_mode: zeros in model_a, circular in model_b"],
    ),
    "dilation": (
        _convolution,
        lambda: _convolution(dilation=2),
        [r"0.dilation: \(1, 1\) in model_a, \(2, 2\) in model_b"],
    ),
}  # fmt: skip
IMAGE_CASES = {"groups", "stride", "padding", "dilation"}
different = pytest.mark.parametrize("name", DIFFERENT)


def _pair(name):
    """Two networks and a batch, where the second has its own entries."""
    make_a, make_b, lines = DIFFERENT[name]
    x = IMAGES if name in IMAGE_CASES else X
    a, b = randomized(make_a().double(), 1), randomized(make_b().double(), 2)
    return a, b, [(x[:8], Y[:8])], lines


def _own_loss(network, batches):
    x, y = batches[0]
    with torch.no_grad():
        return F.cross_entropy(network.eval()(x), y).item()


@pytest.mark.check(after=3)
@different
def test_another_setting_is_refused_with_its_name_and_both_losses(name):
    a, b, batches, lines = _pair(name)
    with untouched(a, b), pytest.raises(ArchitectureMismatchError) as caught:
        Objective(a, batches, twins=[b]).loss()
    for line in lines:
        assert caught.match(f"\n  {line}\n")
    assert "momentum" not in str(caught.value)
    assert "dropout" not in str(caught.value)
    other = randomized(DIFFERENT[name][0]().double(), 2)
    own, shared = _own_loss(b, batches), _own_loss(other, batches)
    assert own != shared
    assert str(caught.value).startswith(
        "model_b computes something else than model_a: with its own entries its loss on the first batch is "
        f"{own:.8g}, and model_a's is {shared:.8g}. The two differ in\n"
    )


@pytest.mark.parametrize("silent", [0, 1])
def test_one_network_may_be_silent_about_a_setting(silent):
    networks = randomized(Attributed(scale=1.0), 1), randomized(Attributed(scale=2.0), 2)
    torch.nn.init.zeros_(networks[silent].linear.weight)
    torch.nn.init.zeros_(networks[silent].linear.bias)
    owner = ("its own", "model_a's")[silent]
    with pytest.raises(
        ArchitectureMismatchError, match=f"(?s)with {owner} entries its loss .*scale: 1.0 in model_a, 2.0"
    ):
        Objective(networks[0], [(X.float(), Y)], twins=networks[1:]).loss()


def test_what_a_network_writes_into_stays_as_it_was():
    class Writing(nn.Embedding):
        def forward(self, tokens):
            return super().forward(tokens).flatten(1)

    a, b = (randomized(nn.Sequential(Writing(7, 4, max_norm=norm), nn.Linear(8, 3)), 1) for norm in (None, 0.1))
    batch = torch.randint(7, (9, 2), generator=CPU), torch.arange(9) % 3
    objective = Objective(a, [batch], twins=[b])
    before = {name: tensor.clone() for name, tensor in objective.state().items()}
    with untouched(a, b), pytest.raises(ArchitectureMismatchError, match="0.max_norm: None in model_a, 0.1 in model_b"):
        objective.loss()
    torch.testing.assert_close(objective.state(), before, rtol=0, atol=0)


@pytest.mark.parametrize("compute", [predict_barrier, functools.partial(measure_barrier, alphas=3)])
@pytest.mark.parametrize("policy", ["interpolate", "batch", "recalibrate"])
def test_prediction_and_measurement_compare_under_every_policy(compute, policy):
    a, b = (randomized(_mlp(nn.BatchNorm1d(8, eps=eps)).double(), seed) for seed, eps in enumerate((1e-5, 1e-2)))
    batches = [(X[:8], Y[:8]), (X[8:], Y[8:])]
    with pytest.raises(ArchitectureMismatchError, match="1.eps: 1e-05 in model_a, 0.01 in model_b"):
        compute(a, b, batches, batch_norm=policy, progress=False)
    with pytest.raises(ArchitectureMismatchError, match="1.eps"):
        Objective(a, iter(batches[:1]), batch_norm="batch", twins=[b]).gradient()


@pytest.mark.check(after=3)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_networks_of_one_architecture_have_equal_losses(case):
    a, b = case.model(0), randomized(case.model(1), 3)
    rng = rng_states()
    with untouched(a, b):
        found = Objective(a, case.batches(), **case.options, twins=[b]).loss()
    assert rng_states() == rng
    assert found == Objective(a, case.batches(), **case.options).loss()


@pytest.mark.parametrize("norm", ["batch", "batch with activation", "instance"])
def test_the_statistics_that_are_estimated_again_are_those_of_each_state(norm):
    a, b = (randomized(normalized_net(norm).double(), seed) for seed in (1, 2))
    batches = [(IMAGES[:8, :, :5, :5], Y[:8]), (IMAGES[8:, :, :5, :5], Y[8:])]
    alone, with_twin = (Objective(a, batches, batch_norm="recalibrate", twins=twins) for twins in ((), (b,)))
    states = [alone.state(), {name: tensor.detach() for name, tensor in b.named_parameters()}]
    for expected, found in zip(alone.recalibrated(states), with_twin.recalibrated(states), strict=True):
        assert expected
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


EQUIVALENT = {
    "inplace": (lambda: _mlp(nn.ReLU()), lambda: _mlp(nn.ReLU(inplace=True))),
    "p of dropout": (lambda: _mlp(nn.Dropout(0.1)), lambda: _mlp(nn.Dropout(0.9))),
    "Identity for Dropout": (lambda: _mlp(nn.Dropout(0.1)), lambda: _mlp(nn.Identity())),
    "class of a layer": (lambda: nn.Linear(8, 3), lambda: _renamed(nn.Linear(8, 3), "Head")),
    "momentum": (lambda: _mlp(nn.BatchNorm1d(8)), lambda: _mlp(nn.BatchNorm1d(8, momentum=0.9))),
    "dropout of attention": (_encoder, lambda: _encoder(dropout=0.9)),
    "class of the network": (lambda: _mlp(nn.ReLU()), lambda: _renamed(_mlp(nn.ReLU()), "Net")),
    "a label": (lambda: Attributed(label="first"), lambda: Attributed(label="second", notes=[1, 2])),
    "padding of an embedding": (lambda: _token_net(padding_idx=0), lambda: _token_net(scale_grad_by_freq=True)),
    "a learning rate": (lambda: Trained(lr=0.1), lambda: Trained(lr=0.2)),
    "a counter": (lambda: Trained(steps=3), lambda: Trained(steps=700)),
    "a cache": (lambda: Trained(last=torch.zeros(2)), lambda: Trained(last=None)),
    "a record of calls": (lambda: Recording(), lambda: Recording([(2, 8)], {"calls": 1})),
    "checkpointing": (lambda: Trained(gradient_checkpointing=True), lambda: Trained(gradient_checkpointing=False)),
    "a class defined again": (lambda: Trained(), lambda: _defined_again()),
    "functions of torch": (lambda: Attributed(activation=F.relu), lambda: Attributed(activation=torch.relu)),
    "rates of dropout in a configuration": (
        lambda: Configured(SimpleNamespace(factor=2.0, attention_dropout=0.1, name_or_path="one")),
        lambda: Configured(SimpleNamespace(factor=2.0, attention_dropout=0.0, name_or_path="two")),
    ),
}  # fmt: skip


class Trained(nn.Module):
    """A network with what its training needs."""

    def __init__(self, lr=1.0, steps=0, last=None, gradient_checkpointing=False):
        super().__init__()
        self.linear, self.lr, self.steps, self.last = nn.Linear(8, 3), lr, steps, last
        self.gradient_checkpointing = gradient_checkpointing

    def forward(self, x):
        if self.training:
            self.steps += 1
        if self.last is None or self.gradient_checkpointing:
            self.last = x
        return self.linear(x)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Recording(nn.Module):
    """A network that keeps a record of its calls."""

    def __init__(self, shapes=(), counts=None):
        super().__init__()
        self.linear, self.shapes, self.counts = nn.Linear(8, 3), list(shapes), counts or {}

    def forward(self, x):
        self.shapes.append(tuple(x.shape))
        self.counts["calls"] = 1 + self.counts.get("calls", 0)
        return self.linear(x)


def _defined_again():
    network = Trained()
    copied = {name: value for name, value in vars(Trained).items() if name not in ("__dict__", "__weakref__")}
    network.__class__ = type("Trained", (nn.Module,), copied)
    return network


class Configured(nn.Module):
    """A network, each of whose modules reads one configuration, by attribute or by key."""

    def __init__(self, config):
        super().__init__()
        self.config, self.linear = config, nn.Linear(8, 3)
        self.block = nn.Identity()
        self.block.config = config

    def forward(self, x):
        held = self.config
        for name in ("inner", "rope"):
            held = getattr(held, name, None) or held
        factor = held["factor"] if isinstance(held, dict) else held.factor
        return self.linear(x) * factor


def _token_net(**options):
    return nn.Sequential(_Tokens(), nn.Embedding(7, 4, **options), nn.Flatten(), nn.Linear(32, 3))


class _Tokens(nn.Module):
    def forward(self, x):
        return (x * 10).long() % 7


class _OddTanh(nn.Module):
    def forward(self, x):
        return 1 - 2 / (torch.exp(2 * x) + 1)


def _renamed(network, name):
    network.__class__ = type(name, (type(network),), {})
    return network


@pytest.mark.check(after=9)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", EQUIVALENT)
def test_what_makes_no_difference_to_the_loss_is_nobodys_business(name, dtype):
    make_a, make_b = EQUIVALENT[name]
    a, b = randomized(make_a().to(dtype), 1), randomized(make_b().to(dtype), 2)
    batches = [(X.to(dtype), Y)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measured = measure_barrier(a, b, batches, alphas=3, progress=False)
    assert not measured.notes
    assert measured.ends()[0] == pytest.approx(_own_loss(a, batches), rel=1e-5)
    assert measured.ends()[1] == pytest.approx(_own_loss(b, batches), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_sum_in_another_order_is_said_to_show_nothing(dtype):
    a, b = (randomized(_mlp(activation).to(dtype), seed) for seed, activation in enumerate((nn.Tanh(), _OddTanh())))
    batches = [(X.to(dtype), Y)]
    with pytest.warns(UserWarning, match="module 1: Tanh in model_a, _OddTanh in model_b"):
        measured = measure_barrier(a, b, batches, alphas=3, progress=False)
    assert measured.ends()[1] == pytest.approx(_own_loss(b, batches), rel=1e-5)


class Kind(enum.Enum):
    TANH, SINE = 1, 2


@dataclass
class Options:
    factor: float = 1.0
    rope: Any = None
    more: dict = field(default_factory=dict)


CONFIGURATIONS = {
    "dict": (lambda factor: {"factor": factor}, r"config\['factor'\]"),
    "namespace": (lambda factor: SimpleNamespace(factor=factor), r"config\.factor"),
    "dataclass": (lambda factor: Options(factor=factor), r"config\.factor"),
    "nested": (lambda factor: Options(rope={"factor": factor}), r"config\.rope\['factor'\]"),
    "an object in an object": (lambda factor: SimpleNamespace(inner=Options(factor)), r"config\.inner\.factor"),
}


@pytest.mark.parametrize(("make", "where"), CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_configurations_are_looked_into(make, where):
    a, b = randomized(Configured(make(2.0)), 1), randomized(Configured(make(3.0)), 2)
    with pytest.raises(ArchitectureMismatchError, match=rf"differ in\n  {where}: 2.0 in model_a, 3.0 in model_b\nBoth"):
        Objective(a, [(X.float(), Y)], twins=[b]).loss()


def _defined(code, **values):
    """A function that was defined in a module with some values."""
    return eval(code, {"__name__": "a_module", **values})


FUNCTIONS = {
    "anonymous ones": (lambda h: h * 2.0, lambda h: h * 3.0, "its values differ"),
    "anonymous ones that call others": (lambda h: F.relu(h), lambda h: F.silu(h), "its values differ"),
    "of other defaults": (lambda h, by=2.0: h * by, lambda h, by=3.0: h * by, "its values differ"),
    "with others in them": (lambda h: (lambda z: z * 2.0)(h), lambda h: (lambda z: z * 3.0)(h), "its values differ"),
    "in comprehensions": (
        lambda h: sum(2.0 * z for z in [h]),
        lambda h: sum(3.0 * z for z in [h]),
        "its values differ",
    ),
    "of other modules' values": (
        _defined("lambda h: h * by", by=2.0),
        _defined("lambda h: h * by", by=3.0),
        "its values",
    ),
    "of other modules' functions": (
        _defined("lambda h: scaled(h)", scaled=lambda h: h * 2.0),
        _defined("lambda h: scaled(h)", scaled=lambda h: h * 3.0),
        "its values",
    ),
    "partial": (
        functools.partial(F.leaky_relu, negative_slope=0.1),
        functools.partial(F.leaky_relu, negative_slope=0.2),
        r"\(leaky_relu, \(\), \(\(negative_slope, 0.1\)\)\) in model_a, .*0.2",
    ),
}


@pytest.mark.parametrize(("first", "second", "line"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions_are_told_apart(first, second, line):
    a, b = randomized(Attributed(activation=first), 1), randomized(Attributed(activation=second), 2)
    with pytest.raises(ArchitectureMismatchError, match=f"differ in\n  activation: {line}"):
        Objective(a, [(X.float(), Y)], twins=[b]).loss()


class Heads(Attributed):
    """A network whose loss is of one of its outputs."""

    def __init__(self, form, **attributes):
        super().__init__(**attributes)
        self.form = form

    def forward(self, x):
        return self.form(self.linear(x), super().forward(x))


@dataclass
class Output:
    logits: Any
    more: Any = None


FORMS = {
    "tuple": (lambda logits, more: (logits, more), lambda output, y: F.cross_entropy(output[0], y)),
    "dict": (
        lambda logits, more: {"logits": logits, "hidden": [more.argmax(1), more]},
        lambda output, y: F.cross_entropy(output["logits"], y),
    ),
    "object": (lambda logits, more: Output(logits, more), lambda output, y: F.cross_entropy(output.logits, y)),
}


@pytest.mark.parametrize(("form", "loss_fn"), FORMS.values(), ids=FORMS)
def test_outputs_that_the_loss_is_not_of_are_compared(form, loss_fn):
    a, b = randomized(Heads(form, scale=2.0), 1), randomized(Heads(form, scale=3.0), 2)
    batches = [(X.float(), Y)]
    message = (
        "(?s)its own entries its outputs on the first batch are others than model_a's, although both losses are .*\n"
    )
    with pytest.raises(ArchitectureMismatchError, match=message + "  scale: 2.0 in model_a, 3.0 in model_b"):
        Objective(a, batches, loss_fn=loss_fn, twins=[b]).loss()
    same = randomized(Heads(form, scale=2.0), 2)
    assert Objective(a, batches, loss_fn=loss_fn, twins=[same]).loss() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_saturated_loss_hides_no_activation(dtype):
    networks = []
    for seed, activation in enumerate((nn.ReLU(), nn.SiLU())):
        network = randomized(_mlp(activation), seed).to(dtype)
        # The right class wins by a hundred: both losses are zero, or as good as.
        network[2].bias.data = torch.tensor([100.0, 0, 0], dtype=dtype)
        networks.append(network)
    batches = [(X.to(dtype), torch.zeros(12, dtype=torch.long))]
    with pytest.raises(ArchitectureMismatchError, match=r"its outputs .* differ in\n  module 1: ReLU in mod.*SiLU"):
        Objective(networks[0], batches, twins=networks[1:]).loss()


class Windowed(nn.Module):
    """Tokens that look at some tokens before them, through a function of their own file."""

    def __init__(self, window, kind=Kind.TANH):
        super().__init__()
        self.attn = nn.Module()
        self.attn.window, self.linear, self.kind = window, nn.Linear(2, 3), kind

    def forward(self, x):
        return self.linear(_attend(self.attn, x)).mean(1)


def _attend(module, x):
    places = torch.arange(x.shape[1])
    ages = places[:, None] - places
    scores = (x @ x.mT).masked_fill((ages < 0) | (ages >= module.window), -torch.inf)
    return scores.softmax(-1) @ x


def test_a_window_longer_than_the_first_sequences_is_said():
    a, b = randomized(Windowed(4), 1), randomized(Windowed(8, Kind.SINE), 2)
    short, long = torch.randn(6, 4, 2, generator=CPU), torch.randn(6, 9, 2, generator=CPU)
    differ = "attn.window: 4 in model_a, 8 in model_b"
    note = f"model_b is not built as model_a: {differ} (no difference shows in the first batch)"
    batches = [(short, Y[:6]), (long, Y[:6])]
    with pytest.warns(UserWarning) as caught:
        prediction = predict_barrier(a, b, batches, progress=False)
    assert sum(str(warning.message).startswith(note) for warning in caught) == 1
    assert prediction.notes == (note,)
    with pytest.warns(UserWarning, match="attn.window"):
        assert measure_barrier(a, b, batches, alphas=3, progress=False).notes == (note,)
    with pytest.raises(ArchitectureMismatchError, match=differ):
        Objective(a, batches[::-1], twins=[b]).loss()


class _Cap:
    """Limits what it is called with."""

    def __init__(self, bound):
        self.bound = bound

    def __call__(self, h):
        return self.apply(h)

    def apply(self, h):
        return h.clamp(max=self.bound)

    def hook(self, _module, _args, output):
        return self.apply(output)


class _SlottedCap:
    __slots__ = ("_bound",)

    def __init__(self, bound):
        self._bound = bound

    def __call__(self, h):
        return h.clamp(max=self._bound)


def _cap_of(most):
    def cap(h, *, bound=most):
        return h.clamp(max=bound)

    return cap


def _hooked(hook):
    network = Attributed()
    network.linear.register_forward_hook(hook)
    return network


def _capped(bound):
    return _hooked(lambda _module, _args, output: output.clamp(max=bound))


HIDDEN = {
    "a bound that is not reached": (
        lambda: _mlp(nn.ReLU()),
        lambda: _mlp(nn.ReLU6()),
        "module 1: ReLU in model_a, ReLU6",
    ),
    "an activation of what is positive": (
        lambda: nn.Sequential(_Positive(), nn.ReLU(), nn.Linear(8, 3)),
        lambda: nn.Sequential(_Positive(), nn.Identity(), nn.Linear(8, 3)),
        "module 1: ReLU in model_a, Identity in model_b",
    ),
    "a threshold": (
        lambda: _mlp(nn.Threshold(-9, 0)),
        lambda: _mlp(nn.Threshold(-8, 0)),
        "1.threshold: -9 in model_a, -8",
    ),
    "eps": (
        lambda: nn.Sequential(nn.GroupNorm(1, 8, eps=1e-5), nn.Linear(8, 3)),
        lambda: nn.Sequential(nn.GroupNorm(1, 8, eps=1.1e-5), nn.Linear(8, 3)),
        "0.eps: 1e-05 in model_a, 1.1e-05 in model_b",
    ),
    "a configuration": (
        lambda: Bounded(Options(more={"bound": 50})),
        lambda: Bounded(Options(more={"bound": 60}, rope="unread")),
        r"model_a: config.more\['bound'\]: 50 in model_a, 60 in model_b \(no",
    ),
    "a private attribute": (
        lambda: Bounded(bound=50),
        lambda: Bounded(bound=60),
        "_bound: 50 in model_a, 60 in model_b",
    ),
    "an object to call": (
        lambda: Attributed(activation=_Cap(bound=50)),
        lambda: Attributed(activation=_Cap(bound=60)),
        "activation.bound: 50 in model_a, 60 in model_b",
    ),
    "a method of an object": (
        lambda: Attributed(activation=_Cap(bound=50).apply),
        lambda: Attributed(activation=_Cap(bound=60).apply),
        "activation.bound: 50 in model_a, 60 in model_b",
    ),
    "an object with slots": (
        lambda: Attributed(activation=_SlottedCap(50)),
        lambda: Attributed(activation=_SlottedCap(60)),
        "activation._bound: 50 in model_a, 60 in model_b",
    ),
    "a hook's closure": (lambda: _capped(50), lambda: _capped(60), "linear.hook: its values differ"),
    "a hook that is an object": (
        lambda: _hooked(_Cap(bound=50).hook),
        lambda: _hooked(_Cap(bound=60).hook),
        r"linear.hook\[0\].bound: 50 in model_a, 60 in model_b",
    ),
    "a default of a keyword": (
        lambda: Attributed(activation=_cap_of(50)),
        lambda: Attributed(activation=_cap_of(60)),
        "activation: its values differ",
    ),
    "an enumeration": (
        lambda: Bounded(kind=Kind.TANH),
        lambda: Bounded(kind=Kind.SINE),
        "kind: Kind.TANH in model_a, Kind.S",
    ),
}


class _Positive(nn.Module):
    def forward(self, x):
        return x.abs()


class Bounded(nn.Module):
    """Outputs that may not be beyond a bound, and may be of a kind that makes a difference beyond it."""

    def __init__(self, config=None, bound=70, kind=None):
        super().__init__()
        self.linear, self.config, self._bound, self.kind = nn.Linear(8, 3), config or Options(), bound, kind

    @property
    def bound(self):
        return self.config.more.get("bound", self._bound)

    def forward(self, x):
        return self.linear(x).clamp(max=self.bound + (self.kind is Kind.SINE))


class Bound:
    """A bound with a method of its own."""

    def __init__(self, bound):
        self.bound = bound

    def apply(self, x):
        return x.clamp(max=self.bound)


class Helped(nn.Module):
    """Outputs that are bounded by a helper in another module, or by the methods of objects in a list."""

    def __init__(self, bound, *, by_objects):
        super().__init__()
        self.linear = nn.Linear(8, 3)
        self.bounds = [Bound(bound)] if by_objects else []
        self.options = SimpleNamespace(bound=70 if by_objects else bound)

    def forward(self, x):
        x = helpers.bounded(self.linear(x), self.options)
        for each in self.bounds:
            x = each.apply(x)
        return x


def _bounded(bound):
    """A network with children whose class bounds outputs, or does not."""

    class Bounded(Attributed):
        def forward(self, x):
            return super().forward(x).clamp(max=bound)

    return Bounded() if bound else Attributed()


def _clamp(h, limits):
    return h.clamp(max=limits["most"])


HIDDEN["a class with children"] = (
    lambda: _bounded(None),
    lambda: _bounded(70),
    r"module \(the network itself\): Attributed in model_a",
)
HIDDEN["an option in a dict of a partial function"] = (
    lambda: Attributed(activation=functools.partial(_clamp, limits={"most": 70})),
    lambda: Attributed(activation=functools.partial(_clamp, limits={"most": 80})),
    r"activation\['limits'\]\['most'\]: 70 in model_a, 80",
)
HELD = {
    "slice": (slice(0, 70), slice(0, 80)),
    "range": (range(70), range(80)),
    "deque": (deque([70]), deque([80])),
    "fraction": (Fraction(70), Fraction(80)),
    "decimal": (Decimal(70), Decimal(80)),
    "array of objects": (np.array(70, object), np.array(80, object)),
    "long list": ([70] * 1500, [70] * 1499 + [80]),
}
for each, (one, other) in HELD.items():
    HIDDEN[each] = (
        functools.partial(Attributed, scales=one),
        functools.partial(Attributed, scales=other),
        "scales: ",
    )
HIDDEN["a helper in another module"] = (
    lambda: Helped(70, by_objects=False),
    lambda: Helped(80, by_objects=False),
    "options.bound: 70 in model_a, 80",
)
HIDDEN["a method of an object in a list"] = (
    lambda: Helped(70, by_objects=True),
    lambda: Helped(80, by_objects=True),
    r"bounds\[0\].bound: 70 in model_a, 80",
)


@pytest.mark.parametrize(("make_a", "make_b", "line"), HIDDEN.values(), ids=HIDDEN)
def test_a_setting_that_does_not_show_is_said(make_a, make_b, line):
    a, b = randomized(make_a(), 1), randomized(make_b(), 2)
    objective = Objective(a, [(X.float(), Y)], twins=[b])
    with untouched(a, b), pytest.warns(UserWarning, match=f"^model_b is not built as .*{line}"):
        objective.loss()
    assert len(objective.notes) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective.loss()


def test_classes_of_one_name_are_told_apart_by_what_they_do():
    def define(bound, rate):
        class Edited(nn.Linear):
            def forward(self, x):
                return self.limit(super().forward(x))

            def limit(self, x):
                return x.clamp(max=bound)

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=rate)

        return Edited(8, 3)

    a, same, b, narrow = (randomized(define(*args), 1) for args in ((70, 1), (70, 2), (80, 1), (0.1, 1)))
    batches = [(X.float(), Y)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Objective(a, batches, twins=[same]).loss()
    with pytest.warns(UserWarning, match="model_a: limit: its values differ"):
        Objective(a, batches, twins=[b]).loss()
    with pytest.raises(ArchitectureMismatchError, match="differ in\n  limit: its values differ"):
        Objective(a, batches, twins=[narrow]).loss()


class Limited(nn.Linear):
    most = 70

    def forward(self, x):
        return self.limit(super().forward(x)).clamp(min=getattr(self, "least", -70))

    def limit(self, x):
        return x.clamp(max=self.most)


def _limited(**attributes):
    return type("Other", (Limited,), attributes)(8, 3)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: _limited(most=80), "module 1: Limited in model_a, Other in model_b"),
        (lambda: _limited(limit=lambda self, x: x), "module 1: Limited in model_a, Other in model_b"),
        (lambda: _set(_limited(), least=-80), "1.least: None in model_a, -80 in model_b"),
        (lambda: _limited(configure_optimizers=print), None),
    ],
)
def test_subclasses_differ_in_what_evaluation_reads(make, line):
    a, b = (randomized(nn.Sequential(nn.Tanh(), layer), seed) for seed, layer in enumerate((Limited(8, 3), make())))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Objective(a, [(X.float(), Y)], twins=[b]).loss()
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == (line is not None)
    assert not line or line in messages[0]


def _set(module, **attributes):
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def test_a_method_of_one_network_alone_is_named():
    a, b = randomized(Attributed(), 1), randomized(Attributed(), 1)
    plain = b.forward
    b.forward = lambda x: plain(x).clamp(max=99)
    with pytest.warns(UserWarning, match="model_a: forward: None in model_a, <lambda> in model_b"):
        Objective(a, [(X.float(), Y)], twins=[b]).loss()


def test_only_the_first_settings_that_do_not_show_are_listed():
    a, b = (nn.Sequential(nn.Linear(8, 3), *[nn.Threshold(bound, 0) for _ in range(5)]) for bound in (-90, -80))
    with pytest.warns(UserWarning, match=r"model_b; 3.threshold: -90 in .*, … and 2 more \(no difference shows"):
        Objective(a, [(X.float(), Y)], twins=[b]).loss()


def test_a_loss_near_zero_rounds_as_its_outputs_do():
    # Each example is classified with a margin of about 15: the loss is made of roundings of the logits.
    networks = []
    for seed, activation in enumerate((nn.Tanh(), _OddTanh())):
        network = randomized(_mlp(activation), seed)
        torch.nn.init.zeros_(network[2].weight)
        network[2].bias.data = torch.tensor([15.0, 0, 0]) + network[2].bias.data
        network[2].weight.data[0] = 0.1
        networks.append(network)
    batches = [(X.float(), torch.zeros(12, dtype=torch.long))]
    assert 0 < Objective(networks[0], batches, twins=networks[1:]).loss() < 1e-4


@pytest.mark.parametrize("fill", [-torch.inf, -1e9])
def test_outputs_that_stand_for_infinity_hide_nothing(fill):
    class Masked(Attributed):
        def forward(self, x):
            return super().forward(x).masked_fill(torch.arange(3) == 2, fill)

    a, b = randomized(Masked(scale=1.0).double(), 1), randomized(Masked(scale=1.1).double(), 2)
    with pytest.raises(ArchitectureMismatchError, match="scale: 1.0 in model_a, 1.1 in model_b"):
        Objective(a, [(X, Y % 2)], twins=[b]).loss()


def test_a_small_loss_is_compared_by_its_own_measure():
    a, b = randomized(Attributed(scale=1.0), 1), randomized(Attributed(scale=1.01), 2)
    with torch.no_grad():
        for network in (a, b):
            network.linear.weight.mul_(1e-5)
            network.linear.bias.mul_(1e-5)
    batches = [(X.float(), torch.zeros(12, 3))]
    with pytest.raises(ArchitectureMismatchError, match="scale"):
        Objective(a, batches, loss_fn=F.mse_loss, twins=[b]).loss()


def _quantized(seed, parts):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    config = dict.fromkeys(parts, torch.ao.quantization.default_dynamic_qconfig)
    return torch.ao.quantization.quantize_dynamic(network, config, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore")
def test_quantized_layers_must_be_equal():
    batches = [(X.float(), Y)]
    a, b = _quantized(0, ["0", "2"]), _quantized(1, ["0", "2"])
    with pytest.raises(
        ArchitectureMismatchError, match=r"0\._packed_params\._packed_params: its values differ"
    ) as caught:
        measure_barrier(a, b, batches, progress=False)
    assert "2._packed_params" in str(caught.value)
    assert "4" not in str(caught.value).split("differ in")[1]
    same = _quantized(0, ["0", "2"])
    randomized(same[4], 5)
    assert measure_barrier(a, same, batches, alphas=3, progress=False).ends()[1] > 0


class _Broken(Attributed):
    def forward(self, x):
        raise KeyError("tokens")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            _Broken,
            r"\(KeyError: 'tokens'\). The two differ in\n  module \(the network itself\): Attributed in model_a, _B",
        ),
        (lambda: Attributed(mask=torch.ones(5)), r"\(RuntimeError: .*mask: 1 in model_a, a tensor of shape \(5,\)"),
    ],
)
def test_a_network_that_cannot_be_evaluated_is_named(make, message):
    a = Attributed(mask=1)
    with pytest.raises(
        ArchitectureMismatchError, match="(?s)model_b cannot be evaluated on the first batch, .*" + message
    ):
        measure_barrier(a, make(), [(X.float(), Y)], alphas=3, progress=False)


def test_what_cannot_be_copied_is_named():
    b = Attributed()
    b.lock = threading.Lock()
    with pytest.raises(UnsupportedModelError, match="^model_b: Attributed cannot be copied"):
        measure_barrier(Attributed(), b, [(X.float(), Y)], alphas=3, progress=False)


def _scaled(factors):
    return _hooked(lambda _module, _args, output: factors[0] * output)


def test_without_a_setting_to_name_the_message_says_where_to_look():
    # What a closure holds in a list is not looked at.
    a, b = _scaled([1.0]), _scaled([2.0])
    with pytest.raises(
        ArchitectureMismatchError, match="No setting of their modules differs: look at forward, at hooks"
    ):
        Objective(a, [(X.float(), Y)], twins=[b]).loss()


def test_a_network_that_draws_is_refused():
    drawing = Attributed(activation=AlwaysDropout())
    with pytest.raises(
        ArchitectureMismatchError, match="module activation: nothing in model_a, AlwaysDropout in model_b"
    ):
        Objective(Attributed(), [(X.float(), Y)], twins=[drawing]).loss()


def test_entries_of_another_network_are_named():
    with pytest.raises(
        ArchitectureMismatchError, match=r"model_b has an entry 'linear.weight' of shape \(3, 8\), which"
    ):
        Objective(nn.Linear(8, 3), [(X.float(), Y)], twins=[Attributed()]).loss()


def test_networks_are_compared_once_and_a_loss_of_batches_too():
    calls = []

    def loss_fn(model, batch):
        calls.append(torch.is_grad_enabled())
        return F.cross_entropy(model(batch[0]), batch[1])

    a, b = Attributed(), Attributed()
    batches = [(X[:8].float(), Y[:8]), (X[8:].float(), Y[8:])]
    objective = Objective(a, batches, loss_fn=BatchLoss(loss_fn), twins=[b])
    counts = [(objective.loss(), len(calls))[1] for _ in range(2)]
    assert counts == [23, 25], (
        "two batches, a look at each, the first twice more, in halves twice, twice nearby, and before and after "
        "that, some of its examples, model_a itself before and beside its copy, and each network at both states"
    )
    assert calls[3:20] == [False] * 17
    b.scale = 3.0
    objective.loss()
    with pytest.raises(ArchitectureMismatchError, match="scale: None in model_a, 3.0 in model_b"):
        Objective(a, batches, loss_fn=BatchLoss(loss_fn), twins=[b]).loss()


def test_wrapped_networks_are_compared_by_what_they_wrap():
    a, b = Attributed(scale=1.0), Attributed(scale=2.0)
    with pytest.raises(ArchitectureMismatchError, match="scale: 1.0 in model_a, 2.0 in model_b"):
        measure_barrier(a, nn.DataParallel(b), [(X.float(), Y)], alphas=3, progress=False)


def test_a_list_has_ten_lines():
    a, b = (nn.Sequential(nn.Linear(8, 3), *[nn.LeakyReLU(slope) for _ in range(12)]) for slope in (0.9, 0.95))
    with pytest.raises(ArchitectureMismatchError, match=r"(?s)(  \d+\.negative_slope: [^\n]*\n){10}  … and 2 more"):
        Objective(a, [(X.float(), Y)], twins=[b]).loss()


class _Graph(nn.Module):
    """Convolves over a graph of forty nodes: it takes no fewer."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(4, 3)
        self.register_buffer("adjacency", torch.rand(40, 40, generator=torch.Generator().manual_seed(0)) / 40)

    def forward(self, x):
        return self.adjacency @ self.linear(x)


def test_networks_that_take_no_part_of_a_batch_are_compared_on_the_whole():
    batches = [(torch.randn(40, 4), torch.arange(40) % 3)]
    a, b = _Graph(0), _Graph(1)
    ends = measure_barrier(a, b, batches, progress=False).ends()
    expected = [F.cross_entropy(network(batches[0][0]), batches[0][1]).item() for network in (a, b)]
    assert ends == pytest.approx(expected, rel=1e-6)
    b.adjacency *= 2
    with pytest.raises(ArchitectureMismatchError):
        measure_barrier(a, b, batches, progress=False)
