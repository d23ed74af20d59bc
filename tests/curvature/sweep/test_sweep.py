"""Claim: the sweep gives one answer however it is cut, and none that is wrong where it cannot follow a network."""

import gc
import math
import re
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmc_curvature import BatchLoss, Objective, project_hessian
from lmc_curvature.curvature.projection import project_hessian_at
from lmc_curvature.curvature.sweep import cache as captured
from lmc_curvature.curvature.sweep import program, sweep, tiling
from lmc_curvature.curvature.sweep.capture import graph
from lmc_curvature.errors import (
    CaptureError,
    DirectionError,
    LossError,
    MemoryBudgetError,
    OptionError,
)
from lmc_curvature.objective.batches import Batch
from lmc_curvature.sources.networks import resnet20
from tests.support.cases import CASES
from tests.support.networks import randomized
from tests.support.sweeping import (
    TwoLayers,
    assert_projections_agree,
    assert_sweep_agrees,
    layer_directions,
    swept,
    vectors,
)


def _objective(name, sizes=(6, 6, 3), **options):
    case = CASES[name]
    return Objective(case.model(), case.batches(sizes), **{**case.options, **options})


@pytest.fixture
def tiles(monkeypatch):
    """Numbers of examples that were swept together, as the test goes on."""
    found = []
    cut = sweep.Sweep._tiles

    def watched(*args):
        tiles = cut(*args)
        found.extend(tile.stop - tile.start for tile in tiles)
        return tiles

    monkeypatch.setattr(sweep.Sweep, "_tiles", watched)
    return found


@pytest.fixture
def captures(monkeypatch):
    """One entry for every graph that was captured, as the test goes on."""
    found = []

    def capture(*args):
        found.append(args)
        return graph.capture(*args)

    monkeypatch.setattr(program, "capture", capture)
    return found


def _needed(objective, directions):
    """The least budget, in GiB, according to the refusal of a smaller one."""
    with pytest.raises(MemoryBudgetError) as refusal:
        project_hessian(objective, {}, directions, memory_gib=1e-9)
    return float(re.search(r"about ([\d.e+-]+) GiB", str(refusal.value))[1])


# --- However it is cut


@pytest.mark.parametrize("name", ["conv, interpolate", "attention", "LSTM", "tied weights"])
def test_tiles_of_examples_change_nothing(name, tiles, monkeypatch):
    objective = _objective(name, (3, 3))
    directions = layer_directions(objective)
    monkeypatch.setattr(tiling, "_cache_bytes", lambda: 2**40)
    whole = swept(objective, directions)
    assert set(tiles) == {3}
    tiles.clear()
    monkeypatch.setattr(tiling, "_cache_bytes", lambda: 2.5 * _tangent_bytes(objective, directions))
    cut = swept(_objective(name, (3, 3)), directions)
    # The last one of a batch is smaller.
    assert set(tiles) == {2, 1}
    assert_projections_agree(cut, whole, relative=1e-12)


def _tangent_bytes(objective, directions):
    """What the tangents of one example take, according to the graph that was captured for three."""
    found = (known.networks.get(3) for known in captured._CAPTURED[objective].values())
    network = next(network for network in found if network is not None)
    reach = network.state.reached(
        {
            node: frozenset(i for i, direction in enumerate(directions.values()) if entry in direction)
            for entry, node in network.entries.items()
        }
    )
    return network.rest.tangent_bytes(reach, len(directions)) / 3


@pytest.mark.parametrize("name", ["conv, interpolate", "conv, batch", "LayerNorm and GELU", "dict batches"])
def test_blocks_of_directions_change_nothing(name):
    directions = layer_directions(_objective(name))
    whole = swept(_objective(name, (4, 4)), directions)
    least = _needed(_objective(name, (4,)), directions)
    together = set()
    for factor in (1.01, 1.5):
        objective = _objective(name, (4, 4))
        assert_projections_agree(swept(objective, directions, memory_gib=factor * least), whole, relative=1e-12)
        together |= {known.cut.directions for known in captured._CAPTURED[objective].values()}
    assert min(together) == 2


@pytest.mark.parametrize(
    ("weights", "ignored"),
    [([0.2, 1.0, 3.0], -100), (None, 0), ([0.2, 1.0, 3.0], 2)],
    ids=["weighted", "ignoring", "both"],
)
def test_losses_that_weigh_examples_are_cut_right(weights, ignored, tiles, monkeypatch):
    monkeypatch.setattr(tiling, "_cache_bytes", lambda: 1)
    loss = nn.CrossEntropyLoss(weight=torch.tensor(weights) if weights else None, ignore_index=ignored)
    assert_sweep_agrees(_objective("LayerNorm and GELU", loss_fn=loss))
    assert set(tiles) == {1}


def test_several_states_share_their_graphs(captures):
    case = CASES["conv, interpolate"]
    objective = Objective(case.model(), case.batches((4, 4)))
    directions = layer_directions(objective)
    states = [case.model(seed).state_dict() for seed in (0, 3)]
    together = project_hessian_at(objective, states, directions, method="sweep")
    assert len(captures) == 2, "one for the network, one for the loss"
    for state, projection in zip(states, together, strict=True):
        expected = project_hessian(objective, state, directions, method="hvp")
        assert_projections_agree(projection, expected, relative=1e-9)


