"""Claim: where the sweep is wrong, or cannot go, that is found out: it never gives a wrong answer without a word."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lmc_curvature import BatchLoss, Objective, project_hessian
from lmc_curvature.curvature.problem import Problem, Tiling
from lmc_curvature.curvature.projection import by_sweep, project_hessian_at
from lmc_curvature.curvature.sweep.rules import Stack
from lmc_curvature.curvature.sweep.rules.bilinear import Bilinear
from lmc_curvature.curvature.sweep.rules.linear import Sum
from lmc_curvature.curvature.sweep.rules.pointwise import Pointwise
from lmc_curvature.curvature.sweep.rules.softmax import LogSoftmax
from lmc_curvature.errors import CaptureError, FallbackWarning, SweepError, UnsupportedModelError
from tests.support.cases import CASES
from tests.support.mixing import ByAGate, ByCount, ByMarks, ByNearness, ByTheMean
from tests.support.networks import Watched, randomized
from tests.support.sweeping import (
    TwoLayers,
    assert_projections_agree,
    assert_sweep_agrees,
    compiled_batches,
    layer_directions,
    swept,
    vectors,
)

# All of them together take seconds.
_IN_TWOS = Tiling(2, 99, keeps_values=True)
# Where memory is short, the values of a tile are computed anew when it is swept.
_SHORT = Tiling(2, 99, keeps_values=False)


def _objective(name, sizes=(6, 6, 3)):
    case = CASES[name]
    return Objective(case.model(), case.batches(sizes), **case.options)


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class _Binarized(TwoLayers):
    """Passes gradients straight through a sign."""

    def forward(self, x):
        return self.second(torch.sin(_Sign.apply(self.first(x)) + 0.5))


def test_a_gradient_of_its_own_is_left_to_autograd():
    # A straight-through estimator, which is no derivative of the function.
    with pytest.raises(UnsupportedModelError, match="by autograd, and .* by differences of the loss"):
        project_hessian(
            Objective(randomized(_Binarized().double()), vectors(4, 4)), {}, [{"first.bias": torch.ones(4)}]
        )
    objective = Objective(randomized(_Binarized().double()), vectors(4, 4), witness=False)
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


def _nothing(self, call, contributions):
    pass


_sweep_log_softmax = LogSoftmax.sweep


def _without_curvature(self, call, contributions):
    return _sweep_log_softmax(self, dataclasses.replace(call, adjoint=None), contributions)


_MUTATIONS = {
    "no curvature of log softmax": (LogSoftmax, "sweep", _without_curvature),
    "no curvature of products": (Bilinear, "contract", _nothing),
    "no curvature of activations": (Pointwise, "contract", _nothing),
    "tangents of activations passed on as they are": (
        Pointwise,
        "push",
        lambda self, call: call.moved(0),
    ),
    "tangents of sums lost": (Sum, "push", lambda self, call: None),
}


@pytest.mark.check(after=1)
@pytest.mark.parametrize(("rule", "method", "broken"), _MUTATIONS.values(), ids=_MUTATIONS)
def test_a_broken_rule_is_found_out(rule, method, broken, monkeypatch):
    objective = _objective("conv, interpolate")
    directions = layer_directions(objective)
    expected = project_hessian(objective, {}, directions, method="hvp")
    monkeypatch.setattr(rule, method, broken)
    with pytest.raises(SweepError, match=r"along direction \d+.* is \S+ on batch 0, and \S+ by"):
        project_hessian(objective, {}, directions, method="sweep")
    with pytest.warns(FallbackWarning, match="on batch 0.*Falling back on one Hessian-vector product a direction"):
        found = project_hessian(objective, {}, directions)
    assert_projections_agree(found, expected, relative=0)


def test_every_shape_of_batch_is_checked(monkeypatch):
    objective = _objective("LayerNorm and GELU", (4, 4, 3))
    directions = layer_directions(objective)

    def broken_for_three(self, call, contributions):
        sweep = _without_curvature if call.output.shape[0] == 3 else _sweep_log_softmax
        return sweep(self, call, contributions)

    monkeypatch.setattr(LogSoftmax, "sweep", broken_for_three)
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
    contract = Bilinear.contract

    def broken_for_the_first_layer(self, call, contributions):
        if "addmm" not in str(call.node.target) or call.value(2).shape[0] != 5:
            contract(self, call, contributions)

    push = Bilinear.push

    def stretched(self, call):
        found = push(self, call)
        first = "addmm" in str(call.node.target) and call.value(2).shape[0] == 5
        return Stack(found.directions, 1.01 * found.tensors) if first else found

    monkeypatch.setattr(Bilinear, "contract", broken_for_the_first_layer)
    monkeypatch.setattr(Bilinear, "push", stretched)
    with pytest.raises(SweepError):
        project_hessian(objective, {}, directions, method="sweep")


@pytest.mark.parametrize("place", range(3))
def test_a_tenth_of_one_operation_is_missed_in_no_direction(place, monkeypatch):
    objective = _objective("conv, interpolate")
    directions = layer_directions(objective, "tensor")
    contract, calls = Bilinear.contract, []

    def lessened(self, call, contributions):
        calls.append(call)
        contract(
            self,
            dataclasses.replace(call, adjoint=0.9 * call.adjoint) if len(calls) == place + 1 else call,
            contributions,
        )

    monkeypatch.setattr(Bilinear, "contract", lessened)
    with pytest.raises(SweepError, match="curvature along direction"):
        project_hessian(objective, {}, directions, method="sweep")
    assert len(calls) > place


def _compared(network, batches, layers="module", *, tiling=None, **options):
    """The sizes of the batches of which products were computed, to compare a sweep that agrees with them all."""
    watched = Watched(network)
    objective = Objective(watched, batches, **options)
    # The objective's own checks take a derivative, too.
    objective.loss({})
    watched.calls.clear()
    directions = layer_directions(objective, layers)
    found = swept(objective, directions, tiling=tiling)
    sizes = watched.sizes("derivative")
    assert_projections_agree(found, project_hessian(objective, {}, directions, method="hvp"), relative=1e-9)
    return sizes


@pytest.mark.check(after=1)
@pytest.mark.parametrize(("size", "part"), [(6, 6), (15, 15), (16, 2), (47, 5), (200, 8)])
@pytest.mark.parametrize("name", ["conv, interpolate", "conv, batch"])
def test_products_are_of_an_eighth_of_a_batch_or_of_a_small_one(name, size, part):
    case = CASES[name]
    assert _compared(case.model(), case.batches((size, size)), **case.options) == [part]


def test_a_loss_that_calls_the_network_is_compared_on_an_eighth():
    loss = BatchLoss(lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
    assert _compared(randomized(TwoLayers().double()), vectors(24, 24), loss_fn=loss) == [3]


class _ForFew(TwoLayers):
    """Computes something else for few examples."""

    def forward(self, x):
        activation = torch.sin if len(x) < 10 else torch.tanh
        return self.second(activation(self.first(x)))


@pytest.mark.parametrize("loss_fn", [None, BatchLoss(lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))])
def test_a_part_of_other_operations_does_not_stand_for_the_whole(loss_fn):
    assert _compared(randomized(_ForFew().double()), vectors(24, 24), loss_fn=loss_fn) == [24]


@pytest.mark.check
@pytest.mark.parametrize("name", ["conv, interpolate", "conv, batch"])
def test_a_broken_rule_is_found_out_in_an_eighth(name, monkeypatch):
    monkeypatch.setattr(LogSoftmax, "sweep", _without_curvature)
    objective = _objective(name, (40,))
    with pytest.raises(SweepError, match="curvature along direction"):
        project_hessian(objective, {}, layer_directions(objective), method="sweep")


def test_a_graph_of_other_values_is_found_out(monkeypatch):
    objective = Objective(randomized(TwoLayers().double()), vectors(20))
    graph = by_sweep.sweep_batch

    def off(*arguments):
        read, result = graph(*arguments)
        return read, result * (1 + 1e-6)

    monkeypatch.setattr(by_sweep, "sweep_batch", off)
    with pytest.raises(SweepError, match="does not give the network's output on batch 0"):
        project_hessian(objective, {}, layer_directions(objective), method="sweep")


def test_where_tiles_are_small_a_tile_is_compared():
    case = CASES["conv, interpolate"]
    assert _compared(case.model(), case.batches((6, 6)), tiling=_SHORT) == [2]


def test_a_broken_rule_is_found_out_in_a_tile(monkeypatch):
    monkeypatch.setattr(LogSoftmax, "sweep", _without_curvature)
    objective = _objective("conv, interpolate", (6, 6))
    with pytest.raises(SweepError, match="curvature along direction"):
        swept(objective, layer_directions(objective), tiling=_SHORT)


@pytest.mark.parametrize(("size", "part"), [(6, 6), (40, 5)])
def test_a_network_that_mixes_examples_is_found_out_by_its_output(size, part):
    # No product of a tile: the values tell. Then of the batch, or of an eighth of it, as a whole.
    assert _compared(randomized(ByTheMean().double()), vectors(size, size), tiling=_SHORT) == [part]


@pytest.mark.parametrize(("size", "parts"), [(6, [2, 6]), (40, [2, 5])])
def test_mixing_by_a_weight_of_zero_is_found_out_after_a_tile_agreed(size, parts):
    model = randomized(ByAGate().double())
    model.gate.data.zero_()
    assert _compared(model, vectors(size, size), "tensor", tiling=_SHORT) == parts


class _FromAThreshold(ByAGate):
    """Mixes examples only where its gate is above a half."""

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.second(x + torch.relu(self.gate - 0.5) * x.mean(0))


def test_mixing_at_one_of_two_states_is_found_out():
    model = randomized(_FromAThreshold().double())
    model.gate.data.fill_(-1.0)
    objective = Objective(model, vectors(40, 40))
    there = {**objective.state(), "gate": torch.ones_like(model.gate)}
    directions = layer_directions(objective, "tensor")
    states = [objective.state(), there]
    expected = project_hessian_at(objective, states, directions, method="hvp")
    problem = dataclasses.replace(Problem.of(objective, states, directions), tiling=_IN_TWOS)
    with objective.one_pass() as batches:
        for batch in batches:
            for point, projection in zip(problem.points, expected, strict=True):
                _, _, curvature = by_sweep.project_by_sweep(problem, point, batch)
                np.testing.assert_allclose(curvature, projection.batch_curvatures[batch.index], atol=1e-9)


class _TimeFirst(TwoLayers):
    """Returns time before examples, of which there are as many."""

    def forward(self, x):
        x = torch.stack([x, x.roll(1, 1), x.flip(1)], 1)
        return self.second(torch.tanh(self.first(x))).transpose(0, 1).cumsum(0)


class _Insisting(TwoLayers):
    """Takes four examples at a time and no others."""

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)).view(4, 4) * torch.ones(4, 1))


@pytest.mark.check(after=1)
@pytest.mark.parametrize(
    ("make", "size", "loss_fn"),
    [
        (ByTheMean, 6, None),
        (ByCount, 6, None),
        (_TimeFirst, 3, lambda out, y: F.cross_entropy(out.transpose(0, 1)[:, -1], y)),
        (_Insisting, 4, None),
    ],
)
def test_networks_that_mix_examples_are_swept_whole(make, size, loss_fn):
    objective = Objective(randomized(make().double()), vectors(size, size), loss_fn=loss_fn)
    tiling = Tiling(1, 99, keeps_values=True)
    assert_sweep_agrees(objective, tiling=tiling)
    directions = layer_directions(objective)
    assert not any(compiled.is_tiled for compiled in compiled_batches(objective, directions, tiling=tiling))
    if make is not _Insisting:
        first = compiled_batches(objective, directions, tiling=tiling, whole=False)[0]
        assert first.is_tiled, "the batch was to be cut"


@pytest.mark.check(after=1)
@pytest.mark.parametrize("network", [ByNearness, ByMarks])
@pytest.mark.parametrize("tiling", [_IN_TWOS, _SHORT], ids=["kept", "short"])
def test_mixing_that_only_a_later_batch_shows(network, tiling):
    (x, y), (other, _) = vectors(6, 6)
    batches = [(x, y), (torch.cat([other[:3], other[:3]]), y)]
    assert_sweep_agrees(Objective(randomized(network().double()), batches), tiling=tiling)


_LOSSES = {
    # The first tile has nothing to learn.
    "ignoring": lambda output, target: F.cross_entropy(output, torch.tensor([0, 0, 1, 2, 1, 2]), ignore_index=0),
    # Targets know how many examples there are.
    "pairing": lambda output, target: (output[torch.arange(6).flip(0)] - output.sin()).square().mean(),
}


@pytest.mark.parametrize("loss_fn", _LOSSES.values(), ids=_LOSSES)
def test_where_a_part_has_no_loss_the_batch_is_compared(loss_fn):
    network = randomized(TwoLayers().double())
    assert _compared(network, vectors(6, 6), tiling=_SHORT, loss_fn=loss_fn)[-1] == 6
