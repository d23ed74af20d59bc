"""Claim: a plan knows what the directions reach, keeps no more tangents than it needs, and differentiates the rest."""

import pytest
import torch

from lmc_curvature.curvature.sweep.capture import capture
from lmc_curvature.curvature.sweep.plan import Plan
from lmc_curvature.curvature.sweep.propagation import adjoints_of, push
from lmc_curvature.curvature.sweep.rules import Contributions, stacked
from lmc_curvature.errors import CaptureError


def _plan(function, *sizes, active=None):
    """The plan of a function of vectors of the given sizes, of which all are active unless places are given."""
    stage, _ = capture(function, [torch.zeros(size, dtype=torch.float64) for size in sizes], [])
    places = range(len(sizes)) if active is None else active
    return Plan(stage, [stage.inputs[place] for place in places])


def _names(nodes):
    return [str(node.target).split(".")[1] for node in nodes]


def test_only_what_depends_on_the_active_inputs_has_a_rule():
    plan = _plan(lambda a, b: a.sin() * b.cos(), 3, 3, active=[0])
    assert _names(plan.rules) == ["sin", "mul"]
    assert _names(plan.nonlinear) == ["sin"]


def test_what_is_detached_or_counts_is_not_active():
    plan = _plan(lambda a: a.sin().detach() + a.argmax(), 3)
    assert _names(plan.rules) == ["sin"]
    assert plan.stage.outputs[0] not in plan.active


def test_directions_reach_what_reads_them():
    plan = _plan(lambda a, b: (a.sin() * b).cos(), 3, 3)
    first, second = plan.stage.inputs
    reached = plan.reached({first: frozenset({0}), second: frozenset({1, 2})})
    sine, product, cosine = plan.rules
    assert reached[sine] == {0}
    assert reached[product] == reached[cosine] == {0, 1, 2}


def test_tangents_of_two_operations_are_alive_at_a_time():
    plan = _plan(lambda a: a.sin().relu().abs().relu(), 4)
    (given,) = plan.stage.inputs
    reach = {given: frozenset(range(5))}
    assert plan.value_bytes == 4 * 4 * 8
    assert plan.adjoint_bytes == 4 * 8
    assert plan.tangent_bytes(reach, 5) == 2 * 5 * 4 * 8
    assert plan.tangent_bytes(reach, 2) == 2 * 2 * 4 * 8


def test_what_is_contracted_is_alive_beside_tangents():
    plan = _plan(lambda a: a.relu().sin(), 4)
    (given,) = plan.stage.inputs
    reach = {given: frozenset(range(5))}
    assert plan.tangent_bytes(reach, 5, contracted=True) == (1 + 2) * 5 * 4 * 8
    assert plan.tangent_bytes(reach, 5) == 2 * 5 * 4 * 8


def test_views_take_no_memory():
    plan = _plan(lambda a: a.sin()[None].expand(3, 4)[:, :2].mT, 4)
    assert plan.value_bytes == 4 * 8


def test_tangents_and_curvature_of_a_function():
    plan = _plan(lambda a, b: (a * b).sin().sum(), 3, 3)
    a, b, u, v = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (first, second), (result,) = plan.stage.inputs, plan.stage.outputs
    values = plan.run([a, b])
    contributions = Contributions()
    adjoints = adjoints_of(plan, values, [torch.ones((), dtype=torch.float64)])
    (tangents,) = push(plan, values, {first: stacked({0: u}), second: stacked({1: v})}, adjoints, contributions)
    numbers = torch.cat(contributions.flat()).numpy()
    curvature = contributions.assemble(numbers, 2)
    z, du, dv = a * b, b * u, a * v
    torch.testing.assert_close(values[result].detach(), z.sin().sum())
    torch.testing.assert_close(tangents.at(0), (z.cos() * du).sum())
    torch.testing.assert_close(tangents.at(1), (z.cos() * dv).sum())
    expected = [
        [-(z.sin() * du * du).sum(), (z.cos() * u * v - z.sin() * du * dv).sum()],
        [(z.cos() * u * v - z.sin() * du * dv).sum(), -(z.sin() * dv * dv).sum()],
    ]
    torch.testing.assert_close(torch.tensor(curvature), torch.tensor(expected))


def test_an_operation_that_fails_is_named_with_its_line():
    plan = _plan(lambda a: a.reshape(2, 2) @ torch.ones(2, dtype=torch.float64), 4)
    with pytest.raises(CaptureError, match=r"aten.*reshape.* cannot be swept \(at test_plan.py.*: shape"):
        plan.run([torch.ones(3, dtype=torch.float64)])