def test_graphs_are_captured_once_for_each_shape(captures):
    objective = _objective("conv, interpolate", (4, 4, 3, 4, 3))
    directions = layer_directions(objective)
    swept(objective, directions)
    assert len(captures) == 4, "network and loss, for 4 and for 3 examples"
    swept(objective, layer_directions(objective, seed=1))
    swept(objective, directions, objective.state())
    assert len(captures) == 4
    # Entries that do not move are constants of the plan.
    swept(objective, [{"fc.bias": torch.ones(3)}])
    assert len(captures) == 8


def test_graphs_go_with_their_objective():
    objective = _objective("conv, interpolate", (3,))
    swept(objective, layer_directions(objective))
    network = weakref.ref(next(iter(captured._CAPTURED[objective].values())).networks[3])
    assert network() is not None
    del objective
    gc.collect()
    assert network() is None


class _Mixing(TwoLayers):
    """Subtracts the mean over the batch, in evaluation mode too."""

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.second(x - x.mean(0))


class _Counting(TwoLayers):
    """Divides by the number of examples."""

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)) / x.shape[0])


class _TimeFirst(TwoLayers):
    """Returns time before examples, of which there are as many."""

    def forward(self, x):
        x = torch.stack([x, x.roll(1, 1), x.flip(1)], 1)
        return self.second(torch.tanh(self.first(x))).transpose(0, 1).cumsum(0)


class _Insisting(TwoLayers):
    """Takes four examples at a time and no others."""

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)).view(4, 4) * torch.ones(4, 1))


@pytest.mark.parametrize(
    ("make", "size", "loss_fn"),
    [
        (_Mixing, 6, None),
        (_Counting, 6, None),
        (_TimeFirst, 3, lambda out, y: F.cross_entropy(out.transpose(0, 1)[:, -1], y)),
        (_Insisting, 4, None),
    ],
)
def test_networks_that_mix_examples_are_swept_whole(make, size, loss_fn, tiles, monkeypatch):
    monkeypatch.setattr(tiling, "_cache_bytes", lambda: 1)
    assert_sweep_agrees(Objective(randomized(make().double()), vectors(size, size), loss_fn=loss_fn))
    assert tiles[-1] == size
    assert tiles[0] < size or make is _Insisting


def test_a_table_with_as_many_rows_as_there_are_examples(monkeypatch):
    class Table(TwoLayers):
        def forward(self, inputs):
            return self.second(torch.tanh(self.first(inputs["x"] + inputs["table"].mean(0))))

    monkeypatch.setattr(tiling, "_cache_bytes", lambda: 1)
    batches = [({"x": x, "table": x.flip(0).square()}, y) for x, y in vectors(4, 4)]
    assert_sweep_agrees(Objective(randomized(Table().double()), batches))


# --- Against what is not autograd


@pytest.mark.parametrize("name", ["conv, interpolate", "conv, batch", "LayerNorm and GELU", "LSTM", "dict batches"])
def test_random_combinations_equal_second_differences_of_the_loss(name):
    objective = _objective(name)
    state, directions = objective.state(), layer_directions(objective)
    found = swept(objective, directions)
    rng = np.random.default_rng(0)
    for _ in range(3):
        coefficients = rng.standard_normal(len(directions))
        along = {entry: torch.zeros_like(tensor) for entry, tensor in state.items()}
        for coefficient, direction in zip(coefficients, directions.values(), strict=True):
            for entry, tensor in direction.items():
                along[entry] += coefficient * tensor

        def loss(step, along=along):
            return objective.loss({entry: state[entry] + step * along[entry] for entry in state})

        h = 2e-3
        # Fourth order, so that the differences' own error is far below the tolerance.
        slope = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)
        curvature = (16 * (loss(h) + loss(-h)) - (loss(2 * h) + loss(-2 * h)) - 30 * loss(0)) / (12 * h * h)
        assert coefficients @ found.slopes == pytest.approx(slope, rel=1e-7, abs=1e-9)
        assert coefficients @ found.curvature @ coefficients == pytest.approx(curvature, rel=1e-6, abs=1e-7)


def test_the_dense_hessian_of_a_small_network():
    model = randomized(nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.LayerNorm(4), nn.Linear(4, 3)).double())
    ((x, y),) = vectors(7)
    objective = Objective(model, [(x, y)])
    state = objective.state()
    shapes = [tensor.shape for tensor in state.values()]
    sizes = [tensor.numel() for tensor in state.values()]

    def loss(vector):
        parts = [part.view(shape) for part, shape in zip(vector.split(sizes), shapes, strict=True)]
        return F.cross_entropy(torch.func.functional_call(model, dict(zip(state, parts, strict=True)), (x,)), y)

    dense = torch.autograd.functional.hessian(loss, torch.cat([tensor.flatten() for tensor in state.values()]))
    units = [
        dict(zip(state, (part.view(s) for part, s in zip(unit.split(sizes), shapes, strict=True)), strict=True))
        for unit in torch.eye(sum(sizes), dtype=torch.float64)
    ]
    np.testing.assert_allclose(swept(objective, units).curvature, dense.numpy(), rtol=1e-9, atol=1e-12)


