"""A stage of a captured graph made ready for the sweep: which rule each operation goes by, and what it needs."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from lmc_curvature.curvature.sweep.capture.graph import Stage, value_of
from lmc_curvature.curvature.sweep.capture.recorder import line_of
from lmc_curvature.curvature.sweep.rules.convolution import CONVOLUTION, Rectified
from lmc_curvature.curvature.sweep.rules.rule import Call, Contributions, Rule, Tangents, evaluate
from lmc_curvature.curvature.sweep.rules.table import rule_of
from lmc_curvature.errors import CaptureError

aten = torch.ops.aten


class Plan:
    """A stage with the rule of every operation that the directions reach.

    Args:
        stage: The operations.
        moving: Inputs that depend on the directions.
        wanted: Inputs whose adjoints are asked for.
    """

    def __init__(self, stage: Stage, moving: Iterable[fx.Node], wanted: Iterable[fx.Node] = ()):
        self.stage = stage
        self.moving = _moving(stage, moving)
        moved = [node for node in stage.operations if node in self.moving]
        self.rules: dict[fx.Node, Rule] = {node: rule_of(node, self.moving) for node in moved}
        self.curved = [node for node in moved if self.rules[node].bends(node, self.moving)]
        self.wanted = [node for node in wanted if node in self.moving]
        self._rectified = self._fused(moved)
        inner = {node for rectified in self._rectified.values() for node in rectified.inner}
        self.steps = [node for node in moved if node not in inner]
        self._last_reader = {operand: node for node in self.steps for operand in self._operands(node)}

    def _fused(self, moved: Sequence[fx.Node]) -> dict[fx.Node, Rectified]:
        """Rectifiers that take the convolutions before them along."""
        convolutions = {node for node in moved if self.rules[node] is CONVOLUTION} - {*self.stage.outputs}
        found = {node: Rectified.at(node, convolutions) for node in moved}
        return {node: rectified for node, rectified in found.items() if rectified is not None}

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        """What the step that ends with a node reads."""
        if node not in self._rectified:
            return node.all_input_nodes
        rectified = self._rectified[node]
        return [*rectified.convolution.all_input_nodes, *(() if rectified.added is None else (rectified.added,))]

    def run(self, inputs: Sequence[Any]) -> dict[fx.Node, Any]:
        """Value of every node; where gradients are enabled, as an autograd graph over the moving inputs."""
        values: dict[fx.Node, Any] = {}
        for node, value in zip(self.stage.inputs, inputs, strict=True):
            values[node] = value.detach().requires_grad_() if node in self.moving else value
        for node in self.stage.operations:
            with _naming(node):
                values[node] = self.stage.constant(node) if node.op == "get_attr" else evaluate(node, values)
        return values

    def adjoints(
        self, values: Mapping[fx.Node, Any], outputs: Sequence[Tensor | None], *, keeps_graph: bool = False
    ) -> dict[fx.Node, Any]:
        """Adjoint of every curved operation and wanted input, from those of the outputs."""
        sources = [
            (values[node], adjoint)
            for node, adjoint in zip(self.stage.outputs, outputs, strict=True)
            if adjoint is not None and values[node].requires_grad
        ]
        places = [(node, k, value) for node in (*self.curved, *self.wanted) for k, value in _parts(values[node])]
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
            for node in self.steps:
                tangents[node] = self._push(node, values, tangents, adjoints, contributions)
                for operand in self._operands(node):
                    if self._last_reader[operand] is node and operand not in self.stage.outputs:
                        tangents.pop(operand, None)
        return [tangents.get(node, {}) for node in self.stage.outputs]

    def push_all(self, values: Mapping[fx.Node, Any], inputs: Mapping[fx.Node, Tangents]) -> dict[fx.Node, Tangents]:
        """Tangents of every node, to be contracted later with `contract`."""
        tangents: dict[fx.Node, Tangents] = dict(inputs)
        with torch.no_grad():
            for node in self.steps:
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
            for node in self.curved:
                if node in adjoints:
                    with _naming(node):
                        self.rules[node].contract(Call(node, values, tangents, adjoints[node]), contributions)

    def _push(
        self,
        node: fx.Node,
        values: Mapping[fx.Node, Any],
        tangents: Mapping[fx.Node, Tangents],
        adjoints: Mapping[fx.Node, Any],
        contributions: Contributions,
    ) -> Tangents:
        rectified = self._rectified.get(node)
        bent = node if rectified is None else rectified.convolution
        call = Call(bent, values, tangents, adjoints.get(bent))
        with _naming(bent):
            if call.adjoint is not None:
                self.rules[bent].contract(call, contributions)
            return self.rules[bent].push(call) if rectified is None else rectified.push(call, values[node])

    def reached(self, inputs: Mapping[fx.Node, frozenset[int]]) -> dict[fx.Node, frozenset[int]]:
        """Which directions reach each node, given which reach the inputs."""
        found = dict(inputs)
        for node in self.steps:
            found[node] = frozenset().union(*(found.get(operand, frozenset()) for operand in self._operands(node)))
        return found

    def tangent_bytes(self, inputs: Mapping[fx.Node, frozenset[int]], together: int) -> int:
        """Most bytes that tangents of operations take at one time, at the shapes that were captured.

        No more than `together` directions are carried at a time.
        """
        reached = {node: min(len(directions), together) for node, directions in self.reached(inputs).items()}
        alive = peak = 0
        for node in self.steps:
            alive += _bytes(node) * reached[node]
            peak = max(peak, alive)
            for operand in self._operands(node):
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


def _moving(stage: Stage, inputs: Iterable[fx.Node]) -> set[fx.Node]:
    moving = set(inputs)
    for node in stage.operations:
        cut = node.target is aten.detach.default
        if not cut and any(operand in moving for operand in node.all_input_nodes) and _is_real(value_of(node)):
            moving.add(node)
    return moving


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
