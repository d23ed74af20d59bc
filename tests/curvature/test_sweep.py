"""Claim: the sweep gives one answer however it is cut, and none that is wrong where it cannot follow a network."""

import gc
import math
import re
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import CASES
from networks import NETWORKS, randomized
from sweeping import assert_projections_agree, assert_sweep_agrees, layer_directions, swept
from torch import nn

from lmc_curvature import BatchLoss, Objective, project_hessian
from lmc_curvature.curvature import graph, op_rules, sweep
from lmc_curvature.curvature.projection import project_hessian_at
from lmc_curvature.errors import (
    CaptureError,
    DirectionError,
    FallbackWarning,
    MemoryBudgetError,
    OptionError,
    SweepError,
)
from lmc_curvature.forking.models import resnet20


def _objective(name, sizes=(6, 6, 3), **options):
    case = CASES[name]
    return Objective(case.model(), case.batches(sizes), **{**case.options, **options})


def _vectors(*sizes, features=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, features, generator=generator).double(), torch.randint(3, (n,), generator=generator))
        for n in sizes
    ]


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

    monkeypatch.setattr(sweep, "capture", capture)
    return found


def _needed(objective, directions):
    """The least budget, in GiB, according to the refusal of a smaller one."""
    with pytest.raises(MemoryBudgetError) as refusal:
        project_hessian(objective, {}, directions, memory_gib=1e-9)
    return float(re.search(r"need ([\d.e+-]+) GiB", str(refusal.value))[1])


# --- However it is cut


@pytest.mark.parametrize("name", ["conv, interpolate", "attention", "LSTM", "tied weights"])
def test_tiles_of_examples_change_nothing(name, tiles, monkeypatch):
    objective = _objective(name, (3, 3))
    directions = layer_directions(objective)
    monkeypatch.setattr(sweep, "_CACHE_BYTES", 2**40)
    whole = swept(objective, directions)
    assert set(tiles) == {3}
    tiles.clear()
    monkeypatch.setattr(sweep, "_CACHE_BYTES", 2.5 * _tangent_bytes(objective, directions))
    cut = swept(_objective(name, (3, 3)), directions)
    # The last one of a batch is smaller.
    assert set(tiles) == {2, 1}
    assert_projections_agree(cut, whole, relative=1e-12)


def _tangent_bytes(objective, directions):
    """What the tangents of one example take, according to the graph that was captured for three."""
    captured = (known.networks.get(3) for known in sweep._CAPTURED[objective].values())
    program = next(program for program in captured if program is not None)
    reach = program.state.reached(
        {
            node: frozenset(i for i, direction in enumerate(directions.values()) if entry in direction)
            for entry, node in program.entries.items()
        }
    )
    return program.rest.tangent_bytes(reach, len(directions)) / 3


@pytest.mark.parametrize("name", ["conv, interpolate", "conv, batch", "LayerNorm and GELU", "dict batches"])
def test_blocks_of_directions_change_nothing(name):
    directions = layer_directions(_objective(name))
    whole = swept(_objective(name, (4, 4)), directions)
    least = _needed(_objective(name, (4,)), directions)
    together = set()
    for factor in (1.01, 1.5):
        objective = _objective(name, (4, 4))
        assert_projections_agree(swept(objective, directions, memory_gib=factor * least), whole, relative=1e-12)
        together |= {known.directions for known in sweep._CAPTURED[objective].values()}
    assert min(together) == 2


@pytest.mark.parametrize(
    ("weights", "ignored"),
    [([0.2, 1.0, 3.0], -100), (None, 0), ([0.2, 1.0, 3.0], 2)],
    ids=["weighted", "ignoring", "both"],
)
def test_losses_that_weigh_examples_are_cut_right(weights, ignored, tiles, monkeypatch):
    monkeypatch.setattr(sweep, "_CACHE_BYTES", 1)
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
    program = weakref.ref(next(iter(sweep._CAPTURED[objective].values())).networks[3])
    assert program() is not None
    del objective
    gc.collect()
    assert program() is None


# --- Networks and losses of any form


