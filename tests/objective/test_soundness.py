"""Claim: a network whose loss is not a function of its state is refused at the first batch, with what is at fault."""

import copy
import math
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lmc_curvature import (
    BatchLoss,
    GGNOperator,
    HessianOperator,
    Objective,
    layer_hessian,
    measure_barrier,
    project_hessian,
)
from lmc_curvature.errors import LossError, UnsupportedModelError
from tests.support.networks import NETWORKS, AlwaysDropout, StubbornDropout, untouched

VECTORS = NETWORKS["LayerNorm and GELU"]
X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3


class Noise(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        return x + self.draw()


DRAWING = {
    "functional dropout": AlwaysDropout,
    "dropout that stays on": StubbornDropout,
    "torch": lambda: Noise(lambda: torch.randn(())),
    "numpy": lambda: Noise(lambda: np.random.rand()),  # noqa: NPY002
    "random": lambda: Noise(random.random),
}
drawing = pytest.mark.parametrize("make", DRAWING.values(), ids=DRAWING)


@drawing
def test_the_drawing_module_is_named(make):
    layer = make()
    network = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"inner": layer, "unused": AlwaysDropout()})["inner"])
    network = nn.Sequential(network, nn.Linear(4, 3))
    with untouched(network), pytest.raises(UnsupportedModelError) as caught:
        Objective(network, [(X, Y)]).loss()
    assert str(caught.value).startswith(f"Module '0.1' ({type(layer).__name__}) draws random numbers")
    assert "Switch the randomness off" in str(caught.value)
    assert "training=self.training" in str(caught.value)


@drawing
def test_a_loss_that_draws_is_refused(make):
    noise, network = make(), nn.Linear(4, 3)
    for loss_fn in (
        lambda output, target: F.cross_entropy(noise(output), target),
        BatchLoss(lambda model, batch: F.cross_entropy(noise(model(batch[0])), batch[1])),
    ):
        with untouched(network), pytest.raises(UnsupportedModelError, match="^The loss draws random numbers"):
            Objective(network, [(X, Y)], loss_fn=loss_fn).gradient()


def test_a_network_that_draws_by_itself_is_refused():
    with pytest.raises(UnsupportedModelError, match="^The network draws random numbers"):
        Objective(Noise(lambda: torch.rand(6, 4)), [(X, Y)]).loss()


class _DrawingLoss(nn.Module):
    def forward(self, output, target):
        return F.cross_entropy(F.dropout(output), target)


def test_a_loss_module_that_draws_is_refused():
    with pytest.raises(UnsupportedModelError, match="^The loss_fn draws random numbers"):
        Objective(nn.Linear(4, 3), [(X, Y)], loss_fn=_DrawingLoss()).loss()


def test_noise_from_a_generator_of_its_own_is_refused():
    generator = torch.Generator().manual_seed(0)
    noise = nn.Linear(2, 2)
    noise.register_forward_hook(lambda _module, _args, output: output + torch.randn(2, generator=generator))
    with pytest.raises(UnsupportedModelError, match="a module draws from a generator of its own"):
        Objective(noise, [(torch.ones(3, 2), torch.zeros(3, dtype=torch.long))]).loss()


def test_randomness_is_looked_for_once():
    calls = []

    def loss_fn(output, target):
        calls.append(1)
        return F.cross_entropy(output, target)

    objective = Objective(VECTORS.model(), VECTORS.batches(), loss_fn=loss_fn)
    counts = [(objective.loss(), len(calls))[1] for _ in range(2)]
    assert counts == [46, 49], (
        "three batches, a look at each, the first twice more, twice nearby, and before and after that, each as a "
        "whole and in halves three times (the first also nearer to zero), and the later two with the first as a whole "
        "and both alone"
    )


class _ListOfWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.weights = [self.layer.weight]

    def forward(self, x):
        return F.linear(x, self.weights[0], self.layer.bias)


def _with_closure():
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 3))
    original = model[0].forward
    model[0].forward = lambda x: original(x)
    return model


@pytest.mark.parametrize(("make", "name"), [(_ListOfWeights, "layer.weight"), (_with_closure, "0.(weight|bias)")])
def test_a_network_that_reaches_past_the_state_is_refused(make, name):
    model = make().double()
    with untouched(model), pytest.raises(UnsupportedModelError, match=f"'{name}' of the network itself.*BatchLoss"):
        Objective(model, VECTORS.batches()).loss()


def test_a_loss_that_refers_to_the_network_is_refused_and_a_batch_loss_is_not():
    model = VECTORS.model()

    def penalty(network):
        return sum((parameter**2).sum() for parameter in network.parameters())

    with pytest.raises(UnsupportedModelError, match="instead of the state at hand.*loss_fn refers to it"):
        Objective(model, VECTORS.batches(), loss_fn=lambda o, y: F.cross_entropy(o, y) + penalty(model)).loss()
    loss_fn = BatchLoss(lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]) + penalty(net))
    objective = Objective(model, VECTORS.batches(), loss_fn=loss_fn)
    expected = Objective(model, VECTORS.batches()).loss() + penalty(model).item()
    assert objective.loss() == pytest.approx(expected, rel=1e-12)
    nothing = {entry: torch.zeros_like(tensor) for entry, tensor in objective.state().items()}
    assert objective.loss(nothing) == pytest.approx(math.log(3), rel=1e-6)


