"""Derivatives of derivatives, or an error that says why there is none."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmc_curvature.errors import UnsupportedModelError
from lmc_curvature.objective.explanations import naming_what_has_no_derivative
from lmc_curvature.objective.network import graph_nodes


def gradients(
    outputs: Sequence[Tensor],
    inputs: Mapping[str, Tensor],
    weights: Sequence[Tensor] | None = None,
    *,
    create_graph: bool = False,
) -> dict[str, Tensor]:
    """Gradient of Σ ⟨output, weight⟩ in each input: zero where an output has no graph, or does not use the input.

    The graph is kept.

    Args:
        outputs: Tensors, scalars if there are no weights.
        inputs: Leaves, by name.
        weights: A tensor for each output, of its shape.
        create_graph: Make the result part of a graph that can be differentiated again.

    Raises:
        UnsupportedModelError: An operation has no such derivative.
    """
    weights = [torch.ones_like(output) for output in outputs] if weights is None else weights
    used = [(output, weight) for output, weight in zip(outputs, weights, strict=True) if output.requires_grad]
    if not used or not inputs:
        return {name: torch.zeros_like(tensor) for name, tensor in inputs.items()}
    with naming_what_has_no_derivative("differentiated twice"):
        found = torch.autograd.grad(
            [output for output, _ in used],
            list(inputs.values()),
            [weight for _, weight in used],
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
    return dict(zip(inputs, found, strict=True))


def operations(tensors: Iterable[Tensor]) -> Hashable:
    """A value that differs between the graphs of tensors that were computed by other operations."""
    return hash(tuple(type(node).__name__ for node in graph_nodes(tensors)))


def all_finite(derivatives: Tensor) -> bool:
    """Whether no value is infinite or not a number; makes no copy, however large the tensor is."""
    # What is not a number is the least and the greatest of all that it is among.
    return derivatives.numel() == 0 or bool(torch.stack(torch.aminmax(derivatives)).isfinite().all())


def refuse_once_differentiable(tensors: Iterable[Tensor]) -> None:
    """Refuse a loss whose second derivative torch would take with parts left out, without a word.

    Args:
        tensors: A loss or an output, whose graph is looked through, and gradients of it.

    Raises:
        UnsupportedModelError: An operation's backward pass is marked once-differentiable.
    """
    # The mark cuts the graph, so a second derivative through it is silently zero. It is left in the gradient's graph
    # only where the operation was given a gradient that is not constant: not where the loss ends in it.
    if any(type(node).__name__ == "Error" or _is_marked(node) for node in graph_nodes(tensors)):
        raise UnsupportedModelError(
            "The loss cannot be differentiated twice: an operation's backward pass is marked once_differentiable "
            "(a custom autograd.Function, often around a kernel of its own). Replace that operation, or "
            "predict with method='differences'."
        )


# All functions that the decorator makes share one body.
_MARKED_BODY = once_differentiable(lambda ctx: None).__code__


def _is_marked(node: Any) -> bool:
    backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
    return getattr(backward, "__code__", None) is _MARKED_BODY
