"""Operations whose result is elements of their argument, and the places of these."""

from torch import Tensor, fx

from lmc_curvature.curvature.sweep.capture import value_of
from lmc_curvature.curvature.sweep.rules.rule import FirstOrder, OpCall
from lmc_curvature.curvature.sweep.rules.stack import Stack, along


class Pick(FirstOrder):
    """One result of several."""

    def push(self, call: OpCall) -> Stack | None:
        """The result's tangents, out of those of all results."""
        source, index = call.node.args
        stack = call.tangents_of(source)
        return None if stack is None or stack.tensors[index] is None else Stack(stack.directions, stack.tensors[index])


class MaxPooling(FirstOrder):
    """The largest element of each window: its tangent is the tangent at that element's place."""

    def __init__(self, spatial: int):
        self.spatial = spatial

    def push(self, call: OpCall) -> Stack:
        """The tangents' elements at the places of the largest."""
        places = call.output[1]
        flat = places.flatten(-self.spatial)

        def pick(tangent: Tensor) -> Tensor:
            return tangent.flatten(-self.spatial).gather(-1, flat).view(places.shape)

        return _with_places(along(pick, call.moved(0)))


class Selection(FirstOrder):
    """Elements along an axis, with their places: the largest, the sorted, the middle one."""

    def fits(self, node: fx.Node, moved: list[fx.Node]) -> bool:
        """Whether the argument has an axis."""
        return value_of(moved[0]).ndim > 0

    def push(self, call: OpCall) -> Stack:
        """The tangents' elements at the same places."""
        axis, places = call.argument("dim"), call.output[1]

        def pick(tangent: Tensor) -> Tensor:
            if places.ndim < tangent.ndim:
                return tangent.gather(axis, places.unsqueeze(axis)).squeeze(axis)
            return tangent.gather(axis, places)

        return _with_places(along(pick, call.moved(0)))


def _with_places(stack: Stack) -> Stack:
    return Stack(stack.directions, (stack.tensors, None))
