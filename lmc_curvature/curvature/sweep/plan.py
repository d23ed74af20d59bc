"""A stage of a captured graph made ready for the sweep: the rule of each operation, and what it needs."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from lmc_curvature.curvature.sweep.capture import Stage, line_of, value_of
from lmc_curvature.curvature.sweep.rules import Rule, evaluate, rule_of
from lmc_curvature.curvature.sweep.tail import ROWS, tail_of
from lmc_curvature.errors import CaptureError

aten = torch.ops.aten

# Tangents of a chunk of rows, were there as many stacks of them at one time: matrix products like many rows, and caches
# few.
_CHUNK_BYTES, _STACKS = 512 * 2**20, 3


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
        last_reader: Node to the last active operation that reads it.
        tail: What is swept in chunks of rows, if there is such a tail.
        rows: The plan of the tail for a chunk.
    """

    def __init__(self, stage: Stage, active: Iterable[fx.Node], needs_adjoint: Iterable[fx.Node] = ()):
        self.stage = stage
        self.active = _active(stage, active)
        self.rules: dict[fx.Node, Rule] = {
            node: rule_of(node, self.active) for node in stage.operations if node in self.active
        }
        self.tail = tail_of(stage, self.active)
        inside = frozenset() if self.tail is None else self.tail.nodes
        self.nonlinear = [
            node for node, rule in self.rules.items() if node not in inside and rule.has_curvature(node, self.active)
        ]
        self.needs_adjoint = [node for node in needs_adjoint if node in self.active]
        self.rows = None
        if self.tail is not None:
            self.needs_adjoint += self.tail.exits
            outer = (*self.tail.aligned, *self.tail.shared)
            moved = [new for node, new in zip(outer, self.tail.stage.inputs, strict=True) if node in self.active]
            self.rows = Plan(self.tail.stage, moved)
        self.last_reader = {operand: node for node in self.rules for operand in node.all_input_nodes}

    def run(self, inputs: Sequence[Any]) -> dict[fx.Node, Any]:
        """Value of every node; where gradients are enabled, as an autograd graph over the active inputs."""
        values: dict[fx.Node, Any] = {}
        for node, value in zip(self.stage.inputs, inputs, strict=True):
            values[node] = value.detach().requires_grad_() if node in self.active else value
        for node in self.stage.operations:
            with naming(node):
                values[node] = self.stage.constant(node) if node.op == "get_attr" else evaluate(node, values)
        return values

    def refuse_other_shapes(self, values: Mapping[fx.Node, Any]) -> None:
        """Refuse values of other shapes than were captured: numbers that were read off those are in the graph.

        Raises:
            CaptureError: Names the operation whose result's shape depends on values, and its line.
        """
        for node in (each for each in self.stage.operations if each.op != "get_attr"):
            shapes, captured = ([part.shape for part in _tensors(value)] for value in (values[node], value_of(node)))
            if shapes != captured:
                raise CaptureError(
                    f"The loss was captured as a graph for other values: {node.target} has a result whose shape "
                    f"depends on values{line_of(node)}."
                )

    def reached(self, inputs: Mapping[fx.Node, frozenset[int]]) -> dict[fx.Node, frozenset[int]]:
        """The directions that reach each node, given those that reach the inputs."""
        found = dict(inputs)
        for node in self.rules:
            found[node] = frozenset().union(*(found.get(operand, frozenset()) for operand in node.all_input_nodes))
        return found

    def tangent_bytes(
        self,
        inputs: Mapping[fx.Node, frozenset[int]],
        together: int,
        *,
        contracted: bool = False,
        in_parts: bool = True,
    ) -> int:
        """Most bytes that tangents of operations take at one time, at the shapes that were captured.

        Args:
            inputs: The directions that reach each input.
            together: Most directions that are carried at a time.
            contracted: Whether to count what operations contract with their tangents, too.
            in_parts: Whether weighted Gram matrices are made part by part, as on a CPU.
        """
        reached = {node: min(len(directions), together) for node, directions in self.reached(inputs).items()}
        alive = peak = 0
        nonlinear = set(self.nonlinear)
        for node, rule in self.rules.items():
            if self.tail is not None and node in self.tail.nodes:
                continue
            if contracted and node in nonlinear:
                copies = rule.copies(node, reached, in_parts=in_parts)
                peak = max(peak, alive + sum(bytes_of(operand) * count for operand, count in copies.items()))
            operands = node.all_input_nodes
            if rule.overwrites and all(len(each.users) == 1 and each in self.rules for each in operands):
                continue
            alive += bytes_of(node) * reached[node]
            peak = max(peak, alive)
            for operand in operands:
                if self.last_reader[operand] is node and operand in self.rules:
                    alive -= bytes_of(operand) * reached[operand]
        return peak

    def rows_at_once(self, directions: int) -> int:
        """Rows of the tail in a chunk, when some directions have reached it."""
        assert self.rows is not None
        return max(1, int(_CHUNK_BYTES / (_STACKS * directions * self.rows.widest_bytes / ROWS)))

    def chunk_bytes(self, inputs: Mapping[fx.Node, frozenset[int]], together: int, *, in_parts: bool = True) -> float:
        """Bytes of the values and tangents of a chunk of the tail, and of the tangents that it reads.

        Args:
            inputs: The directions that reach each input.
            together: Most directions that are carried at a time.
            in_parts: Whether weighted Gram matrices are made part by part, as on a CPU.
        """
        if self.tail is None or self.rows is None:
            return 0.0
        reached = self.reached(inputs)
        outer = (*self.tail.aligned, *self.tail.shared)
        reach = {new: reached.get(node, frozenset()) for node, new in zip(outer, self.rows.stage.inputs, strict=True)}
        count = min(together, len(frozenset().union(*reach.values())))
        row = self.rows.tangent_bytes(reach, together, contracted=True, in_parts=in_parts)
        source = bytes_of(outer[0]) * min(together, len(reach[self.rows.stage.inputs[0]]))
        return source + (row + self.rows.value_bytes) / ROWS * min(self.tail.count, self.rows_at_once(count))

    @cached_property
    def widest_bytes(self) -> int:
        """Bytes of the largest value that depends on the directions."""
        return max(bytes_of(node) for node in self.rules)

    @cached_property
    def value_bytes(self) -> int:
        """Bytes of all values, at the shapes that were captured: what is a view of another takes none."""
        return sum(bytes_of(node) for node in self.stage.operations if not _is_view(node))

    @cached_property
    def adjoint_bytes(self) -> int:
        """Bytes of the adjoints of all operations that can contribute curvature, at the shapes that were captured."""
        return sum(bytes_of(node) for node in self.nonlinear)


