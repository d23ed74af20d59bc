"""Claim: a network or a loss that is another function once it is copied is refused, at every call."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmc_curvature import BatchLoss, HessianOperator, Objective, measure_barrier, predict_barrier
from lmc_curvature.errors import UnsupportedModelError
from tests.support.networks import untouched

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(40, 4, generator=GENERATOR).double(), torch.arange(40) % 3
BATCHES = [(X[:24], Y[:24]), (X[24:], Y[24:])]
PAST = "reaches past copies"


class Tapped(nn.Module):
    """Its last layer takes what a hook, or a child, has kept of the first within the same call."""

    def __init__(self, way):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(10, 3)
        self.taps, self.tap = {}, None
        getattr(self, way)()

    def by_nested_function(self):
        def keep(_module, _args, output):
            self.taps["first"] = output

        self.first.register_forward_hook(keep)

    def by_pre_hook(self):
        # What it updates is no new input.
        self.first.register_forward_pre_hook(lambda _module, args: self.taps.update(first=args[0][:, [0, 1, 2, 3, 0]]))

    def by_default(self):
        self.first.register_forward_hook(lambda _m, _a, output, taps=self.taps: taps.update(first=output))

    def by_weak_reference(self):
        owner = weakref.ref(self)
        self.first.register_forward_hook(lambda _module, _args, output: setattr(owner(), "tap", output))

    def by_proxy(self):
        self.first.register_forward_hook(weakref.proxy(self).keep)

    def by_method(self):
        self.first.register_forward_hook(self.keep)

    def keep(self, _module, _args, output):
        self.tap = output

    def forward(self, x):
        h = torch.tanh(self.first(x))
        tap = self.taps["first"] if self.tap is None else self.tap
        return self.last(torch.cat([h, tap.cos()], 1))


def _pair(make):
    torch.manual_seed(0)
    return make().double().eval(), make().double().eval()


@pytest.mark.check(after=2)
@pytest.mark.parametrize("size", [24, 12])
@pytest.mark.parametrize("called", ["never", "on the data", "on other data", "on fewer"])
@pytest.mark.parametrize("way", ["nested_function", "pre_hook", "default", "weak_reference"])
def test_what_a_hook_keeps_for_its_network_alone_is_refused(way, called, size):
    pair = _pair(lambda: Tapped(f"by_{way}"))
    batches = list(zip(X.split(size), Y.split(size), strict=True))
    for network in pair if called != "never" else ():
        for x, _ in batches:
            with torch.no_grad():
                network({"on the data": x, "on other data": x.flip(0), "on fewer": x[:3]}[called])
    # One call may leave behind what the next then takes for its own.
    for _ in range(2):
        for compute in (
            lambda: Objective(pair[0], batches).loss(),
            lambda: HessianOperator(Objective(pair[0], batches)).to_dense(),
            lambda: measure_barrier(*pair, batches, alphas=3, progress=False),
            lambda: predict_barrier(*pair, batches, progress=False),
        ):
            with pytest.raises(UnsupportedModelError, match=PAST):
                compute()


def test_a_hook_that_is_a_method_is_copied():
    pair = _pair(lambda: Tapped("by_method"))
    with torch.no_grad():
        expected = sum(F.cross_entropy(pair[0](x), y).item() * len(y) / 40 for x, y in BATCHES)
    assert measure_barrier(*pair, BATCHES, alphas=3, progress=False).ends()[0] == pytest.approx(expected, rel=1e-12)


class Mode(nn.Module):
    """A function that asks for the mode of the network that it was made in."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.scale = lambda h: h if self.training else 3 * h

    def forward(self, x):
        return self.scale(self.layer(x))


def test_a_mode_that_is_read_by_a_closure_is_refused_where_it_matters():
    network = Mode().double()
    with pytest.raises(UnsupportedModelError, match=PAST):
        Objective(network, BATCHES).loss()
    expected = F.cross_entropy(network.eval()(X), Y).item()
    assert Objective(network, [(X, Y)]).loss() == pytest.approx(expected, rel=1e-12)


class Masked(nn.Module):
    """A mask of the inputs, which a closure reads."""

    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.fill = lambda h: torch.where(self.mask, h, 0)

    def forward(self, x):
        self.mask = x > 0
        return self.last(self.fill(self.layer(x)))


@pytest.mark.parametrize("examples", [5, 24])
def test_what_depends_on_the_data_alone_is_found(examples):
    network = Masked().double()
    network(X.flip(0)[:examples])
    with pytest.raises(UnsupportedModelError, match=PAST):
        Objective(network, [(X[:examples], Y[:examples])]).loss()


def _mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