def test_another_network_in_the_loss_is_a_constant():
    teacher = VECTORS.model(9)
    wanted = teacher(VECTORS.batches()[0][0]).mean(0)
    student = Objective(VECTORS.model(), VECTORS.batches(), loss_fn=lambda out, _: ((out - wanted) ** 2).mean())
    assert student.gradient().keys() == student.state().keys()


def test_entries_changed_in_place_are_named():
    model = nn.Sequential(nn.Embedding(7, 4, max_norm=0.1), nn.Flatten(), nn.Linear(8, 3)).double()
    batches = [(torch.tensor([[1, 2], [3, 4]]), torch.tensor([0, 1]))]
    with untouched(model), pytest.raises(UnsupportedModelError, match="changes '0.weight' in place.*max_norm"):
        Objective(model, batches).loss(dict(model.named_parameters()))


def _tokens_loss(divide_by_all):
    def fn(model, batch):
        losses = F.cross_entropy(model(batch["x"]), batch["y"], reduction="none") * (batch["y"] > 0)
        return losses.mean() if divide_by_all else losses.sum() / (batch["y"] > 0).sum()

    return fn


def test_a_batch_loss_that_divides_by_what_its_size_does_not_count_is_warned_of():
    torch.manual_seed(0)
    network, batch = nn.Linear(4, 3), {"x": torch.randn(9, 4), "y": torch.tensor([0, 0, 0, 1, 2, 1, 2, 1, 2])}
    counted = BatchLoss(_tokens_loss(False), size=lambda batch: (batch["y"] > 0).sum())
    for loss_fn in (BatchLoss(_tokens_loss(True)), counted):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Objective(network, [batch], loss_fn=loss_fn).loss()
    with pytest.warns(UserWarning, match="depends on how the data are cut into batches.*size="):
        Objective(network, [batch], loss_fn=BatchLoss(_tokens_loss(False))).loss()
    # By batch statistics, halves are another matter.
    normalized = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Objective(normalized, [batch], loss_fn=BatchLoss(_tokens_loss(True)), batch_norm="batch").loss()


class Capping(nn.Module):
    """Writes into its inputs where they are large."""

    def forward(self, x):
        x[x.abs() > 1] *= 0.5
        return x


def test_networks_may_write_into_their_inputs():
    torch.manual_seed(0)
    networks = [nn.Sequential(Capping(), nn.Linear(4, 3)) for _ in range(2)]
    x, y = torch.randn(9, 4), torch.arange(9) % 3
    batches = [(x.clamp(-1, 1), y), (2 * x, y)]
    kept = [batch[0].clone() for batch in batches]
    found = measure_barrier(*networks, batches, alphas=5, progress=False).values()
    assert all(map(torch.equal, kept, (batch[0] for batch in batches)))
    for alpha, value in zip((0, 0.25, 0.5, 0.75, 1), found, strict=True):
        between = nn.Linear(4, 3)
        with torch.no_grad():
            for p, a, b in zip(between.parameters(), *(net[1].parameters() for net in networks), strict=True):
                p.copy_(a.lerp(b, alpha))
        expected = [F.cross_entropy(between(torch.where(z.abs() > 1, z / 2, z)), y).item() for z, _ in batches]
        assert value == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_a_closure_behind_a_reentrant_checkpoint_is_found():
    class Closed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)
            self.block = lambda h: torch.tanh(self.second(h))

        def forward(self, x):
            return checkpoint(self.block, self.first(x), use_reentrant=True)

    with pytest.raises(UnsupportedModelError, match="uses entry 'second.(weight|bias)' of the network itself"):
        Objective(Closed(), [(X, Y)]).gradient()


