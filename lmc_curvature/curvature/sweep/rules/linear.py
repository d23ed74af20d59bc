"""Operations that are linear, at least in the arguments that depend on the directions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lmc_curvature.curvature.sweep.rules.rule import FirstOrder, OpCall
from lmc_curvature.curvature.sweep.rules.stack import Stack, along, total

aten = torch.ops.aten


class Constant(FirstOrder):
    """An operation whose derivative is zero wherever it has one."""

    def push(self, call: OpCall) -> None:
        """No tangent goes on."""
        return


class Affine(FirstOrder):
    """Linear in some arguments up to a constant, one direction like another."""

    def part(self, call: OpCall, tangents: Mapping[fx.Node, Tensor]) -> Any:
        """The linear part along one direction.

        Args:
            call: The operation.
            tangents: The tangents of those arguments that depend on the directions.
        """
        raise NotImplementedError

    def push(self, call: OpCall) -> Stack:
        """The linear part, for all directions at once."""
        reached = {node: stack for node in call.node.all_input_nodes if (stack := call.tangents_of(node))}
        return along(lambda *tangents: self.part(call, dict(zip(reached, tangents, strict=True))), *reached.values())


@dataclass(frozen=True)
class Linear(Affine):
    """Linear in some arguments together, tensors of one type, the others held: tangents go through it themselves.

    Attributes:
        positions: Their positions.
    """

    positions: tuple[int, ...] = (0,)

    def fits(self, node: fx.Node, moved: list[fx.Node]) -> bool:
        """Whether no other argument depends on the directions."""
        linear = [node.args[position] for position in self.positions]
        return all(isinstance(argument, fx.Node) for argument in linear) and set(moved) <= set(linear)

    def part(self, call: OpCall, tangents: Mapping[fx.Node, Tensor]) -> Any:
        """The operation itself, applied to the arguments' tangents together."""
        arguments = list(call.resolve(call.node.args))
        for position in self.positions:
            argument: Any = call.node.args[position]
            tangent = tangents.get(argument)
            arguments[position] = torch.zeros_like(arguments[position]) if tangent is None else tangent
        target: Any = call.node.target
        return target(*arguments, **call.resolve(call.node.kwargs))


@dataclass(frozen=True)
class Sum(FirstOrder):
    """a ± alpha · b.

    Attributes:
        signs: Those of a and b.
        scaled: Position of the one that alpha multiplies.
    """

    signs: tuple[int, int]
    scaled: int = 1

    def push(self, call: OpCall) -> Stack:
        """The sum of the tangents of both."""
        alpha = call.argument("alpha")
        terms: list[Stack] = []
        for position, sign in enumerate(self.signs):
            stack = call.tangents_of(call.node.args[position])
            factor = sign * (alpha if position == self.scaled else 1)
            if stack is not None:
                terms.append(stack if factor == 1 else stack.times(factor))
        return total(terms, call.output.shape)


@dataclass(frozen=True)
class AffineIn(Affine):
    """`linear(call, tangents)` gives the linear part.

    It gets, in place of each argument (or list of arguments), its tangent, or None where that is zero.
    """

    linear: Callable[[OpCall, list[Any]], Tensor]

    def part(self, call: OpCall, tangents: Mapping[fx.Node, Tensor]) -> Tensor:
        """What the function gives."""
        return self.linear(call, [_tangent_of(each, tangents) for each in call.node.args])


def _tangent_of(argument: Any, tangents: Mapping[fx.Node, Tensor]) -> Any:
    """Tangent of an argument, or of each in a list of them; None where it is zero."""
    if isinstance(argument, (list, tuple)):
        return [_tangent_of(each, tangents) for each in argument]
    return tangents.get(argument) if isinstance(argument, fx.Node) else None


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


SUM, DIFFERENCE = Sum((1, 1)), Sum((1, -1))
REVERSED_DIFFERENCE = Sum((-1, 1), scaled=0)
CONCATENATION = AffineIn(_joined_part)
WHERE = AffineIn(_where_part)
MASKED_FILL = AffineIn(_masked_fill_part)
PADDING = AffineIn(_pad_part)
EMBEDDING = AffineIn(_embedding_part)
