"""Operations that are linear, at least in the arguments that depend on the directions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lmc_curvature.curvature.sweep.rules.rule import FirstOrder, OpCall, Tangents

aten = torch.ops.aten


class Constant(FirstOrder):
    """An operation whose derivative is zero wherever it has one."""

    def push(self, call: OpCall) -> Tangents:
        """No tangent goes on."""
        return {}


class Linear(FirstOrder):
    """Linear in its first argument, the others held: the tangent goes through the operation itself."""

    def fits(self, node: fx.Node, moved: list[fx.Node]) -> bool:
        """Whether the first argument alone depends on the directions."""
        return moved == [node.args[0]]

    def push(self, call: OpCall) -> Tangents:
        """The operation itself, applied to each tangent."""
        first, *rest = call.node.args
        rest, options = call.resolve(tuple(rest)), call.resolve(call.node.kwargs)
        target: Any = call.node.target
        return {i: target(tangent, *rest, **options) for i, tangent in call.tangents_of(first).items()}


@dataclass(frozen=True)
class JointlyLinear(FirstOrder):
    """Linear in some arguments together, tensors of one type, the others held.

    Attributes:
        positions: Their positions.
    """

    positions: tuple[int, ...]

    def fits(self, node: fx.Node, moved: list[fx.Node]) -> bool:
        """Whether no other argument depends on the directions."""
        linear = [node.args[position] for position in self.positions]
        return all(isinstance(argument, fx.Node) for argument in linear) and set(moved) <= set(linear)

    def push(self, call: OpCall) -> Tangents:
        """The operation itself, applied to the arguments' tangents together."""
        options = call.resolve(call.node.kwargs)
        target: Any = call.node.target

        def part(i: int) -> Tensor:
            arguments = list(call.resolve(call.node.args))
            for position in self.positions:
                tangent = call.tangents_of(call.node.args[position]).get(i)
                arguments[position] = torch.zeros_like(arguments[position]) if tangent is None else tangent
            return target(*arguments, **options)

        return {i: part(i) for i in call.directions()}


@dataclass(frozen=True)
class Affine(FirstOrder):
    """Linear in some arguments up to a constant: `part(call, tangents)` gives the linear part.

    `part` gets, in place of each argument (or list of arguments), its tangent, or None where that is zero.
    """

    part: Callable[[OpCall, list[Any]], Tensor]

    def push(self, call: OpCall) -> Tangents:
        """The linear part, for every direction."""
        arguments = call.node.args
        return {i: self.part(call, [_tangent_of(call, each, i) for each in arguments]) for i in call.directions()}


def _tangent_of(call: OpCall, argument: Any, direction: int) -> Any:
    """Tangent of an argument, or of each in a list of them; None where it is zero."""
    if isinstance(argument, (list, tuple)):
        return [_tangent_of(call, each, direction) for each in argument]
    return call.tangents_of(argument).get(direction)


def _sum_part(sign: int) -> Callable[[OpCall, list[Any]], Tensor]:
    def part(call: OpCall, tangents: list[Any]) -> Tensor:
        first, second, *_ = tangents
        factor = sign * call.resolve(call.node.kwargs).get("alpha", 1)
        if second is None:
            return first.expand(call.output.shape)
        if first is None:
            return (second if factor == 1 else second * factor).expand(call.output.shape)
        return torch.add(first, second, alpha=factor)

    return part


def _reversed_difference_part(call: OpCall, tangents: list[Any]) -> Tensor:
    first, second, *_ = tangents
    factor = call.value(2) if len(call.node.args) > 2 else call.resolve(call.node.kwargs).get("alpha", 1)
    if first is None:
        return second.expand(call.output.shape)
    return (-factor * first if second is None else second - factor * first).expand(call.output.shape)


def _joined_part(call: OpCall, tangents: list[Any]) -> Tensor:
    pieces = [
        torch.zeros_like(value) if tangent is None else tangent
        for value, tangent in zip(call.value(0), tangents[0], strict=True)
    ]
    target: Any = call.node.target
    return target(pieces, *call.resolve(call.node.args[1:]))


def _where_part(call: OpCall, tangents: list[Any]) -> Tensor:
    chosen, other = ((call.output.new_zeros(()) if each is None else each) for each in tangents[1:3])
    return torch.where(call.value(0), chosen, other).expand(call.output.shape)


def _masked_fill_part(call: OpCall, tangents: list[Any]) -> Tensor:
    if len(tangents) > 2 and tangents[2] is not None:
        zero = call.output.new_zeros(()) if tangents[0] is None else tangents[0]
        return torch.where(call.value(1), tangents[2], zero).expand(call.output.shape)
    return tangents[0].masked_fill(call.value(1), 0).expand(call.output.shape)


def _pad_part(call: OpCall, tangents: list[Any]) -> Tensor:
    return aten.constant_pad_nd.default(tangents[0], call.value(1), 0)


def _embedding_part(call: OpCall, tangents: list[Any]) -> Tensor:
    rows, padding = call.value(1), call.argument("padding_idx")
    found = aten.embedding.default(tangents[0], rows)
    # torch takes the row for padding as a constant.
    return found if padding < 0 else found.masked_fill((rows == padding).unsqueeze(-1), 0)


SUM, DIFFERENCE = Affine(_sum_part(1)), Affine(_sum_part(-1))
REVERSED_DIFFERENCE = Affine(_reversed_difference_part)
CONCATENATION = Affine(_joined_part)
WHERE = Affine(_where_part)
MASKED_FILL = Affine(_masked_fill_part)
PADDING = Affine(_pad_part)
EMBEDDING = Affine(_embedding_part)