class Penalized(nn.Module):
    """Cross-entropy, and the squares of the parameters of a module that it holds, or of a list of parameters."""

    def __init__(self, held, weight=None):
        super().__init__()
        self.held, self.cross_entropy = held, nn.CrossEntropyLoss(weight=weight)

    def forward(self, output, target):
        parameters = self.held if isinstance(self.held, tuple) else self.held.parameters()
        return self.cross_entropy(output, target) + sum(p.square().sum() for p in parameters)


class Kept:
    """What a layer has put out last."""

    def __init__(self, layer):
        layer.register_forward_hook(self.keep)
        self.output = torch.zeros(1)

    def keep(self, _module, _args, output):
        self.output = output


LOSSES = {
    "holds the network": lambda network: Penalized(network, torch.tensor([1.0, 2.0, 1.0])),
    "holds a layer": lambda network: Penalized(network[2]),
    "holds parameters": lambda network: Penalized(tuple(network.parameters())),
    "reads a hook": lambda network: _reading(Kept(network[0])),
    "is a method": lambda network: Penalized(network).forward,
    "is of batches": lambda network: BatchLoss(lambda model, batch: Penalized(network)(model(batch[0]), batch[1])),
}


def _reading(kept):
    return lambda output, target: F.cross_entropy(output, target) + kept.output.square().mean()


@pytest.mark.check(after=9)
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)
def test_a_loss_that_reaches_for_the_network_is_refused(make, dtype, trained):
    torch.manual_seed(0)
    pair = [_mlp().requires_grad_(trained) for _ in range(2)]
    loss_fn, data = make(pair[0]), [(x.float(), y) for x, y in BATCHES]
    before = [id(parameter) for parameter in pair[0].parameters()]
    for _ in range(2):
        with untouched(*pair), pytest.raises(UnsupportedModelError, match=f"{PAST}|of the network itself"):
            measure_barrier(*pair, data, loss_fn=loss_fn, metrics=("loss",), dtype=dtype, progress=False)
    assert [id(parameter) for parameter in pair[0].parameters()] == before


def test_a_loss_that_reads_what_forward_has_kept_says_model():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.last, self.balance = nn.Linear(4, 3), nn.Linear(3, 3), 0.0

        def forward(self, x):
            shares = self.gate(x).softmax(-1)
            self.balance = shares.mean(0).square().sum()
            return self.last(shares)

    network = Mixture().double()
    closure = BatchLoss(lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]) + network.balance)
    for loss_fn in (closure, lambda output, target: F.cross_entropy(output, target) + network.balance):
        with pytest.raises(UnsupportedModelError, match="BatchLoss.* with fn.model, batch"):
            Objective(network, [(X, Y)], loss_fn=loss_fn).loss()
    assert network.balance == 0.0
    loss_fn = BatchLoss(lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]) + model.balance, size=len)
    expected = (F.cross_entropy(network(X), Y) + network.balance).item()
    assert Objective(network, [(X, Y)], loss_fn=loss_fn).loss() == pytest.approx(expected, rel=1e-12)


def test_a_teacher_and_weights_of_classes_stay():
    network = _mlp()
    teacher, data = copy.deepcopy(network), [(X.float(), Y)]
    loss_fn = Penalized(teacher, torch.tensor([1.0, 2.0, 1.0]))
    for dtype in (None, torch.float64):
        found = Objective(network, data, loss_fn=loss_fn, dtype=dtype).loss()
        assert found == pytest.approx(loss_fn(network(X.float()), Y).item(), rel=1e-5)


class Recorded(nn.Module):
    """Remembers what it was called with, which changes nothing."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls, self.last = nn.Linear(4, 3), [], None

    def forward(self, x):
        self.calls.append(x.shape)
        self.last = x
        return self.layer(x)


def test_the_network_that_was_given_is_left_as_it_was():
    network = Recorded().double()
    network.train()
    x = X[:3]
    network(x)
    before = list(network.parameters())
    with untouched(network):
        HessianOperator(Objective(network, BATCHES)).to_dense()
    assert network.training
    assert network.last is x
    assert network.calls == [x.shape]
    assert all(now is then for now, then in zip(network.parameters(), before, strict=True))


def test_what_is_done_to_the_network_afterwards_changes_nothing():
    network = _mlp().double()
    objective = Objective(network, [(X, Y)])
    expected = F.cross_entropy(network(X), Y).item()
    network[1] = nn.ReLU()
    with torch.no_grad():
        network[0].weight.zero_()
    assert objective.loss() == pytest.approx(expected, rel=1e-12)
    network = Tapped("by_nested_function").double()
    objective = Objective(network, [(X, Y)])
    network.last.register_forward_hook(lambda _module, _args, output: 2 * output)
    with pytest.raises(UnsupportedModelError, match=PAST):
        objective.loss()


def test_a_network_that_is_gone_is_not_asked():
    objective = Objective(_mlp().double(), [(X, Y)])
    gc.collect()
    assert objective.loss() > 0
