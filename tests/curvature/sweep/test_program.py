"""Claim: a program computes what its function does, with the work that the state alone decides in the prelude."""

import torch

from lmc_curvature.curvature.sweep import BatchTree
from lmc_curvature.curvature.sweep.program import Program


def _numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _function(state, data):
    return torch.tanh(data["x"] @ (state["weight"] * state["gain"].exp())) + state["shift"]


_STATE = {"weight": _numbers(5, 3), "gain": _numbers(3, seed=1), "shift": _numbers(3, seed=2)}
_DATA = {"name": "a", "x": _numbers(4, 5, seed=3)}


def _names(nodes):
    return {str(node.target).split(".")[1] for node in nodes}


def test_a_program_computes_its_function_at_any_state_and_data():
    program = Program.of(_function, _STATE, BatchTree.of(_DATA), moved=frozenset({"weight"}))
    state = {name: 2 * tensor for name, tensor in _STATE.items()}
    data = {"name": "a", "x": _numbers(4, 5, seed=4)}
    values = program.evaluate(program.operands(state), BatchTree.of(data))
    torch.testing.assert_close(values[program.result].detach(), _function(state, data))


def test_the_prelude_is_what_the_state_alone_decides():
    program = Program.of(_function, _STATE, BatchTree.of(_DATA), moved=frozenset({"weight", "gain"}))
    assert _names(program.prelude.stage.operations) == {"exp", "mul"}
    assert _names(program.body.stage.operations) == {"mm", "tanh", "add"}
    # The product of weight and gain is curved, so its adjoint is needed; that of the shift is not.
    assert _names(program.body.needs_adjoint) == {"mul"}


def test_where_the_prelude_is_linear_no_adjoint_is_needed():
    program = Program.of(_function, _STATE, BatchTree.of(_DATA), moved=frozenset({"weight"}))
    assert program.body.needs_adjoint == []


def test_the_first_tensor_of_the_data_may_move():
    program = Program.of(
        lambda _, data: data[0].sin() * data[1], {}, BatchTree.of(_numbers(2, 3).unbind()), data_moves=True
    )
    assert program.argument in program.body.active
    assert program.body.needs_adjoint == [program.argument]
    assert program.constants == {}


def test_data_without_a_tensor_have_no_argument():
    program = Program.of(lambda state, data: state["weight"].sin(), _STATE, BatchTree.of("a"), moved=frozenset())
    assert program.argument is None
    values = program.evaluate(program.operands(_STATE), BatchTree.of("a"))
    torch.testing.assert_close(values[program.result], _STATE["weight"].sin())
