"""Losses of a batch: their forms, and the checks that they are real, finite, differentiable means."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from lmc_curvature.errors import LossError, NonFiniteError
from lmc_curvature.objective.batches import Batch, describe


@dataclass(frozen=True)
class BatchLoss:
    """A loss computed from a network and a whole batch, for batches that are not `(x, y)` pairs.

    Attributes:
        fn: `fn(model, batch)` returns the mean loss over the batch's examples, a scalar tensor.
        size: `size(batch)` counts the examples; by default the leading dimension of the first tensor found.

    Example:
        `BatchLoss(lambda model, batch: model(**batch).loss)` for a Hugging Face model and its dict batches.
    """

    fn: Callable[[Any, Any], Tensor]
    size: Callable[[Any], int] | None = None


LossFunction = Callable[[Any, Any], Tensor] | BatchLoss
"""`loss_fn(output, target)` returning the scalar mean over a batch, or a `BatchLoss`.

Batches weigh by their number of examples. A loss that weighs examples within a batch by something else (class weights,
`ignore_index`) depends on how the data are cut into batches.
"""


class NetworkLoss(nn.Module):
    """A network and its loss as one module, so that one functional call evaluates both at a state."""

    def __init__(self, network: nn.Module, loss_fn: LossFunction):
        super().__init__()
        self.network = network
        self.loss_fn = loss_fn

    def forward(self, data: Any) -> tuple[Any, Any, Any]:
        """Loss, network output and target of a batch's data; the last two are None for a `BatchLoss`."""
        if isinstance(self.loss_fn, BatchLoss):
            loss, output, target = self.loss_fn.fn(self.network, data), None, None
        else:
            inputs, target = data
            output = self.network(inputs)
            loss = self.loss_fn(output, target)
        check_loss(loss)
        return loss, output, target

    def at(self, state: Mapping[str, Tensor], data: Any) -> tuple[Any, Any, Any]:
        """Loss, network output and target of a batch's data, where the network's entries are those of a state.

        Raises:
            LossError: The loss is not a real scalar.
        """
        return functional_call(self, {f"network.{name}": tensor for name, tensor in state.items()}, (data,))


def own_loss(loss_fn: LossFunction | None, device: torch.device, dtype: torch.dtype) -> LossFunction:
    """The loss to use, for a device and type: cross-entropy by default, a copy of a loss that is a module."""
    if isinstance(loss_fn, nn.Module):
        # A loss may carry tensors of its own (class weights); the caller's copy stays as it is.
        loss_fn = copy.deepcopy(loss_fn).to(device=device, dtype=dtype)
        loss_fn.eval()
    return F.cross_entropy if loss_fn is None else loss_fn


def check_reduction(loss_fn: Any) -> None:
    """Refuse a torch loss that does not take the mean over the batch.

    Raises:
        LossError: It sums over the batch, or does not reduce.
    """
    if loss_fn is None or isinstance(loss_fn, BatchLoss):
        return
    if isinstance(loss_fn, type) or not callable(loss_fn):
        raise LossError(
            f"loss_fn={loss_fn!r} is not a function of output and target: pass an instance such as "
            "torch.nn.CrossEntropyLoss(), a function, or a BatchLoss."
        )
    # functools.partial keeps what it binds in .keywords.
    bound = getattr(loss_fn, "keywords", {})
    reduction = getattr(loss_fn, "reduction", bound.get("reduction", "mean"))
    if reduction in ("sum", "none"):
        raise LossError(
            f"loss_fn={type(loss_fn).__name__}(reduction={reduction!r}): batches are weighted by their number of "
            "examples, so the loss must be their mean: use reduction='mean'."
        )


def check_loss(loss: Any) -> None:
    """Refuse what is not a real scalar.

    Raises:
        LossError: It has another form; says which.
    """
    if not isinstance(loss, Tensor):
        raise LossError(f"The loss is {describe(loss)}; expected a scalar tensor, the mean over the batch.")
    if loss.ndim != 0:
        raise LossError(
            f"The loss has shape {tuple(loss.shape)}; expected a scalar, the mean over the batch (reduction='mean')."
        )
    if not loss.is_floating_point():
        raise LossError(f"The loss has type {loss.dtype}; expected a real floating-point scalar.")


def check_differentiable(loss: Float[Tensor, ""]) -> None:
    """Refuse a loss without a graph, although it was computed from entries that require gradients.

    Raises:
        LossError: No entry of the state has any part in it.
    """
    if not loss.requires_grad:
        raise LossError(
            "The loss does not depend on any entry of the network's state: the network or loss_fn cuts the graph "
            "(.detach(), .item(), torch.no_grad()); remove that."
        )


def finite_loss(loss: float | Float[Tensor, ""], batch: Batch, where: str = "") -> float:
    """The loss of a batch as a number.

    Raises:
        NonFiniteError: It is infinite or not a number; names the batch, and `where` on the segment.
    """
    value = loss.item() if isinstance(loss, Tensor) else loss
    if not np.isfinite(value):
        raise NonFiniteError(
            f"The loss is {value} at batch {batch.index} ({batch.size} examples){where}. "
            "Check the data of that batch and the scale of the networks' parameters."
        )
    return value
