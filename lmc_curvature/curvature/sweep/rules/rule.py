"""An operation of a captured graph as the sweep meets it: what a rule is given, and what it adds to.

An operation z = f(a, b, …) enters the projection of the Hessian in two ways. Its tangent along direction i,

    ż_i = Df [u_i]                      (u_i: the tangents of its arguments)

goes on to the operations that read it, and its own second derivative, against the adjoint g = ∂L/∂z, contributes

    ⟨g, D²f [u_i, u_j]⟩                 to entry (i, j).

All tangents of a value are one tensor, a `Stack`, which a direction joins where it reaches the value.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor, fx

from lmc_curvature.curvature.sweep.rules.stack import Stack, union


@dataclass
class Contributions:
    """Sums over operations of P, where the projected Hessian is P + Pᵀ; kept on the device until they are asked for.

    Attributes:
        parts: Rows, columns and what is added there.
        equal: Sums that were computed on two ways, the sums of their terms' sizes, and the rounding error of one
            operation there.
    """

    parts: list[tuple[list[int], list[int], Tensor]] = field(default_factory=list)
    equal: list[tuple[Tensor, Tensor, Tensor, float]] = field(default_factory=list)

    def add(self, rows: Iterable[int], columns: Iterable[int], values: Float[Tensor, "rows columns"]) -> None:
        """Add to the entries of P in some rows and columns."""
        self.parts.append((list(rows), list(columns), values.detach()))

    @property
    def count(self) -> int:
        """How many values there are."""
        return sum(values.numel() for _, _, values in self.parts)

    def flat(self) -> list[Tensor]:
        """All values, one vector a part, in the order that `assemble` takes them."""
        return [values.flatten() for _, _, values in self.parts]

    def assemble(self, values: Float[np.ndarray, " n"], size: int) -> Float[np.ndarray, "size size"]:
        """P + Pᵀ from the values of `flat`, end to end."""
        rows, columns = self._places
        # Of no values it would be whole numbers.
        half = np.bincount(rows * size + columns, values, size * size).astype(float).reshape(size, size)
        return half + half.T

    @cached_property
    def _places(self) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Row and column of every value; nothing is added any more."""
        grids = [np.meshgrid(rows, columns, indexing="ij") for rows, columns, _ in self.parts]
        none = np.zeros(0, dtype=int)
        rows, columns = (np.concatenate([none, *(grid[axis].ravel() for grid in grids)]) for axis in (0, 1))
        return rows, columns


@dataclass(frozen=True, eq=False)
class OpCall:
    """One operation in one evaluation of the graph: its arguments' values and tangents, its own value and adjoint.

    `is_last` says that the tangents of an argument that nothing else reads are needed no more.
    """

    node: fx.Node
    values: Mapping[fx.Node, Any]
    tangents: Mapping[fx.Node, Stack | None]
    adjoint: Any = None
    is_last: bool = False

    def value(self, position: int) -> Any:
        """Value of a positional argument."""
        return self.resolve(self.node.args[position])

    def resolve(self, argument: Any) -> Any:
        """An argument with values in place of nodes."""
        return fx.map_arg(argument, self.values.__getitem__)

    def argument(self, name: str) -> Any:
        """Value of an argument by its name, or its default."""
        target: Any = self.node.target
        for position, argument in enumerate(target._schema.arguments):
            if argument.name == name:
                given = self.node.args[position] if position < len(self.node.args) else self.node.kwargs.get(name)
                return argument.default_value if given is None else self.resolve(given)
        raise KeyError(name)

    def tangents_of(self, argument: Any) -> Stack | None:
        """Tangents of an argument; None if it does not depend on the directions."""
        stack = self.tangents.get(argument) if isinstance(argument, fx.Node) else None
        # An operation may have one argument twice.
        if stack is None or not stack.is_own:
            return stack
        if self.is_last and len(argument.users) == 1 and self.node.args.count(argument) == 1:
            return stack
        return replace(stack, is_own=False)

    def moved(self, position: int) -> Stack:
        """Tangents of a positional argument that depends on the directions."""
        stack = self.tangents_of(self.node.args[position])
        assert stack is not None
        return stack

    @property
    def output(self) -> Any:
        """Value of the operation."""
        return self.values[self.node]

    def directions(self) -> tuple[int, ...]:
        """Directions that have reached any argument."""
        return union(self.tangents_of(argument) for argument in self.node.all_input_nodes)


class Rule:
    """One kind of operation: it passes on tangents, and contributes curvature.

    Attributes:
        overwrites: Whether tangents are passed on in the memory of its argument's, where nothing else reads those.
    """

    overwrites = False

    def fits(self, node: fx.Node, moved: list[fx.Node]) -> bool:
        """Whether the rule holds for an operation, given its arguments that depend on the directions."""
        return True

    def has_curvature(self, node: fx.Node, active: set[fx.Node]) -> bool:
        """Whether the operation can contribute curvature, so that its adjoint is needed.

        Args:
            node: The operation.
            active: The nodes of the graph that depend on the directions.
        """
        return True

    def copies(self, node: fx.Node, reached: Mapping[fx.Node, int], *, in_parts: bool) -> dict[fx.Node, int]:
        """Tensors that `contract` makes for itself, beside the tangents: how many are as large as which argument.

        Args:
            node: The operation.
            reached: The number of directions that have reached each node.
            in_parts: Whether weighted Gram matrices are made part by part, as on a CPU.
        """
        return {}

    def push(self, call: OpCall) -> Stack | None:
        """Tangents of the operation's value, from those of its arguments; None if there are none."""
        raise NotImplementedError

    def contract(self, call: OpCall, contributions: Contributions) -> None:
        """Add ⟨adjoint, D²f[u_i, u_j]⟩ for every pair of directions."""
        raise NotImplementedError

    def sweep(self, call: OpCall, contributions: Contributions) -> Stack | None:
        """The tangents of `push`, after `contract` where the adjoint is known."""
        if call.adjoint is not None:
            self.contract(call, contributions)
        return self.push(call)


class FirstOrder(Rule):
    """An operation whose second derivative is zero wherever it has one."""

    def has_curvature(self, node: fx.Node, active: set[fx.Node]) -> bool:
        """False, because the second derivative is zero."""
        return False


def evaluate(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """Evaluate one operation."""
    target: Any = node.target
    return target(*fx.map_arg(node.args, values.__getitem__), **fx.map_arg(node.kwargs, values.__getitem__))