def test_single_precision_agrees_as_well_as_it_can():
    torch.manual_seed(0)
    model = resnet20().eval()
    objective = Objective(model, [(torch.randn(4, 3, 32, 32), torch.arange(4))])
    directions = layer_directions(objective, "fused")
    found = swept(objective, directions).curvature
    expected = project_hessian(objective, {}, directions, method="hvp").curvature
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    exact = project_hessian(Objective(model.double(), objective.loader), {}, directions, method="hvp").curvature
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


# --- Bad input


def test_a_budget_too_small_for_one_example_says_how_much_it_takes():
    objective = _objective("conv, interpolate")
    directions = layer_directions(objective)
    with pytest.raises(
        MemoryBudgetError,
        match=r"2 of 6 directions, 1 of 6 examples at a time, takes about \S+ GiB, more than the budget of 1e-09 GiB",
    ):
        project_hessian(objective, {}, directions, memory_gib=1e-9)
    least = _needed(objective, directions)
    swept(objective, directions, memory_gib=1.01 * least)
    with pytest.raises(MemoryBudgetError):
        project_hessian(objective, {}, directions, memory_gib=0.9 * least)


class _Image(nn.Module):
    """A small weight, and an output as large as the image for each of several classes."""

    def __init__(self):
        super().__init__()
        self.paint = nn.Conv2d(1, 32, 1)

    def forward(self, x):
        return self.paint(x).tanh()


def test_outputs_of_a_whole_batch_count_as_well():
    x = torch.randn(8, 1, 16, 16, dtype=torch.float64)
    objective = Objective(_Image().double(), [(x, torch.randint(32, (8, 16, 16)))])
    directions = {f"{number}": {"paint.bias": torch.randn(32, dtype=torch.float64)} for number in range(12)}
    whole = swept(objective, directions)
    output = 8 * 32 * 16 * 16 * 8
    least = _needed(objective, directions) * 2**30
    assert least > 6 * output, "the loss keeps values for a backward pass, and tangents for two directions"
    assert_projections_agree(swept(objective, directions, memory_gib=1.1 * least / 2**30), whole, relative=1e-12)
    together = {known.cut.directions for known in captured._CAPTURED[objective].values()}
    assert 12 in together
    assert min(together) < 12


def test_a_budget_too_small_for_a_batch_that_cannot_be_cut():
    objective = _objective("conv, batch")
    with pytest.raises(
        MemoryBudgetError, match="2 of 6 directions, 6 of 6 examples at a time, takes about .*, or use smaller batches"
    ):
        project_hessian(objective, {}, layer_directions(objective), memory_gib=1e-9)


@pytest.mark.parametrize("budget", [0, -1.0, math.nan])
def test_budgets_that_are_none(budget, untyped):
    objective = _objective("LayerNorm and GELU")
    with pytest.raises(OptionError, match=r"memory_gib=.*: expected a positive number of GiB"):
        project_hessian(objective, {}, [{"0.bias": torch.ones(6)}], memory_gib=budget)


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        ({"0.wait": torch.ones(6, 5)}, "no entry '0.wait'.*did you mean '0.weight'"),
        ({"0.weight": torch.ones(5, 6)}, r"'0.weight' has shape \(5, 6\); expected \(6, 5\)"),
    ],
)
def test_bad_directions_are_refused_before_anything_is_captured(direction, message, captures):
    with pytest.raises(DirectionError, match=message):
        project_hessian(_objective("LayerNorm and GELU"), {}, [direction], method="sweep")
    assert not captures


def test_a_batch_that_holds_what_is_no_tensor():
    class Kind:
        pass

    class Ignoring(TwoLayers):
        def forward(self, inputs):
            return self.second(torch.tanh(self.first(inputs[0])))

    objective = Objective(randomized(Ignoring().double()), [((x, Kind()), y) for x, y in vectors(4)])
    with pytest.raises(CaptureError, match="the batch holds a Kind, which may change from batch to batch"):
        project_hessian(objective, {}, layer_directions(objective), method="sweep")


class _Tokens(TwoLayers):
    """Gives more rows of output than it has examples."""

    def forward(self, x):
        return super().forward(torch.stack([x, x.flip(1), x * x], 1)).flatten(0, 1)


def test_an_output_may_have_more_rows_than_examples():
    net = randomized(_Tokens().double())
    objective = Objective(net, vectors(4, 3), loss_fn=_of_tokens)
    assert_sweep_agrees(objective)


def _of_tokens(output, target):
    return torch.nn.functional.cross_entropy(output, target.repeat_interleave(3))


def test_a_loss_of_the_network_itself_has_no_output():
    objective = Objective(TwoLayers().double(), vectors(4), loss_fn=BatchLoss(_whole))
    with pytest.raises(LossError, match="BatchLoss"):
        objective.output({}, Batch(0, 4, vectors(4)[0]))


def _whole(network, batch):
    return torch.nn.functional.cross_entropy(network(batch[0]), batch[1])