def is_large(size: int) -> bool:
    """Whether tangents of a size in bytes are more than a chunk."""
    return size > _CHUNK_BYTES


@contextlib.contextmanager
def naming(node: fx.Node) -> Iterator[None]:
    """Within the block, an operation that fails is named, with its line.

    Raises:
        CaptureError: The operation failed for another reason than memory.
    """
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
        if (
            not constant
            and any(operand in active for operand in node.all_input_nodes)
            and _has_derivatives(value_of(node))
        ):
            active.add(node)
    return active


def _has_derivatives(value: Any) -> bool:
    return any(part.is_floating_point() or part.is_complex() for part in _tensors(value))


def _tensors(value: Any) -> list[Tensor]:
    parts = value if isinstance(value, (list, tuple)) else [value]
    return [part for part in parts if isinstance(part, Tensor)]


def _is_view(node: fx.Node) -> bool:
    """Whether a value takes no memory of its own: a part of another's, or a constant of the graph."""
    schema: Any = getattr(node.target, "_schema", None)
    if schema is None:
        return True
    # A reshape may have to copy.
    return node.target is not aten.reshape.default and any(result.alias_info is not None for result in schema.returns)


def bytes_of(node: fx.Node) -> int:
    """Bytes of a value, at the shape that was captured."""
    return sum(part.numel() * part.element_size() for part in _tensors(value_of(node)))
