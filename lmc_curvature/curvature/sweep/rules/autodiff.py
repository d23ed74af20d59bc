"""The rule that holds for every operation: differentiate it alone, twice."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lmc_curvature.curvature.sweep.rules.inner_products import inner_with_each, wide
from lmc_curvature.curvature.sweep.rules.rule import Contributions, FirstOrder, OpCall, Rule, Tangents, evaluate


class ByAutodiff(Rule):
    """Any operation, by differentiating it alone, reverse over reverse.

    With q(a, g) = ∇_a ⟨g, f(a)⟩, one backward pass through q along u_i gives both Df[u_i], in g, and
    D²⟨g, f⟩ u_i, in a.
    """

    def push(self, call: OpCall) -> Tangents:
        """Df[u_i] for every direction."""
        local = _LocalGraph(call)
        return {i: local.tangent(call, i) for i in local.directions}

    def contract(self, call: OpCall, contributions: Contributions) -> None:
        """Add ⟨D²⟨g, f⟩ u_i, u_j⟩ for every pair of directions."""
        local = _LocalGraph(call)
        directions = local.directions
        if not directions:
            return
        products = {i: local.second(call, i) for i in directions}
        rows = torch.stack([torch.stack([local.inner(call, products[i], j) for j in directions]) for i in directions])
        contributions.add(directions, directions, rows / 2)


class FirstOrderByAutodiff(FirstOrder, ByAutodiff):
    """Any operation whose second derivative is zero wherever it has one, by differentiating it alone."""


class _LocalGraph:
    """f and q of `ByAutodiff`, on leaves of their own."""

    def __init__(self, call: OpCall):
        self.arguments = [node for node in call.node.all_input_nodes if call.tangents_of(node)]
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
            self.directions = call.directions() if self.kept else []
            self.pulled: Sequence[Any] = [None] * len(self.arguments)
            if self.directions:
                leaves, kept = list(self.leaves.values()), [outputs[k] for k in self.kept]
                self.pulled = torch.autograd.grad(kept, leaves, self.weights, create_graph=True, allow_unused=True)

    def _backward(self, call: OpCall, direction: int, inputs: list[Tensor]) -> list[Tensor | None]:
        moved = [
            (pulled, call.tangents_of(node)[direction])
            for node, pulled in zip(self.arguments, self.pulled, strict=True)
            if pulled is not None and pulled.requires_grad and direction in call.tangents_of(node)
        ]
        if not moved:
            return [None] * len(inputs)
        pulled, tangents = zip(*moved, strict=True)
        return list(torch.autograd.grad(pulled, inputs, tangents, retain_graph=True, allow_unused=True))

    def tangent(self, call: OpCall, direction: int) -> Any:
        found = self._backward(call, direction, self.weights)
        found = [torch.zeros_like(w) if t is None else t for w, t in zip(self.weights, found, strict=True)]
        if self.single:
            return found[0]
        tangents: list[Tensor | None] = [None] * self.count
        for k, tensor in zip(self.kept, found, strict=True):
            tangents[k] = tensor
        return tuple(tangents)

    def second(self, call: OpCall, direction: int) -> list[Tensor | None]:
        return self._backward(call, direction, [self.leaves[node] for node in self.arguments])

    def inner(self, call: OpCall, product: list[Tensor | None], direction: int) -> Float[Tensor, ""]:
        terms = [
            inner_with_each(tensor, [call.tangents_of(node)[direction]])[0]
            for node, tensor in zip(self.arguments, product, strict=True)
            if tensor is not None and direction in call.tangents_of(node)
        ]
        return torch.stack(terms).sum() if terms else self.weights[0].new_zeros((), dtype=wide(self.weights[0]))


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