class _Mixing(nn.Module):
    """Subtracts the mean over the batch, in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.second(x - x.mean(0))


class _Counting(_Mixing):
    """Divides by the number of examples."""

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)) / x.shape[0])


class _TimeFirst(_Mixing):
    """Returns time before examples, of which there are as many."""

    def forward(self, x):
        x = torch.stack([x, x.roll(1, 1), x.flip(1)], 1)
        return self.second(torch.tanh(self.first(x))).transpose(0, 1).cumsum(0)


class _Insisting(_Mixing):
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
    monkeypatch.setattr(sweep, "_CACHE_BYTES", 1)
    assert_sweep_agrees(Objective(randomized(make().double()), _vectors(size, size), loss_fn=loss_fn))
    assert tiles[-1] == size
    assert tiles[0] < size or make is _Insisting


def test_a_table_with_as_many_rows_as_there_are_examples(monkeypatch):
    class Table(_Mixing):
        def forward(self, inputs):
            return self.second(torch.tanh(self.first(inputs["x"] + inputs["table"].mean(0))))

    monkeypatch.setattr(sweep, "_CACHE_BYTES", 1)
    batches = [({"x": x, "table": x.flip(0).square()}, y) for x, y in _vectors(4, 4)]
    assert_sweep_agrees(Objective(randomized(Table().double()), batches))


class _Detaching(_Mixing):
    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.second(x * torch.sigmoid(x.detach()))


class _WithoutGraph(_Mixing):
    def forward(self, x):
        x = self.first(x)
        with torch.no_grad():
            scale = self.second(torch.tanh(x)).exp().mean(1, keepdim=True)
        return self.second(torch.tanh(x) / scale)


@pytest.mark.parametrize("make", [_Detaching, _WithoutGraph])
def test_what_torch_takes_for_a_constant_has_no_tangent(make):
    assert_sweep_agrees(Objective(randomized(make().double()), _vectors(4, 4, 3)))


def test_a_network_may_be_a_feature_extractor_without_graph_and_a_head():
    class Headed(_Mixing):
        def forward(self, x):
            with torch.no_grad():
                x = torch.tanh(self.first(x))
            return self.second(x)

    objective = Objective(randomized(Headed().double()), _vectors(4, 3))
    directions = layer_directions(objective)
    found = swept(objective, directions)
    assert_projections_agree(found, project_hessian(objective, {}, directions, method="hvp"), relative=1e-9)
    np.testing.assert_array_equal(found.curvature[0], 0)
    assert found.curvature[1, 1] > 1e-3


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class _Binarized(_Mixing):
    """Passes gradients straight through a sign."""

    def forward(self, x):
        return self.second(torch.sin(_Sign.apply(self.first(x)) + 0.5))


def test_a_gradient_of_its_own_is_left_to_autograd():
    objective = Objective(randomized(_Binarized().double()), _vectors(4, 4))
    directions = layer_directions(objective)
    with pytest.raises(
        CaptureError, match=r"autograd.Function has derivatives of its own.*in forward: return self.sec"
    ):
        project_hessian(objective, {}, directions, method="sweep")
    with pytest.warns(FallbackWarning, match="autograd.Function.*one Hessian-vector product a direction") as warned:
        found = project_hessian(objective, {}, directions)
    assert len(warned) == 1, "not one a batch"
    expected = project_hessian(objective, {}, directions, method="hvp")
    assert np.abs(expected.curvature).max() > 1e-3
    assert_projections_agree(found, expected, relative=0)


def test_unused_and_frozen_parameters_and_linear_directions():
    class Partly(_Mixing):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(2, 2)
            self.shift = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            # Shifting all logits alike leaves the softmax as it is.
            return self.second(torch.tanh(self.first(x))) + self.shift

    model = randomized(Partly().double())
    model.first.requires_grad_(False)
    objective = Objective(model, _vectors(4, 3))
    directions = layer_directions(objective)
    found = swept(objective, directions)
    assert_projections_agree(found, project_hessian(objective, {}, directions, method="hvp"), relative=1e-9)
    names = list(directions)
    assert abs(found.curvature[names.index("first"), names.index("first")]) > 1e-3
    np.testing.assert_array_equal(found.curvature[names.index("unused")], 0)
    np.testing.assert_allclose(found.curvature[names.index("shift")], 0, atol=1e-14)
    alone = swept(objective, [directions["unused"]])
    np.testing.assert_array_equal(alone.curvature, np.zeros((1, 1)))


def test_a_loss_without_curvature():
    objective = Objective(nn.Linear(5, 3).double(), _vectors(4, 3), loss_fn=lambda out, _: out.mean())
    np.testing.assert_array_equal(swept(objective, layer_directions(objective)).curvature, np.zeros((3, 3)))


class _Several(_Mixing):
    def forward(self, inputs):
        x = torch.tanh(self.first(inputs["x"]) * inputs["scale"][0])
        return {"logits": self.second(x), "features": x}


def test_dict_inputs_and_outputs():
    batches = [({"x": x, "scale": (x[:, :1].abs() + 0.5,)}, y) for x, y in _vectors(4, 4, 3)]

    def loss(output, target):
        return F.cross_entropy(output["logits"], target) + output["features"].square().mean()

    objective = Objective(randomized(_Several().double()), batches, loss_fn=loss)
    assert_sweep_agrees(objective)


def test_tuple_outputs():
    class Pair(_Mixing):
        def forward(self, x):
            features = torch.tanh(self.first(x))
            return self.second(features), features

    objective = Objective(
        randomized(Pair().double()), _vectors(4, 3), loss_fn=lambda out, y: F.cross_entropy(out[0], y) + out[1].var()
    )
    assert_sweep_agrees(objective)


class _Scalar(_Mixing):
    def forward(self, x):
        return self.second(torch.tanh(self.first(x))).square().mean()


class _Constant(_Mixing):
    def forward(self, x):
        return torch.tanh(self.second(self.first.bias)).expand(x.shape[0], -1)


class _EverySecond(_Mixing):
    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))[::2]


@pytest.mark.parametrize(
    ("make", "loss_fn"),
    [
        (_Scalar, lambda out, _: 1.5 * out),
        (_Constant, F.cross_entropy),
        (_EverySecond, lambda out, y: F.cross_entropy(out, y[::2])),
    ],
)
def test_outputs_that_do_not_belong_to_examples(make, loss_fn):
    objective = Objective(randomized(make().double()), _vectors(4, 3), loss_fn=loss_fn)
    directions = layer_directions(objective)
    found = swept(objective, directions)
    assert_projections_agree(found, project_hessian(objective, {}, directions, method="hvp"), relative=1e-9)
    assert np.abs(found.curvature[-1]).max() > 1e-3


@pytest.mark.parametrize("target", [None, 3, torch.tensor(0.3)])
def test_targets_that_do_not_belong_to_examples(target):
    batches = [(x, target) for x, _ in _vectors(4, 3)]
    loss = F.mse_loss if isinstance(target, torch.Tensor) else lambda out, y: (out - (y or 0)).square().mean()
    objective = Objective(randomized(_Mixing().double()), batches, loss_fn=lambda out, y: loss(out.sin(), y))
    assert_sweep_agrees(objective)


def test_a_loss_of_the_whole_network():
    loss = BatchLoss(lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]) + model.first.weight.pow(4).sum())
    assert_sweep_agrees(Objective(randomized(_Mixing().double()), _vectors(4, 3), loss_fn=loss))


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in CASES])
def test_networks_that_are_easy_to_get_wrong(name):
    case = NETWORKS[name]
    assert_sweep_agrees(Objective(case.model(), case.batches((3, 2)), **case.options))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("layers", ["module", "tensor"])
def test_cases(case, layers):
    objective = Objective(case.model(), case.batches((4, 4, 3)), **case.options)
    directions = layer_directions(objective, layers)
    found = swept(objective, directions)
    assert_projections_agree(found, project_hessian(objective, {}, directions, method="hvp"), relative=1e-9)


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
    ((x, y),) = _vectors(7)
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


# --- The check on itself


def _nothing(self, call, contributions):
    pass


_MUTATIONS = {
    "no curvature of log softmax": (op_rules.LogSoftmax, "contract", _nothing),
    "no curvature of products": (op_rules.Bilinear, "contract", _nothing),
    "no curvature of activations": (op_rules.Pointwise, "contract", _nothing),
    "tangents of activations passed on as they are": (
        op_rules.Pointwise,
        "push",
        lambda self, call: dict(call.tangents_of(call.node.args[0])),
    ),
    "tangents of sums lost": (op_rules.Affine, "push", lambda self, call: {}),
}


@pytest.mark.parametrize(("rule", "method", "broken"), _MUTATIONS.values(), ids=_MUTATIONS)
def test_a_broken_rule_is_found_out(rule, method, broken, monkeypatch):
    objective = _objective("conv, interpolate")
    directions = layer_directions(objective)
    expected = project_hessian(objective, {}, directions, method="hvp")
    monkeypatch.setattr(rule, method, broken)
    with pytest.raises(SweepError, match=r"along a random combination of the directions is \S+ on batch 0, and \S+ by"):
        project_hessian(objective, {}, directions, method="sweep")
    with pytest.warns(FallbackWarning, match="on batch 0.*Falling back on one Hessian-vector product a direction"):
        found = project_hessian(objective, {}, directions)
    assert_projections_agree(found, expected, relative=0)


def test_every_shape_of_batch_is_checked(monkeypatch):
    objective = _objective("LayerNorm and GELU", (4, 4, 3))
    directions = layer_directions(objective)
    contract = op_rules.LogSoftmax.contract

    def broken_for_three(self, call, contributions):
        if call.output.shape[0] != 3:
            contract(self, call, contributions)

    monkeypatch.setattr(op_rules.LogSoftmax, "contract", broken_for_three)
    with pytest.raises(SweepError, match="on batch 2"):
        project_hessian(objective, {}, directions, method="sweep")


def test_a_layer_that_is_small_beside_the_others_is_checked_too(monkeypatch):
    case = CASES["LayerNorm and GELU"]
    model = case.model()
    objective = Objective(model, case.batches())
    directions = layer_directions(objective)
    directions = {
        name: {entry: (1e-4 if name == "0" else 1.0) * tensor for entry, tensor in direction.items()}
        for name, direction in directions.items()
        if name != "everything"
    }
    contract = op_rules.Bilinear.contract

    def broken_for_the_first_layer(self, call, contributions):
        if "addmm" not in str(call.node.target) or call.value(2).shape[0] != 5:
            contract(self, call, contributions)

    push = op_rules.Bilinear.push

    def stretched(self, call):
        found = push(self, call)
        first = "addmm" in str(call.node.target) and call.value(2).shape[0] == 5
        return {i: 1.01 * tangent for i, tangent in found.items()} if first else found

    monkeypatch.setattr(op_rules.Bilinear, "contract", broken_for_the_first_layer)
    monkeypatch.setattr(op_rules.Bilinear, "push", stretched)
    with pytest.raises(SweepError):
        project_hessian(objective, {}, directions, method="sweep")


# --- Bad input


def test_a_budget_too_small_for_one_example_says_how_much_it_takes():
    objective = _objective("conv, interpolate")
    directions = layer_directions(objective)
    with pytest.raises(
        MemoryBudgetError, match=r"Two directions of one example need \S+ GiB, more than the budget of 1e-09 GiB: raise"
    ):
        project_hessian(objective, {}, directions, memory_gib=1e-9)
    least = _needed(objective, directions)
    swept(objective, directions, memory_gib=1.01 * least)
    with pytest.raises(MemoryBudgetError):
        project_hessian(objective, {}, directions, memory_gib=0.9 * least)


def test_a_budget_too_small_for_a_batch_that_cannot_be_cut():
    objective = _objective("conv, batch")
    with pytest.raises(
        MemoryBudgetError, match="Two directions of a batch of 6 examples need .*, or use smaller batches"
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

    class Ignoring(_Mixing):
        def forward(self, inputs):
            return self.second(torch.tanh(self.first(inputs[0])))

    objective = Objective(randomized(Ignoring().double()), [((x, Kind()), y) for x, y in _vectors(4)])
    with pytest.raises(CaptureError, match="the batch holds a Kind, which may change from batch to batch"):
        project_hessian(objective, {}, layer_directions(objective), method="sweep")
