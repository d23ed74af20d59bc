"""Claim: each operation goes by the rule that holds for it, and by autodiff where none does."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lmc_curvature.curvature.sweep.capture import capture
from lmc_curvature.curvature.sweep.plan import Plan
from lmc_curvature.curvature.sweep.rules.autodiff import ByAutodiff, FirstOrderByAutodiff
from lmc_curvature.curvature.sweep.rules.bilinear import PRODUCT
from lmc_curvature.curvature.sweep.rules.linear import Constant, Linear
from lmc_curvature.curvature.sweep.rules.pointwise import PiecewiseLinear, Pointwise
from lmc_curvature.curvature.sweep.rules.selection import Pick, Selection
from tests.support.sweeping import around, assert_sweep_agrees, layer_directions

VECTOR, IMAGE = (6,), (2, 5, 6)


def _rule(function, *active):
    """The rule of the last operation of a function of two tensors, of which some are active."""
    stage, _ = capture(function, [torch.rand(3, 4) + 0.1, torch.rand(3, 4) + 0.1], [])
    plan = Plan(stage, [stage.inputs[place] for place in active])
    return list(plan.rules.values())[-1]


def test_a_product_is_bilinear_and_its_curvature_needs_both_factors():
    stage, _ = capture(lambda a, b: a * b, [torch.ones(3), torch.ones(3)], [])
    (node,) = stage.operations
    both, one = Plan(stage, stage.inputs), Plan(stage, stage.inputs[:1])
    assert both.rules[node] is one.rules[node] is PRODUCT
    assert both.nonlinear == [node]
    assert one.nonlinear == []


def test_a_selection_gives_elements_and_places_of_which_one_is_picked():
    stage, _ = capture(lambda a: a.sort().values, [torch.rand(3, 4)], [])
    assert [type(rule) for rule in Plan(stage, stage.inputs).rules.values()] == [Selection, Pick]


@pytest.mark.parametrize(
    ("function", "active", "rule"),
    [
        (lambda a, b: a.sum(), [0], Linear),
        (lambda a, b: a.tanh(), [0], Pointwise),
        (lambda a, b: a.abs(), [0], PiecewiseLinear),
        (lambda a, b: torch.maximum(a, b), [0, 1], FirstOrderByAutodiff),
        (lambda a, b: torch.logaddexp(a, b), [0, 1], ByAutodiff),
        # Two forms of one operation.
        (lambda a, b: torch.div(a, b, rounding_mode="floor"), [0, 1], Constant),
        (lambda a, b: torch.div(a, 3), [0], Linear),
        # A rule that does not hold for these arguments.
        (lambda a, b: a**b, [0], Pointwise),
        (lambda a, b: a**b, [0, 1], ByAutodiff),
        (lambda a, b: a.sum() ** b, [0], ByAutodiff),
        (lambda a, b: a.index_select(1, b.argmax(1)), [0], Linear),
        (lambda a, b: torch.lerp(a, b, 0.3), [0, 1], Linear),
        (lambda a, b: torch.lerp(a, a, b), [0, 1], ByAutodiff),
    ],
)
def test_the_rule_of_an_operation(function, active, rule):
    found = _rule(function, *active)
    assert type(found) is rule


@pytest.mark.check(after=1)
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        # torch gives these a wrong second derivative, or none.
        (lambda: weight_norm(nn.Linear(6, 4)), VECTOR),
        (lambda: weight_norm(nn.Conv2d(2, 3, 2), dim=1), IMAGE),
        (nn.Hardsigmoid, VECTOR),
        (lambda: nn.Hardsigmoid(inplace=True), VECTOR),
    ],
    ids=["weight norm", "weight norm of another axis", "hard sigmoid", "hard sigmoid in place"],
)
def test_second_derivatives_that_torch_lacks_equal_differences_of_the_gradient(make, shape):
    objective = around(make(), shape)
    directions = layer_directions(objective)
    found = assert_sweep_agrees(objective, directions)
    state, h = objective.state(), 1e-4

    def gradient(step, direction):
        return objective.gradient({name: state[name] + step * tensor for name, tensor in direction.items()})

    for i, direction in enumerate(directions.values()):
        up, down = gradient(h, direction), gradient(-h, direction)
        for j, other in enumerate(directions.values()):
            difference = sum(((up[name] - down[name]) * tensor).sum().item() for name, tensor in other.items()) / (
                2 * h
            )
            assert found.curvature[i, j] == pytest.approx(difference, rel=1e-6, abs=1e-8)
