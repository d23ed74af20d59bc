"""Claim: where the sweep is wrong, or cannot go, that is found out: it never gives a wrong answer without a word."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lmc_curvature import Objective, project_hessian
from lmc_curvature.curvature.projection.by_products import Products
from lmc_curvature.curvature.sweep import cache as captured
from lmc_curvature.curvature.sweep import tiling
from lmc_curvature.curvature.sweep.rules import bilinear as op_bilinear
from lmc_curvature.curvature.sweep.rules import table as op_rules
from lmc_curvature.errors import CaptureError, FallbackWarning, SweepError
from tests.support.cases import CASES
from tests.support.networks import randomized
from tests.support.sweeping import TwoLayers, assert_projections_agree, layer_directions, vectors


def _objective(name, sizes=(6, 6, 3), **options):
    case = CASES[name]
    return Objective(case.model(), case.batches(sizes), **{**case.options, **options})


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
    objective = Objective(randomized(_Binarized().double()), vectors(4, 4))
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


_MUTATIONS = {
    "no curvature of log softmax": (op_rules.LogSoftmax, "contract", _nothing),
    "no curvature of products": (op_bilinear.Bilinear, "contract", _nothing),
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
    with pytest.raises(SweepError, match=r"along direction \d+.* is \S+ on batch 0, and \S+ by"):
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
    contract = op_bilinear.Bilinear.contract

    def broken_for_the_first_layer(self, call, contributions):
        if "addmm" not in str(call.node.target) or call.value(2).shape[0] != 5:
            contract(self, call, contributions)

    push = op_bilinear.Bilinear.push

    def stretched(self, call):
        found = push(self, call)
        first = "addmm" in str(call.node.target) and call.value(2).shape[0] == 5
        return {i: 1.01 * tangent for i, tangent in found.items()} if first else found

    monkeypatch.setattr(op_bilinear.Bilinear, "contract", broken_for_the_first_layer)
    monkeypatch.setattr(op_bilinear.Bilinear, "push", stretched)
    with pytest.raises(SweepError):
        project_hessian(objective, {}, directions, method="sweep")


@pytest.mark.parametrize("place", range(3))
def test_a_tenth_of_one_operation_is_missed_in_no_direction(place, monkeypatch):
    objective = _objective("conv, interpolate")
    directions = layer_directions(objective, "tensor")
    contract, bent = op_bilinear.Bilinear.contract, []

    def lessened(self, call, contributions):
        bent.append(call)
        contract(
            self,
            dataclasses.replace(call, adjoint=0.9 * call.adjoint) if len(bent) == place + 1 else call,
            contributions,
        )

    monkeypatch.setattr(op_bilinear.Bilinear, "contract", lessened)
    with pytest.raises(SweepError, match="curvature along direction"):
        project_hessian(objective, {}, directions, method="sweep")
    assert len(bent) > place


class _Mixing(TwoLayers):
    """Subtracts the mean over the batch, in evaluation mode too."""

    def forward(self, x):
        return self.second(torch.tanh(self.first(x) - self.first(x).mean(0)))


@pytest.fixture
def recomputing(monkeypatch):
    """The sizes of batches that products were computed of, where memory is for two examples at a time only."""
    monkeypatch.setattr(
        captured, "cut", lambda *programs, size, whole, **_: tiling.Cut(size if whole else 2, 99, False)
    )
    sizes = []
    combination = Products.combination

    def watched(self, number, batch, coefficients):
        sizes.append(batch.size)
        return combination(self, number, batch, coefficients)

    monkeypatch.setattr(Products, "combination", watched)
    return sizes


class _Gated(TwoLayers):
    """Mixes examples by a weight that is zero."""

    def __init__(self):
        super().__init__()
        self.gate = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        return self.second(hidden + self.gate * hidden.mean(0))


def test_where_memory_is_short_a_tile_is_compared(recomputing):
    objective = _objective("conv, interpolate", (6, 6))
    directions = layer_directions(objective)
    found = project_hessian(objective, {}, directions, method="sweep")
    assert recomputing == [2]
    assert_projections_agree(found, project_hessian(objective, {}, directions, method="hvp"), relative=1e-9)


def test_a_broken_rule_is_found_out_in_a_tile(recomputing, monkeypatch):
    monkeypatch.setattr(op_rules.LogSoftmax, "contract", _nothing)
    objective = _objective("conv, interpolate", (6, 6))
    with pytest.raises(SweepError, match="curvature along direction"):
        project_hessian(objective, {}, layer_directions(objective), method="sweep")


def test_a_network_that_mixes_examples_is_found_out_where_a_tile_is_compared(recomputing):
    objective = Objective(randomized(_Mixing().double()), vectors(6, 6))
    directions = layer_directions(objective)
    found = project_hessian(objective, {}, directions, method="sweep")
    assert recomputing == [6, 6]
    assert_projections_agree(found, project_hessian(objective, {}, directions, method="hvp"), relative=1e-9)


def test_mixing_by_a_weight_of_zero_is_found_out_where_a_tile_is_compared(recomputing):
    model = randomized(_Gated().double())
    model.gate.data.zero_()
    objective = Objective(model, vectors(6, 6))
    directions = layer_directions(objective, "tensor")
    found = project_hessian(objective, {}, directions, method="sweep")
    assert recomputing == [6, 6]
    assert_projections_agree(found, project_hessian(objective, {}, directions, method="hvp"), relative=1e-9)


class _Neighbours(TwoLayers):
    """Adds up what is near in the input."""

    def forward(self, x):
        near = ((x[:, None] - x).norm(dim=-1) < 0.1).to(x.dtype)
        return self.second(torch.tanh(near @ self.first(x)))


class _Groups(TwoLayers):
    """Adds up what has the same mark, in a column of the input."""

    def forward(self, x):
        same = (x[:, :1] == x[:, 0]).to(x.dtype)
        return self.second(torch.tanh(same @ self.first(x)))


@pytest.mark.parametrize("network", [_Neighbours, _Groups])
@pytest.mark.parametrize("keeps", [True, False])
def test_mixing_that_only_a_later_batch_shows(network, keeps, monkeypatch):
    monkeypatch.setattr(captured, "cut", lambda *_, size, whole, **__: tiling.Cut(size if whole else 2, 99, keeps))
    (x, y), (other, _) = vectors(6, 6)
    objective = Objective(randomized(network().double()), [(x, y), (torch.cat([other[:3], other[:3]]), y)])
    directions = layer_directions(objective)
    found = project_hessian(objective, {}, directions, method="sweep")
    assert_projections_agree(found, project_hessian(objective, {}, directions, method="hvp"), relative=1e-9)


_LOSSES = {
    # The first tile has nothing to learn.
    "ignoring": lambda output, target: F.cross_entropy(output, torch.tensor([0, 0, 1, 2, 1, 2]), ignore_index=0),
    # Targets know how many examples there are.
    "pairing": lambda output, target: (output[torch.arange(6).flip(0)] - output.sin()).square().mean(),
}


@pytest.mark.parametrize("loss_fn", _LOSSES.values(), ids=_LOSSES)
def test_where_a_part_has_no_loss_the_batch_is_compared(loss_fn, recomputing):
    objective = Objective(randomized(TwoLayers().double()), vectors(6, 6), loss_fn=loss_fn)
    directions = layer_directions(objective)
    found = project_hessian(objective, {}, directions, method="sweep")
    assert recomputing[-1] == 6
    assert_projections_agree(found, project_hessian(objective, {}, directions, method="hvp"), relative=1e-9)
