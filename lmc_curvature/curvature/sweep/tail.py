"""The tail of a language model: what follows its last, widest matrix product, and treats each row for itself.

The tangents of all logits, tokens × vocabulary × directions, fit no memory. Between the product that makes the logits
and the sums over tokens that make the loss no row meets another, so the tail is written as a graph of its own for any
number of rows, and swept in chunks of them: each chunk is contracted and forgotten.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from lmc_curvature.curvature.sweep.capture import Stage, value_of

aten = torch.ops.aten

# Times as many columns as its left factor a product must have, to be worth it.
_WIDE = 4
# Rows that the graph is written down with; it holds for any number.
ROWS = 2
_SHAPES = {"view", "reshape", "_unsafe_view", "squeeze", "unsqueeze", "clone", "alias"}
_SELECTIONS = {"slice", "select"}
_ELEMENTWISE = """
    add sub rsub mul div neg _to_copy exp log tanh sigmoid relu gelu silu pow square where masked_fill
""".split()  # noqa: SIM905
_ALONG = {"_softmax", "_log_softmax", "sum", "mean", "amax", "gather"}


@dataclass(frozen=True, eq=False)
class Tail:
    """The tail of a graph, and the same operations for a chunk of rows.

    Attributes:
        nodes: The operations of the whole graph that the tail takes the place of.
        after: The operations that depend on them.
        order: The numbers of the source's rows that reach the loss, in the order in which they do; None for all.
        count: How many rows reach the loss.
        stage: The operations for some rows. Its inputs are first the source and what goes with its rows, then what all
            rows share; its outputs are of one row each, and are summed up.
        aligned: Nodes of the whole graph whose rows are the first inputs, and how many of their axes number them.
        shared: Nodes of the whole graph that are the other inputs.
        exits: Nodes of the whole graph that are the outputs, each summed over all rows and divided by a number, or by
            the second value of a node.
    """

    nodes: frozenset[fx.Node]
    after: frozenset[fx.Node]
    order: Tensor | None
    count: int
    stage: Stage
    aligned: dict[fx.Node, int]
    shared: tuple[fx.Node, ...]
    exits: dict[fx.Node, float | fx.Node]


def tail_of(stage: Stage, active: set[fx.Node]) -> Tail | None:
    """The tail of a stage, given which nodes depend on the directions; None where there is none."""
    for node in reversed(stage.operations):
        if node in active and node.target in (aten.mm.default, aten.addmm.default):
            left: Any = node.args[-2]
            if left in active and value_of(node).numel() > _WIDE * value_of(left).numel():
                tail = _Rows(stage, active, node, left).tail()
                if tail is not None:
                    return tail
    return None


class _MixedRowsError(Exception):
    """The operations do not treat rows for themselves."""


@dataclass
class _Rows:
    """Writes the operations after a matrix product down anew, for some rows.

    Attributes:
        new: Node of the whole graph to its node in the new one.
        numbers: Node of the whole graph to the source's rows that it has, as an array of its leading axes.
    """

    stage: Stage
    active: set[fx.Node]
    product: fx.Node
    source: fx.Node
    graph: fx.Graph = field(default_factory=fx.Graph)
    new: dict[fx.Node, fx.Node] = field(default_factory=dict)
    numbers: dict[fx.Node, Tensor] = field(default_factory=dict)
    aligned: dict[fx.Node, tuple[int, Tensor]] = field(default_factory=dict)
    shared: dict[fx.Node, fx.Node] = field(default_factory=dict)
    inputs: dict[fx.Node, fx.Node] = field(default_factory=dict)
    exits: dict[fx.Node, tuple[fx.Node, float | fx.Node, Tensor]] = field(default_factory=dict)

    def tail(self) -> Tail | None:
        """The tail; None where rows meet, or do not all end in sums."""
        operations = [node for node in self.stage.operations if node in self.active]
        all_rows = torch.arange(len(value_of(self.source)))
        self.inputs[self.source] = self._given(self.source, (ROWS, *value_of(self.source).shape[1:]))
        self.aligned[self.source] = (1, all_rows)
        after: dict[fx.Node, None] = {}
        try:
            for node in operations[operations.index(self.product) :]:
                read = [operand for operand in node.all_input_nodes if operand in self.numbers]
                if any(operand in after or operand in self.exits for operand in node.all_input_nodes):
                    after[node] = None
                    if read:
                        return None
                elif node is self.product:
                    self.numbers[node] = all_rows
                    places = {len(node.args) - 2: self.inputs[self.source]}
                    self._call(node, self._arguments(node, places, rank=1))
                elif read:
                    self._follow(node, read[0])
            orders = [numbers for _, _, numbers in self.exits.values()]
            order = orders[0].flatten() if orders else None
            if order is None or not self._is_complete(order):
                return None
        except _MixedRowsError:
            return None
        outputs = tuple(new for new, _, _ in self.exits.values())
        self.graph.output(outputs)
        operations_anew = tuple(node for node in self.graph.nodes if node.op == "call_function")
        given = (*(self.inputs[node] for node in self.aligned), *self.shared.values())
        module = fx.GraphModule(torch.nn.Module(), self.graph)
        return Tail(
            frozenset(self.numbers) | frozenset(self.exits),
            frozenset(after),
            None if torch.equal(order, all_rows) else order.to(value_of(self.source).device),
            len(order),
            Stage(module, given, operations_anew, outputs),
            {node: axes for node, (axes, _) in self.aligned.items()},
            tuple(self.shared),
            {node: divisor for node, (_, divisor, _) in self.exits.items()},
        )

    def _is_complete(self, order: Tensor) -> bool:
        """Whether all rows end in the exits, in the same order, with what goes with them."""
        inside = self.numbers.keys() | self.exits.keys()
        ends = all(user in inside or user not in self.active for node in self.numbers for user in node.users)
        numbers = [numbers for _, _, numbers in self.exits.values()]
        numbers += [numbers for node, (_, numbers) in self.aligned.items() if node is not self.source]
        whole = not any(node in self.numbers for node in self.stage.outputs)
        return ends and whole and all(torch.equal(each.flatten(), order) for each in numbers)

    def _follow(self, node: fx.Node, operand: fx.Node) -> None:
        """Write down an operation that reads rows.

        Raises:
            _MixedRowsError: It does not treat each row for itself, as far as is known.
        """
        name = "getitem" if node.target is operator.getitem else str(node.target).split(".")[1]
        numbers, shape = self.numbers[operand], tuple(getattr(value_of(node), "shape", ()))
        rank = numbers.ndim
        if name in ("sum", "mean") and (len(node.args) == 1 or not shape):
            count = value_of(operand).numel() if name == "mean" else 1
            self.exits[node] = (self.new[operand], float(count), numbers)
        elif name == "nll_loss_forward" and rank == 1 and len(node.args) == 5:
            self.numbers[node] = numbers
            arguments = list(self._arguments(node, {0: self.new[operand]}, rank=rank, aligned=(1,)))
            arguments[3] = 0
            self._call(node, tuple(arguments))
        elif name == "getitem":
            self._pick(node, operand, numbers)
        elif name in _SELECTIONS and 0 <= (axis := _axis(node, operand)) < rank:
            target: Any = node.target
            # A negative axis counts from another end.
            self.numbers[node] = target(numbers, axis, *node.args[2:])
            self.new[node] = self.new[operand]
        elif name in _SHAPES:
            self.numbers[node] = self._reshaped(numbers, shape)
            rest = list(shape[self.numbers[node].ndim :])
            same = rest == list(value_of(operand).shape[rank:])
            self.new[node] = self.new[operand]
            if not same:
                self._call(node, (self.new[operand], [-1, *rest]), target=aten.reshape.default)
        elif name in _ALONG:
            axes: Any = node.args[1] if isinstance(node.args[1], (list, tuple)) else [node.args[1]]
            ndim = value_of(operand).ndim
            if None in axes:
                raise _MixedRowsError
            counted = [axis if axis < 0 else axis - ndim for axis in axes]
            if not counted or min(counted) < rank - ndim:
                raise _MixedRowsError
            self.numbers[node] = numbers
            arguments = list(self._arguments(node, {0: self.new[operand]}, rank=rank, aligned=(2,)))
            arguments[1] = counted if isinstance(node.args[1], (list, tuple)) else counted[0]
            self._call(node, tuple(arguments))
        elif name in _ELEMENTWISE and all(
            # What is broadcast along rows, or to more axes, meets other rows than its own.
            value_of(each).ndim == len(shape) and value_of(each).shape[:rank] == shape[:rank]
            for each in node.all_input_nodes
            if each in self.numbers
        ):
            self.numbers[node] = numbers
            self._call(node, self._arguments(node, {}, rank=rank, aligned=range(len(node.args)), shape=shape))
        else:
            raise _MixedRowsError

    def _pick(self, node: fx.Node, operand: fx.Node, numbers: Tensor) -> None:
        """The rows' values of a likelihood; where it sums them up, their sum is an exit."""
        if node.args[1] != 0 or operand.target is not aten.nll_loss_forward.default:
            raise _MixedRowsError
        self._call(node, (self.new[operand], 0))
        reduction = operand.args[3]
        if reduction == 0:
            self.numbers[node] = numbers
        else:
            self.exits[node] = (self.new[node], operand if reduction == 1 else 1.0, numbers)

    def _reshaped(self, numbers: Tensor, shape: Sequence[int]) -> Tensor:
        """The rows of a value whose shape is another, where no row is cut."""
        for axes in range(1, len(shape) + 1):
            if math.prod(shape[:axes]) == numbers.numel():
                return numbers.reshape(tuple(shape[:axes]))
        raise _MixedRowsError

    def _arguments(
        self,
        node: fx.Node,
        places: dict[int, fx.Node],
        *,
        rank: int,
        aligned: Sequence[int] = (),
        shape: Sequence[int] | None = None,
    ) -> tuple[Any, ...]:
        """Arguments of an operation in the new graph.

        Args:
            node: The operation.
            places: Those that are known, by position.
            rank: How many axes of the operation's value number rows.
            aligned: Positions of arguments that may have a row for each row of the value.
            shape: The shape of the value, where its arguments broadcast.
        """
        arguments = []
        for position, argument in enumerate(node.args):
            if position in places:
                arguments.append(places[position])
            elif not isinstance(argument, fx.Node):
                arguments.append(argument)
            elif argument in self.numbers:
                if not torch.equal(self.numbers[argument], self.numbers[node]):
                    raise _MixedRowsError
                arguments.append(self.new[argument])
            else:
                arguments.append(self._outer(node, argument, rank, position in aligned, shape))
        return tuple(arguments)

    def _outer(
        self, node: fx.Node, argument: fx.Node, rank: int, may_align: bool, shape: Sequence[int] | None
    ) -> fx.Node:
        """An argument from outside of the tail: with a row for each row, or shared by all of them."""
        value = value_of(argument)
        if not may_align or (shape is not None and value.ndim <= len(shape) - rank):
            if argument not in self.shared:
                self.shared[argument] = self._given(argument, tuple(value.shape))
            return self.shared[argument]
        numbers = self.numbers[node]
        fits = value.shape[:rank] == numbers.shape and (shape is None or value.ndim == len(shape))
        if argument in self.active or not fits:
            raise _MixedRowsError
        if argument not in self.aligned:
            self.aligned[argument] = (rank, numbers)
            self.inputs[argument] = self._given(argument, (ROWS, *value.shape[rank:]))
        elif not torch.equal(self.aligned[argument][1], numbers) or self.aligned[argument][0] != rank:
            raise _MixedRowsError
        return self.inputs[argument]

    def _given(self, node: fx.Node, shape: tuple[int, ...]) -> fx.Node:
        new = self.graph.placeholder(f"given_{len(self.inputs) + len(self.shared)}")
        new.meta = {"val": torch.empty(shape, dtype=value_of(node).dtype, device="meta")}
        return new

    def _call(self, node: fx.Node, arguments: tuple[Any, ...], *, target: Any = None) -> None:
        target = target or node.target
        kwargs = dict(node.kwargs) if target is node.target else {}
        if any(isinstance(value, fx.Node) for value in kwargs.values()):
            raise _MixedRowsError
        new = self.graph.call_function(target, arguments, kwargs)
        values = fx.map_arg(arguments, lambda each: each.meta["val"])
        kwargs = {name: value for name, value in kwargs.items() if name != "device"}
        try:
            new.meta = {"val": target(*values, **kwargs)}
        except RuntimeError as error:
            raise _MixedRowsError from error
        new.stack_trace = node.stack_trace
        self.new[node] = new


def _axis(node: fx.Node, operand: fx.Node) -> int:
    axis: Any = node.args[1] if len(node.args) > 1 else 0
    return axis if axis >= 0 else axis + value_of(operand).ndim
