"""Functions of each element."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from lmc_curvature.curvature.sweep.capture import value_of
from lmc_curvature.curvature.sweep.rules.inner_products import weighted_gram
from lmc_curvature.curvature.sweep.rules.rule import Contributions, FirstOrder, OpCall, Rule, evaluate
from lmc_curvature.curvature.sweep.rules.stack import Stack

# Tensors as large as the value that autodiff makes of φ to find φ″: of the error function's GELU, and of most others.
_DERIVATIVES = 6


class Pointwise(Rule):
    """A function φ of each element of the first argument, the others held: ẏ = φ′ u and ⟨g, D²φ[u, v]⟩ = Σ g φ″ u v.

    φ′ and φ″ are found by autodiff.
    """

    def fits(self, node: fx.Node, moved: list[fx.Node]) -> bool:
        """Whether the first argument alone depends on the directions, and has the shape of the result."""
        # Another argument may have more axes than the first one.
        return moved == [node.args[0]] and value_of(moved[0]).shape == value_of(node).shape

    def copies(self, node: fx.Node, reached: Mapping[fx.Node, int], *, in_parts: bool) -> dict[fx.Node, int]:
        """The stack of all tangents, and then that times the weight or φ′; before, what φ″ is computed by."""
        operand: Any = node.args[0]
        return {operand: max(_DERIVATIVES, 2 * reached[operand])}

    def push(self, call: OpCall) -> Stack:
        """φ′ times each tangent."""
        return call.moved(0).times(_derivatives(call, 1)[0])

    def contract(self, call: OpCall, contributions: Contributions) -> None:
        """Add the Gram matrix of the tangents, weighted by g φ″."""
        second, stack = _derivatives(call, 2)[1], call.moved(0)
        if second is not None:
            gram = weighted_gram(call.adjoint * second, stack.tensors)
            contributions.add(stack.directions, stack.directions, gram / 2)


def _derivatives(call: OpCall, order: int) -> tuple[Tensor, Tensor | None]:
    """φ′, and φ″ if the order is 2 and there is one."""
    source = call.node.all_input_nodes[0]
    leaf = call.values[source].detach().requires_grad_()
    values = {node: call.values[node] for node in call.node.all_input_nodes} | {source: leaf}
    with torch.enable_grad():
        (first,) = torch.autograd.grad(evaluate(call.node, values).sum(), leaf, create_graph=order > 1)
        if order == 1 or not first.requires_grad:
            return first.detach(), None
        (second,) = torch.autograd.grad(first.sum(), leaf, allow_unused=True)
    return first.detach(), second


class PiecewiseLinear(FirstOrder, Pointwise):
    """A pointwise function whose second derivative is zero wherever it has one."""


class Rectifier(FirstOrder):
    """max(x, 0), its derivative at zero taken as zero, as torch does."""

    def push(self, call: OpCall) -> Stack:
        """Each tangent where the output is positive, and zero elsewhere."""
        # One where the output is positive.
        return call.moved(0).times(call.output.detach().sign())
