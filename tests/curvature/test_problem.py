"""Claim: a problem is placed and checked once, before anything is computed."""

import math

import numpy as np
import pytest
import torch

from lmc_curvature import HessianOperator, Objective, project_hessian
from lmc_curvature.curvature.problem import Point, Problem, check_values
from lmc_curvature.errors import DirectionError, NonFiniteError, OptionError
from lmc_curvature.objective.batches import Batch
from tests.support.cases import CASES
from tests.support.networks import Watched


def _objective(name="LayerNorm and GELU"):
    case = CASES[name]
    return Objective(case.model(), case.batches(), **case.options)


def test_states_are_completed_and_directions_take_the_type_of_the_objective():
    objective = _objective()
    bias = {"0.bias": torch.ones(6)}
    problem = Problem.of(objective, [{"0.bias": torch.zeros(6)}, {}], {"a": bias, "b": {"0.weight": torch.ones(6, 5)}})
    assert problem.moved == {"0.bias", "0.weight"}
    assert problem.directions[0]["0.bias"].dtype == torch.float64
    first, second = problem.points
    assert not first.state["0.bias"].any()
    assert torch.equal(first.state["0.weight"], second.state["0.weight"])
    assert (first.place, second.place) == (" at state 1 of 2", " at state 2 of 2")


def test_states_with_names_are_called_by_them():
    problem = Problem.of(_objective(), {"here": {}, "there": {}}, [{"0.bias": torch.ones(6)}])
    assert [point.place for point in problem.points] == [" at here", " at there"]
    with pytest.raises(NonFiniteError, match="Entry '0.bias' of there has 6 of 6 values"):
        states = {"here": {}, "there": {"0.bias": torch.full((6,), math.nan)}}
        Problem.of(_objective(), states, [{"0.bias": torch.ones(6)}])


def test_a_single_state_has_no_place_to_name():
    (point,) = Problem.of(_objective(), [{}], [{"0.bias": torch.ones(6)}]).points
    assert point.place == ""


def test_a_state_that_is_not_finite_is_refused():
    with pytest.raises(NonFiniteError, match="Entry '0.bias' of the state has 6 of 6 values"):
        Problem.of(_objective(), [{"0.bias": torch.full((6,), math.nan)}], [{"0.bias": torch.ones(6)}])


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        ([], "no direction"),
        ({"all": {}}, "Direction 'all' moves no entry"),
        ({"a": {"0.wait": torch.ones(6, 5)}}, "Direction 'a'.*no entry '0.wait'.*did you mean '0.weight'"),
        ({"a": {"0.weight": torch.ones(5, 6)}}, r"Direction 'a'.*'0.weight' has shape \(5, 6\); expected \(6, 5\)"),
        ([{"0.bias": torch.ones(6, dtype=torch.int64)}], "Direction 0.*'0.bias' has type torch.int64.*floating-point"),
        ([{"0.bias": torch.ones(6, dtype=torch.complex64)}], "complex64.*floating-point"),
        ([{"0.bias": torch.full((6,), torch.inf)}], "Direction 0 has values in '0.bias' that are infinite"),
    ],
)
def test_bad_directions_are_named(directions, message, untyped):
    case = CASES["LayerNorm and GELU"]
    objective = Objective(case.model(), case.batches())
    with pytest.raises(DirectionError, match=message):
        Problem.of(objective, [{}], directions)


def test_a_direction_may_not_move_what_the_policy_keeps_fixed():
    case = CASES["conv, batch"]
    objective = Objective(case.model(), case.batches(), batch_norm="batch")
    with pytest.raises(DirectionError, match="'bn1.running_mean'.*batch_norm='batch'"):
        Problem.of(objective, [{}], [{"bn1.running_mean": torch.ones(4)}])


@pytest.mark.parametrize("budget", [0.0, -1.0, math.nan, "1", True, [2], np.float32(-1)])
def test_a_budget_is_a_positive_number(budget, untyped):
    with pytest.raises(OptionError, match=r"memory_gib=.*: expected a positive number of GiB"):
        Problem.of(_objective(), [{}], [{"0.bias": torch.ones(6)}], memory_gib=budget)
    with pytest.raises(OptionError, match=r"memory_gib=.*: expected a positive number of GiB"):
        HessianOperator(_objective()).to_dense(memory_gib=budget)


def test_a_budget_may_be_any_real_number(untyped):
    for budget in (1, 0.5, np.float32(2), np.int64(3), math.inf):
        problem = Problem.of(_objective(), [{}], [{"0.bias": torch.ones(6)}], memory_gib=budget)
        assert problem.memory_gib == budget


def test_bad_directions_are_refused_before_the_network_is_called():
    case = CASES["LayerNorm and GELU"]
    network = Watched(case.model())
    with pytest.raises(DirectionError, match="no entry 'network.0.wait'"):
        project_hessian(Objective(network, case.batches()), {}, [{"network.0.wait": torch.ones(6, 5)}])
    assert not network.calls


_BATCH, _POINT = Batch(3, 5, None), Point({}, " at state 2 of 2")


def test_values_that_are_not_finite_name_batch_and_state():
    zeros, infinite = np.zeros(2), np.diag([0.0, np.inf])
    check_values((1.0, zeros, np.zeros((2, 2))), _BATCH, _POINT)
    with pytest.raises(NonFiniteError, match=r"loss is nan at batch 3 \(5 examples\) at state 2 of 2"):
        check_values((math.nan, zeros, np.zeros((2, 2))), _BATCH, _POINT)
    with pytest.raises(NonFiniteError, match=r"curvature are not finite at batch 3 \(5 examples\) at state 2 of 2"):
        check_values((1.0, zeros, infinite), _BATCH, _POINT)


def test_what_a_direction_leaves_where_it_is_is_not_displaced():
    nothing, something = torch.zeros(6, 5), torch.zeros(6, 5)
    something[3, 2] = -1e-30
    directions = [{"0.weight": nothing, "0.bias": torch.ones(6)}, {"0.weight": something}]
    assert Problem.of(_objective(), [{}], directions[:1]).displaced == {"0.bias"}
    assert Problem.of(_objective(), [{}], directions).displaced == {"0.bias", "0.weight"}
    assert Problem.of(_objective(), [{}], [{"0.weight": nothing}]).displaced == {"0.weight"}


def test_the_entry_of_one_direction_among_many_that_is_not_finite_is_named():
    directions = {"fine": {"0.bias": torch.ones(6)}, "bad": {"0.bias": torch.ones(6), "0.weight": torch.ones(6, 5)}}
    directions["bad"]["0.weight"][1, 1] = math.nan
    with pytest.raises(DirectionError, match="Direction 'bad' has values in '0.weight' that are infinite or not"):
        Problem.of(_objective(), [{}], directions)
