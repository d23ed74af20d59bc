"""A function of a state and data, captured as a graph and planned for the sweep."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, fx

from lmc_curvature.curvature.sweep.capture import capture, dependents
from lmc_curvature.curvature.sweep.plan import Plan, bytes_of
from lmc_curvature.curvature.sweep.tree import BatchTree
from lmc_curvature.objective.network import State


@dataclass(frozen=True, eq=False)
class Program:
    """A function of a state and data, captured for one shape of data and planned for the directions.

    Attributes:
        entries: State entry to its place among the graph's inputs.
        prelude: What the state alone decides (folded weights): from the entries to the operands of the body.
        body: From operands and data to the result.
        argument: The first tensor of the data; None if there is no tensor in them.
        result: What the function returns.
    """

    entries: Mapping[str, fx.Node]
    prelude: Plan
    body: Plan
    argument: fx.Node | None
    result: fx.Node

    @classmethod
    def of(
        cls,
        function: Callable[[State, Any], Tensor],
        state: State,
        data: BatchTree,
        *,
        moved: frozenset[str] = frozenset(),
        data_moves: bool = False,
    ) -> "Program":
        """Capture and plan a function.

        Args:
            function: Takes a state and data, returns one tensor.
            state: Example values of the state.
            data: Example data; the graph holds for their shapes, and for the values beside their tensors.
            moved: Entries of the state that directions move.
            data_moves: Whether directions move the first tensor of the data, too.

        Raises:
            CaptureError: The function depends on values, not only on shapes, or an operation has no rule.
        """
        names = list(state)

        def flat(*tensors: Tensor) -> Tensor:
            return function(dict(zip(names, tensors, strict=False)), data.rebuilt(tensors[len(names) :]))

        first, second = capture(flat, list(state.values()), data.tensors)
        entries = dict(zip(names, first.inputs, strict=True))
        prelude = Plan(first, [node for name, node in entries.items() if name in moved])
        given = second.inputs[len(first.outputs) :]
        active = [node for node in first.outputs if node in prelude.active]
        active += given[:1] if data_moves else ()
        # The adjoints that the prelude's own second derivatives need, and those of the data.
        nonlinear = dependents(first.operations, prelude.nonlinear) | set(given)
        body = Plan(second, active, [node for node in active if node in nonlinear])
        return cls(entries, prelude, body, given[0] if given else None, second.outputs[0])

    @property
    def operations(self) -> list[tuple[Any, type]]:
        """Every operation that the directions reach, with the kind of its rule.

        A function has the same for data of other sizes, unless it does something else with them.
        """
        return [(node.target, type(rule)) for plan in (self.prelude, self.body) for node, rule in plan.rules.items()]

    @cached_property
    def constants(self) -> dict[fx.Node, Any]:
        """Values of the prelude of a function that has no state."""
        return self.prelude.run([])

    @cached_property
    def argument_bytes(self) -> int:
        """Bytes of the data, at the shapes that were captured."""
        return sum(bytes_of(node) for node in self.body.stage.inputs[len(self.prelude.stage.outputs) :])

    def operands(self, state: State) -> dict[fx.Node, Any]:
        """Values of the prelude at a state.

        Raises:
            CaptureError: An operation fails, or gives another shape than was captured.
        """
        return _values(self.prelude, [state[name] for name in self.entries])

    def evaluate(self, operands: Mapping[fx.Node, Any], data: BatchTree) -> dict[fx.Node, Any]:
        """Values of the body, from those of the prelude and data.

        Raises:
            CaptureError: An operation fails, or gives another shape than was captured.
        """
        return _values(self.body, [*(operands[node] for node in self.prelude.stage.outputs), *data.tensors])


def _values(plan: Plan, inputs: Sequence[Any]) -> dict[fx.Node, Any]:
    values = plan.run(inputs)
    plan.refuse_other_shapes(values)
    return values
