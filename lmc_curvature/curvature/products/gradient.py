"""Loss and gradient of one batch, and its exact Hessian-vector products."""

import functools
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lmc_curvature.curvature.products.convolutions import DifferentiableConvolutions
from lmc_curvature.curvature.products.derivatives import gradients, operations, refuse_once_differentiable
from lmc_curvature.objective.batches import Batch
from lmc_curvature.objective.losses import check_differentiable
from lmc_curvature.objective.network import State, as_leaves, graph_nodes
from lmc_curvature.objective.numerics import wide_dtype
from lmc_curvature.objective.risk import Objective


class BatchGradient:
    """Loss and gradient of one batch, kept as a graph, so that each Hessian product costs one backward pass.

    Reverse over reverse: H v = ∇⟨∇L, v⟩ (Pearlmutter 1994). The first two passes are shared by all vectors of the
    batch, and sparse vectors cost only the part of the graph they touch. Forward over reverse takes as many
    multiplications for a single vector, shares nothing, and is missing or wrong for some of torch's operations
    (normalisation by batch statistics, `LayerNorm`).

    Args:
        objective: The loss.
        state: Where to differentiate, on the objective's device.
        batch: The examples.
        entries: Entries to differentiate in; by default all of the state.
        with_slopes: Compute the gradient's values, too, for `slope`.

    Attributes:
        loss: The batch's mean loss, a scalar tensor without graph.

    Raises:
        LossError: The loss does not depend on the state.
        UnsupportedModelError: An operation has no second derivative. `product` raises it, too; an operation that torch
            would differentiate twice with parts left out, without a word, is looked for on the first batch.
    """

    def __init__(
        self,
        objective: Objective,
        state: State,
        batch: Batch,
        entries: Iterable[str] | None = None,
        *,
        with_slopes: bool = True,
    ):
        self._objective, self._with_slopes = objective, with_slopes
        self._leaves = as_leaves({name: state[name] for name in (state if entries is None else entries)})
        self._convolutions = DifferentiableConvolutions()
        with objective.numerics.differentiating():
            with self._convolutions:
                loss = objective.batch_loss({**state, **self._leaves}, batch)
            # A few entries may well have no part in the loss.
            if len(self._leaves) >= len(objective.snapshot):
                check_differentiable(loss)
            with self._convolutions.backward(with_values=with_slopes):
                self._gradient = gradients([loss], self._leaves, create_graph=True)
        self._graph = loss
        self.loss = loss.detach()
        if batch.is_first:
            refuse_once_differentiable([self._graph, *self._gradient.values()])

    @functools.cached_property
    def operations(self) -> Hashable:
        """A value that differs between batches whose loss is computed by other operations."""
        return operations([self._graph, *self._gradient.values()])

    def uses(self, entries: Iterable[str]) -> dict[str, int]:
        """Number of operations on the way to the loss that take an entry, or a copy of it in another type."""
        takers: defaultdict[Any, list[Any]] = defaultdict(list)
        for node in graph_nodes([self._graph]):
            for following, _ in node.next_functions:
                takers[following].append(node)
        leaves = {id(node.variable): node for node in takers if hasattr(node, "variable")}

        def count(name: str) -> int:
            found = takers[leaves.get(id(self._leaves[name]))]
            # Under autocast one copy serves all operations.
            while len(found) == 1 and found[0].name() == "ToCopyBackward0":
                found = takers[found[0]]
            return len(found)

        return {name: count(name) for name in entries}

    def slope(self, direction: State) -> Float[Tensor, ""]:
        """⟨∇L, v⟩ for a direction v, if slopes were asked for."""
        if not self._with_slopes:
            raise ValueError("This gradient was made for products alone: pass with_slopes=True.")
        return inner({name: tensor.detach() for name, tensor in self._gradient.items()}, direction)

    def at(self, values: Sequence[Tensor]) -> list[Tensor | None]:
        """∇L in values that the network computed on its way, part of a graph; None for one without a part in the loss.

        Args:
            values: Tensors of the graph that the loss was computed by.
        """
        active = [value for value in values if value.requires_grad and self._graph.requires_grad]
        if not active:
            return [None] * len(values)
        with self._objective.numerics.differentiating():
            found = iter(torch.autograd.grad(self._graph, active, create_graph=True, allow_unused=True))
        return [next(found) if value.requires_grad else None for value in values]

    def product(self, direction: State, rows: Sequence[str] | None = None) -> dict[str, Tensor]:
        """H v for a sparse direction v: entry name to tensor, for the entries in `rows` (default: all)."""
        leaves = self._leaves if rows is None else {name: self._leaves[name] for name in rows}
        others = [leaf for name, leaf in self._leaves.items() if name not in leaves]
        # A backward pass computes with the settings of the moment: what the objective asks for, not the user's.
        with self._objective.numerics.differentiating_operations(), self._convolutions.backward(without=others):
            return gradients([self._gradient[name] for name in direction], leaves, list(direction.values()))


def inner(a: State, b: State) -> Float[Tensor, ""]:
    """⟨a, b⟩ over the entries of `b`, which `a` must have."""
    products = [torch.dot(_wide(a[name]), _wide(tensor)) for name, tensor in b.items()]
    return torch.stack(products).sum()


def _wide(tensor: Tensor) -> Float[Tensor, " n"]:
    return tensor.flatten().to(wide_dtype(tensor.dtype))
