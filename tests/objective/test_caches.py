"""Claim: values that a network keeps are used at no other state than the one they were computed from."""

import copy
import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from lmc_curvature import BatchLoss, HessianOperator, Objective, measure_barrier, predict_barrier, project_hessian
from lmc_curvature.errors import NonFiniteError, UnsupportedModelError
from tests.support.networks import untouched

X, Y = torch.randn(24, 6, generator=torch.Generator().manual_seed(0)).double(), torch.arange(24) % 3


class FirstCall(nn.Linear):
    """Keeps what it computes at its first call in evaluation mode."""

    kept = None

    def forward(self, x):
        if self.kept is None or self.training:
            self.kept = F.normalize(self.weight, dim=1)
        return F.linear(x, self.kept, self.bias)


class InDict(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.store = {}

    def forward(self, x):
        if self.training:
            self.store.clear()
        if "weights" not in self.store:
            self.store["weights"] = [2 * self.weight.detach()]
        return F.linear(x, self.store["weights"][0], self.bias)


class InPlace(nn.Linear):
    """Writes into a tensor that was there before."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.ready, self.room = False, torch.zeros(sizes[1], sizes[0])

    def forward(self, x):
        if not self.ready or self.training:
            self.room.copy_(self.weight.detach().exp())
            self.ready = True
        return F.linear(x, self.room.to(x), self.bias)


class WithoutGradients(nn.Linear):
    """Keeps something only for evaluations without gradients, where no graph shows it."""

    kept = None

    def forward(self, x):
        if torch.is_grad_enabled():
            return F.linear(x, 2 * self.weight, self.bias)
        if self.kept is None or self.training:
            self.kept = 2 * self.weight
        return F.linear(x, self.kept, self.bias)


class UntilGradients(nn.Linear):
    """Keeps something from one evaluation without gradients to the next, and lets go of it in between."""

    kept = None

    def forward(self, x):
        if torch.is_grad_enabled():
            self.kept = None
        elif self.kept is None or self.training:
            self.kept = 2 * self.weight
        return F.linear(x, 2 * self.weight if self.kept is None else self.kept, self.bias)


class OfEverySecond(nn.Linear):
    """Computes what it keeps anew at every second call."""

    calls, kept = 0, None

    def forward(self, x):
        self.calls += 1
        if self.kept is None or self.calls % 2 == 0 or self.training:
            self.kept = 2 * self.weight
        return F.linear(x, self.kept, self.bias)


class OfMany(nn.Linear):
    """Uses what it keeps where there are many examples."""

    kept = None

    def forward(self, x):
        if len(x) <= 20:
            return super().forward(x)
        if self.kept is None or self.training:
            self.kept = self.weight.detach().clone()
        return F.linear(x, self.kept, self.bias)


class AtEval(nn.Linear):
    """Computes what it keeps where it is put into evaluation mode."""

    kept = None

    def train(self, mode=True):
        if self.training and not mode:
            self.kept = 2 * self.weight.detach()
        return super().train(mode)

    def forward(self, x):
        return F.linear(x, 2 * self.weight if self.training else self.kept, self.bias)


class AtEveryEval(AtEval):
    def train(self, mode=True):
        if not mode:
            self.kept = 2 * self.weight.detach()
        return nn.Linear.train(self, mode)


class ByVersion(nn.Linear):
    seen = None

    def forward(self, x):
        if self.seen != self.weight._version or self.training:
            self.seen, self.kept = self.weight._version, 2 * self.weight
        return F.linear(x, self.kept, self.bias)


class Memoized(nn.Linear):
    @functools.lru_cache  # noqa: B019 - this is what is looked for
    def doubled(self):
        return 2 * self.weight

    def forward(self, x):
        return F.linear(x, self.doubled(), self.bias)


def _network(layer, mode=False):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), layer(5, 3)).double().train(mode)


KEEPERS = {
    "2.kept": [FirstCall, WithoutGradients, UntilGradients, AtEval, AtEveryEval, ByVersion],
    "2.store": [InDict],
    "2.room": [InPlace],
}
keepers = pytest.mark.parametrize(("name", "layer"), [(name, layer) for name in KEEPERS for layer in KEEPERS[name]])


@pytest.mark.check(after=26)
@keepers
@pytest.mark.parametrize("mode", [False, True])
@pytest.mark.parametrize("called", ["never", "before", "before, without gradients"])
@pytest.mark.parametrize("computed", ["loss", "gradient", "Hessian"])
def test_a_tensor_that_is_kept_is_named(name, layer, mode, called, computed):
    network = _network(layer, mode)
    if called != "never":
        with torch.set_grad_enabled(called == "before"):
            network(X)
    objective = Objective(network, [(X, Y)])
    compute = {
        "loss": objective.loss,
        "gradient": objective.gradient,
        "Hessian": lambda: HessianOperator(objective).to_dense(),
    }[computed]
    with pytest.raises(UnsupportedModelError, match=f"keeps its tensor '{name}', which it has computed from its entr"):
        compute()


@keepers
@pytest.mark.parametrize("batch_norm", ["batch", "recalibrate"])
def test_what_is_kept_is_found_beside_normalisation(name, layer, batch_norm):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), layer(5, 3)).double()
    with untouched(network), pytest.raises(UnsupportedModelError, match=f"keeps its tensor '{name}'"):
        Objective(network, [(X, Y)], batch_norm=batch_norm).loss()


def _loss(network, _other, loader, **_options):
    return Objective(network, loader).loss()


def test_what_is_kept_is_found_where_batches_cannot_be_cut_and_in_measurements():
    def loss(model, batch):
        return F.cross_entropy(model(batch["x"])[batch["chosen"]], batch["y"])

    batch = {"x": X, "chosen": torch.tensor([3, 20]), "y": torch.tensor([0, 1])}
    with pytest.raises(UnsupportedModelError, match=r"keeps its tensor '2\.kept'"):
        Objective(_network(FirstCall), [batch], loss_fn=BatchLoss(loss)).loss()
    with pytest.raises(UnsupportedModelError, match=r"keeps its tensor '2\.kept'"):
        measure_barrier(_network(FirstCall), _network(FirstCall), [(X, Y)], progress=False)


@pytest.mark.parametrize("compute", [_loss, measure_barrier, predict_barrier])
def test_what_is_kept_for_many_examples_is_found(compute):
    with pytest.raises(UnsupportedModelError, match=r"keeps its tensor '2\.kept'"):
        compute(_network(OfMany), _network(OfMany), [(X, Y)], progress=False)


def test_what_is_kept_elsewhere_is_found_and_not_named():
    with pytest.raises(UnsupportedModelError, match="keeps something, which it has computed from its entries"):
        Objective(_network(Memoized), [(X, Y)]).loss()


@pytest.mark.parametrize("calls", range(4))
def test_what_was_kept_nearby_is_not_used_at_the_first_state(calls):
    network = _network(OfEverySecond)
    for _ in range(calls):
        network(X)
    with pytest.raises(UnsupportedModelError, match="keeps (something|its tensor '2.kept')"):
        Objective(network, [(X, Y)]).loss()


# --- No alarm


class Tables(nn.Linear):
    """Keeps what depends on no entry, and for inspection what it overwrites at every call."""

    positions = None

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.tables, self.seen, self.calls = {}, [], 0

    def forward(self, x):
        if self.positions is None:
            self.positions = torch.arange(x.shape[1]) / 10
        self.tables.setdefault(x.shape[1], torch.cos(torch.arange(x.shape[1])))
        self.attention, self.calls = torch.softmax(x * self.weight[0], -1), self.calls + 1
        self.seen = [self.attention.detach(), 2 * self.weight]
        return F.linear(x * self.attention + self.positions * self.tables[x.shape[1]], self.seen[1] / 2, self.bias)


class Schedule(nn.Linear):
    """Has a temperature that training changes, as a tensor of its own."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.temperature = torch.tensor(2.0)

    def forward(self, x):
        if self.training:
            self.temperature = self.temperature * 0.9
        return super().forward(x) / self.temperature


class MovingMean(nn.Linear):
    """Normalises by a mean over its inputs that is no buffer."""

    mean = torch.zeros(())

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean().detach()
        return super().forward(x - self.mean)


class ClearedByTraining(nn.Linear):
    """Keeps a table of constants in evaluation mode only."""

    table = None

    def train(self, mode=True):
        self.table = None if mode else torch.linspace(0, 1, self.in_features)
        return super().train(mode)

    def forward(self, x):
        return super().forward(x if self.table is None else x + self.table)


HARMLESS = [Tables, Schedule, MovingMean, ClearedByTraining]


@pytest.mark.check(after=4)
@pytest.mark.parametrize("layer", HARMLESS)
@pytest.mark.parametrize("mode", [False, True])
@pytest.mark.parametrize("called", [False, True])
def test_what_changes_nothing_is_kept_in_peace(layer, mode, called):
    network = _network(layer, mode)
    if called:
        network(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective = Objective(network, [(X, Y)])
        gradient, loss = objective.gradient(), objective.loss()
    # torch's own, of the network in evaluation mode.
    network.eval()
    expected = F.cross_entropy(network(X), Y)
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    names, parameters = zip(*network.named_parameters(), strict=True)
    for name, own in zip(names, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(gradient[name], own, rtol=1e-9, atol=1e-12)


def test_a_pruned_network_that_was_called_holds_nothing_that_is_used():
    network = _network(nn.Linear)
    prune.l1_unstructured(network[2], "weight", 0.4)
    network(X)
    assert Objective(network, [(X, Y)]).loss() == pytest.approx(F.cross_entropy(network(X), Y).item(), rel=1e-12)


def test_bad_data_are_no_reason_to_suspect_what_is_kept():
    network, bad = _network(Tables), X.clone()
    network(X)
    bad[3] = torch.nan
    with pytest.raises(NonFiniteError, match="loss is nan at batch 0"):
        Objective(network, [(bad, Y)]).loss()


def test_the_check_leaves_network_and_generators_alone():
    network = _network(Tables, mode=True)
    with untouched(network):
        Objective(network, [(X, Y)]).gradient()
    assert (network[2].calls, network[2].positions, network[2].tables) == (0, None, {})


def test_curvature_with_tables_is_that_of_the_network_without():
    kept, plain = _network(ClearedByTraining), _network(nn.Linear)
    plain.load_state_dict(copy.deepcopy(kept.state_dict()))
    plain[1].register_forward_hook(lambda _module, _args, out: out + torch.linspace(0, 1, 5).to(out))
    directions = [{name: torch.randn_like(p) for name, p in plain.named_parameters()}]
    kept.train().eval()
    found, expected = (project_hessian(Objective(n, [(X, Y)]), {}, directions).curvature for n in (kept, plain))
    assert found == pytest.approx(expected, rel=1e-9)
