"""The rule that holds for every operation: differentiate it alone, twice."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lmc_curvature.curvature.sweep.rules.inner_products import gram
from lmc_curvature.curvature.sweep.rules.rule import Contributions, FirstOrder, OpCall, Rule, evaluate
from lmc_curvature.curvature.sweep.rules.stack import Stack, stacked


class ByAutodiff(Rule):
    """Any operation, by differentiating it alone, reverse over reverse.

    With q(a, g) = ∇_a ⟨g, f(a)⟩, one backward pass through q along u_i gives both Df[u_i], in g, and
    D²⟨g, f⟩ u_i, in a.
    """

    def push(self, call: OpCall) -> Stack | None:
        """Df[u_i] for every direction."""
        local = _LocalGraph(call)
        return stacked({i: local.tangent(call, i) for i in local.directions}) if local.directions else None

    def contract(self, call: OpCall, contributions: Contributions) -> None:
        """Add ⟨D²⟨g, f⟩ u_i, u_j⟩ for every pair of directions."""
        local = _LocalGraph(call)
        directions = local.directions
        if not directions:
            return
        for node, products in local.seconds(call):
            stack = call.tangents_of(node)
            assert stack is not None
            contributions.add(products.directions, stack.directions, gram(products.tensors, stack.tensors) / 2)


class FirstOrderByAutodiff(FirstOrder, ByAutodiff):
    """Any operation whose second derivative is zero wherever it has one, by differentiating it alone."""


class _LocalGraph:
    """f and q of `ByAutodiff`, on leaves of their own."""

    def __init__(self, call: OpCall):
        self.arguments = [node for node in call.node.all_input_nodes if call.tangents_of(node) is not None]
        self.leaves = {node: call.values[node].detach().requires_grad_() for node in self.arguments}
        values = {node: self.leaves.get(node, call.values[node]) for node in call.node.all_input_nodes}
        with torch.enable_grad():
            output = evaluate(call.node, values)
            self.single = isinstance(output, Tensor)
            outputs = [output] if self.single else list(output)
            self.kept = [index for index, value in enumerate(outputs) if _has_gradient(value)]
            adjoints = [call.adjoint] if self.single else list(call.adjoint or [None] * len(outputs))
            self.count = len(outputs)
            seeds: list[Any] = [torch.zeros_like(outputs[k]) if adjoints[k] is None else adjoints[k] for k in self.kept]
            self.weights = [seed.detach().clone().requires_grad_() for seed in seeds]
            self.directions = call.directions() if self.kept else ()
            self.pulled: Sequence[Any] = [None] * len(self.arguments)
            if self.directions:
                leaves, kept = list(self.leaves.values()), [outputs[k] for k in self.kept]
                self.pulled = torch.autograd.grad(kept, leaves, self.weights, create_graph=True, allow_unused=True)

    def _backward(self, call: OpCall, direction: int, inputs: list[Tensor]) -> list[Tensor | None]:
        along = [(stack := call.tangents_of(node)) and stack.at(direction) for node in self.arguments]
        moved = [
            (pulled, tangent)
            for tangent, pulled in zip(along, self.pulled, strict=True)
            if pulled is not None and pulled.requires_grad and tangent is not None
        ]
        if not moved:
            return [None] * len(inputs)
        pulled, tangents = zip(*moved, strict=True)
        found = torch.autograd.grad(pulled, inputs, tangents, retain_graph=True, allow_unused=True)
        # Complex ones may be conjugated whenever they are read.
        return [None if each is None else each.resolve_conj() for each in found]

    def tangent(self, call: OpCall, direction: int) -> Any:
        found = self._backward(call, direction, self.weights)
        found = [torch.zeros_like(w) if t is None else t for w, t in zip(self.weights, found, strict=True)]
        if self.single:
            return found[0]
        tangents: list[Tensor | None] = [None] * self.count
        for k, tensor in zip(self.kept, found, strict=True):
            tangents[k] = tensor
        return tuple(tangents)

    def seconds(self, call: OpCall) -> Iterator[tuple[fx.Node, Stack]]:
        """The arguments, each with D²⟨g, f⟩ u_i in it for those directions where that is not zero."""
        leaves = list(self.leaves.values())
        products = {i: self._backward(call, i, leaves) for i in self.directions}
        for place, node in enumerate(self.arguments):
            found = {i: parts[place] for i, parts in products.items() if parts[place] is not None}
            if found:
                yield node, stacked(found)


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
