"""The tests that the rules of every file get, from a list of operations."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import fx

from lmc_curvature import Objective, Projection
from lmc_curvature.curvature.problem import Tiling
from lmc_curvature.curvature.sweep import BatchTree
from lmc_curvature.curvature.sweep.plan import Plan
from lmc_curvature.curvature.sweep.propagation import adjoints_of
from lmc_curvature.curvature.sweep.rules import Contributions, OpCall, Stack, stacked
from lmc_curvature.curvature.sweep.rules.autodiff import ByAutodiff
from lmc_curvature.curvature.sweep.rules.selection import Pick
from tests.support.sweeping import (
    assert_curved,
    assert_projections_agree,
    compiled_batches,
    posed,
    swept,
    swept_by_autodiff,
)

# Operations that torch 2.11 cannot differentiate twice, or not capture.
_NEW = {"distances", "sampled from a grid", "smallest and largest", "checkpointed"}
_new_in_torch = pytest.mark.skipif(
    torch.__version__.startswith("2.11"), reason="torch 2.11 has no second derivative of it, or cannot capture it"
)


class RuleTests:
    """Every listed operation is swept within a small network, and compared with products and with autodiff.

    A subclass needs the list alone. The fixtures `objective`, `directions` and `expected` are those of
    `tests/curvature/sweep/conftest.py`.

    Attributes:
        operations: Name to a function of tensors, or a module, and the shapes of its arguments without the axis of
            examples.
        by_autodiff: Whether all of these have a part without a rule of its own; otherwise none of them has.
    """

    operations: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    by_autodiff: ClassVar[bool] = False

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run each test for every operation, and the one in tiles, which takes longer, for the first."""
        names = list(self.operations)[: 1 if metafunc.function.__name__ == "test_in_tiles" else None]
        operations = [
            pytest.param(self.operations[name], id=name, marks=_new_in_torch if name in _NEW else ()) for name in names
        ]
        metafunc.parametrize("operation", operations, scope="class")

    @pytest.mark.check(after=3)
    def test_agrees_with_products(self, objective: Objective, directions: Any, expected: Projection) -> None:
        """The sweep's projection is that of Hessian-vector products, by rules or autodiff as the class says."""
        assert_curved(expected)
        assert_projections_agree(swept(objective, directions), expected, relative=1e-9)
        (compiled,) = compiled_batches(objective, directions)
        assert bool(swept_by_autodiff(compiled)) == self.by_autodiff

    @pytest.mark.check(after=1)
    def test_directions_may_miss_arguments(
        self, operation: tuple[Any, ...], objective: Objective, directions: Any, expected: Projection
    ) -> None:
        """The projection is the same along a direction that reaches one argument and none of the others."""
        arguments = [f"before.{place}" for place in range(len(operation) - 1)]
        for name in arguments if len(arguments) > 1 else ():
            found, number = swept(objective, [directions[name]]), list(directions).index(name)
            np.testing.assert_allclose(found.slopes, expected.slopes[[number]], rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(found.curvature, expected.curvature[[[number]], [number]], rtol=1e-9, atol=1e-12)

    @pytest.mark.check(after=6)
    def test_equals_autodiff(self, objective: Objective, directions: Any) -> None:
        """Each rule passes on the tangents, and adds the curvature, that autodiff gives the operation alone."""
        swept(objective, directions)
        (compiled,) = compiled_batches(objective, directions)
        ((size, program),) = compiled.networks.items()
        problem = posed(objective, directions)
        with objective.numerics.differentiating_operations():
            operands = program.operands(problem.points[0].state)
            tangents = {
                node: stacked({i: along[name] for i, along in enumerate(problem.directions) if name in along})
                for name, node in program.entries.items()
                if node in program.prelude.active
            }
            tangents = _assert_rules_equal_autodiff(program.prelude, operands, tangents, {})
            values = program.evaluate(operands, BatchTree.of(objective.loader[0][0]).rows(0, size, size))
            adjoints = adjoints_of(program.body, values, [torch.cos(values[program.result].detach())])
            given = {node: tangents.get(node) for node in program.prelude.stage.outputs}
            _assert_rules_equal_autodiff(program.body, values, given, adjoints)

    def test_in_tiles(self, objective: Objective, directions: Any, expected: Projection) -> None:
        """Tiles of examples and blocks of directions change nothing."""
        found = swept(objective, directions, tiling=Tiling(1, 2, keeps_values=False))
        assert_projections_agree(found, expected, relative=1e-9)


def _assert_rules_equal_autodiff(
    plan: Plan, values: Mapping[fx.Node, Any], inputs: Mapping[fx.Node, Stack | None], adjoints: Mapping[fx.Node, Any]
) -> dict[fx.Node, Stack | None]:
    """Push tangents through all operations of a plan, each compared with autodiff; returns those of every node."""
    tangents = dict(inputs)
    with torch.no_grad():
        for node, rule in plan.rules.items():
            call = OpCall(node, values, tangents, adjoints.get(node))
            tangents[node] = rule.push(call) if call.directions() else None
            # Autodiff takes tensors, and not a tuple of them.
            if isinstance(rule, Pick):
                continue
            expected = ByAutodiff().push(call)
            for i in call.directions():
                found, other = (stack and stack.at(i) for stack in (tangents[node], expected))
                _assert_tangents_close(node, values[node], found, other)
            if call.adjoint is not None:
                found, other = _contributions(rule, call), _contributions(ByAutodiff(), call)
                np.testing.assert_allclose(found, other, rtol=1e-8, atol=1e-11, err_msg=str(node.target))
    return tangents


def _assert_tangents_close(node: fx.Node, value: Any, found: Any, expected: Any) -> None:
    """Assert that the tangents of a value are equal, or of each in a tuple of values; None is zero."""
    if not isinstance(value, torch.Tensor):
        for k, part in enumerate(value):
            _assert_tangents_close(node, part, None if found is None else found[k], expected and expected[k])
    elif value.is_floating_point() or value.is_complex():
        first, second = (torch.zeros_like(value) if each is None else each for each in (found, expected))
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-11, msg=lambda text: f"{node.target}: {text}")


def _contributions(rule: Any, call: OpCall) -> np.ndarray:
    contributions, directions = Contributions(), call.directions()
    rule.contract(call, contributions)
    numbers = torch.cat([torch.zeros(0, dtype=torch.float64), *contributions.flat()]).numpy()
    return contributions.assemble(numbers, 1 + max(directions, default=0))


def at_zero(function: Any) -> Any:
    """A function of six numbers, at a place where half of them are exactly zero and their tangents are not."""
    zero = torch.tensor([1, 1, 0, 0, 1, 0])
    return lambda x: torch.cat([function(x - zero * x.detach()).flatten(1), torch.sin(x)], 1)
