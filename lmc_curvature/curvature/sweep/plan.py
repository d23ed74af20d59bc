"""A stage of a captured graph made ready for the sweep: the rule of each operation, and what it needs."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from lmc_curvature.curvature.sweep.capture import Stage, line_of, value_of
from lmc_curvature.curvature.sweep.rules import Contributions, OpCall, Rule, Tangents, evaluate, rule_of
from lmc_curvature.errors import CaptureError

aten = torch.ops.aten


class Plan:
    """A stage with the rule of every operation that the directions reach.

    Args:
        stage: The operations.
        active: Inputs that depend on the directions.
        needs_adjoint: Inputs whose adjoints are asked for.

    Attributes:
        active: All nodes that depend on the directions.
        rules: Active operation to its rule, in order.
        nonlinear: Operations that can contribute curvature.
        needs_adjoint: The inputs among those asked for that are active.
    """

    def __init__(self, stage: Stage, active: Iterable[fx.Node], needs_adjoint: Iterable[fx.Node] = ()):
        self.stage = stage
        self.active = _active(stage, active)
        self.rules: dict[fx.Node, Rule] = {
            node: rule_of(node, self.active) for node in stage.operations if node in self.active
        }
        self.nonlinear = [node for node, rule in self.rules.items() if rule.has_curvature(node, self.active)]
        self.needs_adjoint = [node for node in needs_adjoint if node in self.active]
        self._last_reader = {operand: node for node in self.rules for operand in node.all_input_nodes}

    def run(self, inputs: Sequence[Any]) -> dict[fx.Node, Any]:
        """Value of every node; where gradients are enabled, as an autograd graph over the active inputs."""
        values: dict[fx.Node, Any] = {}
        for node, value in zip(self.stage.inputs, inputs, strict=True):
            values[node] = value.detach().requires_grad_() if node in self.active else value
        for node in self.stage.operations:
            with _naming(node):
                values[node] = self.stage.constant(node) if node.op == "get_attr" else evaluate(node, values)
        return values

    def adjoints(
        self, values: Mapping[fx.Node, Any], outputs: Sequence[Tensor | None], *, keeps_graph: bool = False
    ) -> dict[fx.Node, Any]:
        """Adjoint of every nonlinear operation, and of the inputs that were asked for, from those of the outputs."""
        sources = [
            (values[node], adjoint)
            for node, adjoint in zip(self.stage.outputs, outputs, strict=True)
            if adjoint is not None and values[node].requires_grad
        ]
        places = [
            (node, k, value) for node in (*self.nonlinear, *self.needs_adjoint) for k, value in _parts(values[node])
        ]
        if not sources or not places:
            return {}
        tensors, seeds = zip(*sources, strict=True)
        try:
            found = torch.autograd.grad(
                tensors, [value for _, _, value in places], seeds, retain_graph=keeps_graph, allow_unused=True
            )
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            raise CaptureError(f"The loss cannot be swept backwards: {str(error).strip().splitlines()[0]}") from error
        adjoints: dict[fx.Node, Any] = {}
        for (node, k, _), adjoint in zip(places, found, strict=True):
            if isinstance(values[node], Tensor):
                adjoints[node] = adjoint
            else:
                adjoints.setdefault(node, [None] * len(values[node]))[k] = adjoint
        return {node: adjoint for node, adjoint in adjoints.items() if not _is_zero(adjoint)}

    def push(
        self,
        values: Mapping[fx.Node, Any],
        inputs: Mapping[fx.Node, Tangents],
        adjoints: Mapping[fx.Node, Any],
        contributions: Contributions,
    ) -> list[Tangents]:
        """Tangents of the outputs; adds the curvature of every operation on the way, and forgets what is done with."""
        tangents: dict[fx.Node, Tangents] = dict(inputs)
        with torch.no_grad():
            for node in self.rules:
                tangents[node] = self._push(node, values, tangents, adjoints, contributions)
                for operand in node.all_input_nodes:
                    if self._last_reader[operand] is node and operand not in self.stage.outputs:
                        tangents.pop(operand, None)
        return [tangents.get(node, {}) for node in self.stage.outputs]

    def push_all(self, values: Mapping[fx.Node, Any], inputs: Mapping[fx.Node, Tangents]) -> dict[fx.Node, Tangents]:
        """Tangents of every node, to be contracted later with `contract`."""
        tangents: dict[fx.Node, Tangents] = dict(inputs)
        with torch.no_grad():
            for node in self.rules:
                tangents[node] = self._push(node, values, tangents, {}, Contributions())
        return tangents

    def contract(
        self,
        values: Mapping[fx.Node, Any],
        tangents: Mapping[fx.Node, Tangents],
        adjoints: Mapping[fx.Node, Any],
        contributions: Contributions,
    ) -> None:
        """Add the curvature of every operation, given the tangents of `push_all`."""
        with torch.no_grad():
            for node in self.nonlinear:
                if node in adjoints:
                    with _naming(node):
                        self.rules[node].contract(OpCall(node, values, tangents, adjoints[node]), contributions)

    def _push(
        self,
        node: fx.Node,
        values: Mapping[fx.Node, Any],
        tangents: Mapping[fx.Node, Tangents],
        adjoints: Mapping[fx.Node, Any],
        contributions: Contributions,
    ) -> Tangents:
        call = OpCall(node, values, tangents, adjoints.get(node))
        with _naming(node):
            if call.adjoint is not None:
                self.rules[node].contract(call, contributions)
            return self.rules[node].push(call)

    def reached(self, inputs: Mapping[fx.Node, frozenset[int]]) -> dict[fx.Node, frozenset[int]]:
        """The directions that reach each node, given those that reach the inputs."""
        found = dict(inputs)
        for node in self.rules:
            found[node] = frozenset().union(*(found.get(operand, frozenset()) for operand in node.all_input_nodes))
        return found

    def tangent_bytes(self, inputs: Mapping[fx.Node, frozenset[int]], together: int) -> int:
        """Most bytes that tangents of operations take at one time, at the shapes that were captured.

        No more than `together` directions are carried at a time.
        """
        reached = {node: min(len(directions), together) for node, directions in self.reached(inputs).items()}
        alive = peak = 0
        for node in self.rules:
            alive += _bytes(node) * reached[node]
            peak = max(peak, alive)
            for operand in node.all_input_nodes:
                if self._last_reader[operand] is node and operand in self.rules:
                    alive -= _bytes(operand) * reached[operand]
        return peak

    @cached_property
    def value_bytes(self) -> int:
        """Bytes of all values, at the shapes that were captured."""
        return sum(_bytes(node) for node in self.stage.operations)


@contextlib.contextmanager
def _naming(node: fx.Node) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CaptureError(f"Operation {node.target} of the loss cannot be swept{line_of(node)}: {reason}") from error


def _active(stage: Stage, inputs: Iterable[fx.Node]) -> set[fx.Node]:
    active = set(inputs)
    for node in stage.operations:
        constant = node.target is aten.detach.default
        if not constant and any(operand in active for operand in node.all_input_nodes) and _is_real(value_of(node)):
            active.add(node)
    return active


def _is_real(value: Any) -> bool:
    parts = [value] if isinstance(value, Tensor) else value if isinstance(value, (list, tuple)) else []
    return any(isinstance(part, Tensor) and part.is_floating_point() for part in parts)


def _parts(value: Any) -> list[tuple[int, Tensor]]:
    parts = [value] if isinstance(value, Tensor) else value
    return [(k, part) for k, part in enumerate(parts) if isinstance(part, Tensor) and part.requires_grad]


def _is_zero(adjoint: Any) -> bool:
    return adjoint is None or (isinstance(adjoint, list) and all(part is None for part in adjoint))


def _bytes(node: fx.Node) -> int:
    value = value_of(node)
    parts = value if isinstance(value, (list, tuple)) else [value]
    return sum(part.numel() * part.element_size() for part in parts if isinstance(part, Tensor))