class _Reaching(nn.Module):
    """Its first layer is called through a closure, its normalisation too."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False)
        self.last = nn.Linear(5, 3)
        self.reach = lambda x: torch.tanh(self.norm(x))

    def forward(self, x):
        return self.last(self.reach(self.first(x)))


REACHING = {
    "model_a": lambda a, b: BatchLoss(lambda model, batch: F.cross_entropy(a(batch[0]), batch[1])),
    "model_b": lambda a, b: BatchLoss(lambda model, batch: F.cross_entropy(b(batch[0]), batch[1])),
    "both": lambda a, b: BatchLoss(lambda model, batch: F.cross_entropy(model(batch[0]) + b(batch[0]), batch[1])),
    "a penalty": lambda a, b: lambda o, y: F.cross_entropy(o, y) + sum(p.square().sum() for p in a.parameters()),
    "a written sum": lambda a, b: lambda o, y: F.cross_entropy(o, y) + torch.zeros(1).add_(b[0].bias[0])[0],
    "without a graph": lambda a, b: BatchLoss(
        lambda model, batch: F.cross_entropy(torch.no_grad()(a)(batch[0]), batch[1])
    ),
}


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("make", REACHING.values(), ids=REACHING)
def test_a_loss_that_uses_one_of_the_networks_itself_is_refused(make, trained):
    pair = [nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).requires_grad_(trained) for _ in range(2)]
    with pytest.raises(UnsupportedModelError, match=r"uses entry '\d.(weight|bias)' of (the|another) network itself"):
        measure_barrier(*pair, [(X, Y)], loss_fn=make(*pair), metrics=("loss",), alphas=3, progress=False)


@pytest.mark.parametrize("trained", [True, False])
def test_statistics_that_are_reached_by_a_closure_are_found(trained):
    network = _Reaching().requires_grad_(trained)
    with pytest.raises(UnsupportedModelError, match=r"uses entry 'norm.running_(mean|var)' of the network itself"):
        Objective(network, [(X, Y)]).loss()


def test_what_is_no_network_that_was_given_may_be_used():
    """A teacher, and shapes and types of the network itself."""
    network = nn.Linear(4, 3)
    teacher = copy.deepcopy(network)

    def distance(output, target):
        return F.mse_loss(output, teacher(X) + torch.zeros_like(network.weight)[0, 0] + network.bias.new_ones(()))

    expected = F.mse_loss(network(X), teacher(X) + 1).item()
    assert Objective(network, [(X, Y)], loss_fn=distance).loss() == pytest.approx(expected, rel=1e-6)


def test_data_may_be_an_entry_of_the_network():
    network = nn.Linear(4, 4)
    batch = (network.weight.detach(), torch.arange(4))
    expected = F.cross_entropy(network(batch[0]), batch[1]).item()
    assert Objective(network, [batch]).loss() == pytest.approx(expected, rel=1e-6)


def test_autocast_around_is_noted():
    objective = Objective(nn.Linear(4, 3), [(X, Y)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        objective.loss()
    assert objective.notes == ("computed under torch.autocast, in bfloat16 where it chooses to",)


class _Force(nn.Module):
    """The derivative of an energy in its input, with a graph in training mode alone, as force networks often have."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.outer(torch.tanh(self.inner(x))).sum()
            return torch.autograd.grad(energy, x, create_graph=self.training)[0]


def test_derivatives_of_a_loss_without_a_graph_are_not_zero_but_refused():
    torch.manual_seed(0)
    objective = Objective(_Force(), [(torch.randn(9, 4), torch.randn(9, 4))], loss_fn=F.mse_loss)
    asking = {
        "part of the Hessian": lambda: HessianOperator(objective, layers="inner").to_dense(),
        "GGN": lambda: GGNOperator(objective).to_dense(),
        "block": lambda: layer_hessian(objective, None, "inner"),
        "projection": lambda: project_hessian(objective, {}, [{"outer.bias": torch.ones(1)}], method="hvp"),
    }
    for ask in asking.values():
        with pytest.raises(LossError, match="does not depend on any entry"):
            ask()
    assert objective.loss() > 0


class _Constrained(nn.Linear):
    """Writes its entries past autograd before it uses them."""

    def __init__(self, write):
        super().__init__(4, 3)
        self.write = write

    def forward(self, x):
        self.write(self)
        return super().forward(x)


def _new_bias(layer):
    layer.bias.data = layer.bias.data.clamp(max=0.1)


CONSTRAINTS = {
    "new data": _new_bias,
    "in place": lambda layer: layer.weight.data.clamp_(-0.2, 0.2),
    "a row": lambda layer: layer.weight.detach()[0].zero_(),
    "NumPy": lambda layer: np.clip(layer.weight.detach().numpy(), 0, None, out=layer.weight.detach().numpy()),
}


@pytest.mark.parametrize("write", CONSTRAINTS.values(), ids=CONSTRAINTS)
def test_entries_that_are_written_past_autograd_are_named(write):
    networks = [_Constrained(write) for _ in range(2)]
    with torch.no_grad():
        networks[0].bias.fill_(0.5)
    with untouched(*networks), pytest.raises(UnsupportedModelError, match=r"changes '(weight|bias)' in place"):
        measure_barrier(*networks, [(X, Y)], progress=False)


@pytest.mark.parametrize("write", [CONSTRAINTS["in place"], CONSTRAINTS["new data"]])
def test_entries_that_are_written_elsewhere_alone_are_found(write):
    """At the first network nothing is to be written."""
    networks = [_Constrained(write) for _ in range(2)]
    with torch.no_grad():
        for parameter in networks[0].parameters():
            parameter.mul_(0.01)
        networks[1].weight.mul_(9)
        networks[1].bias.fill_(2.0)
    with pytest.raises(UnsupportedModelError, match="in place"):
        measure_barrier(*networks, [(X, Y)], progress=False)
    objective = Objective(networks[0], [(X, Y)])
    state = {name: parameter.detach().clone() for name, parameter in networks[1].named_parameters()}
    kept = {name: tensor.clone() for name, tensor in state.items()}
    with pytest.raises(UnsupportedModelError, match="in place"):
        objective.loss(state)
    assert all(torch.equal(state[name], kept[name]) for name in kept)
