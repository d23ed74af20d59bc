"""Channels-last images, where a processor convolves them faster."""

import weakref
from collections.abc import Callable
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lmc_curvature.errors import UnsupportedModelError
from lmc_curvature.objective.batches import Batch, map_tensors
from lmc_curvature.objective.network import State
from lmc_curvature.objective.risk import Objective

Result = TypeVar("Result")

# Whether a network was found to compute the same from images that are channels-last.
_INDIFFERENT: weakref.WeakKeyDictionary[Objective, bool] = weakref.WeakKeyDictionary()


def in_best_layout(
    objective: Objective,
    state: State,
    batch: Batch,
    compute: Callable[[Batch], tuple[Float[Tensor, ""], Result]],
) -> Result:
    """Compute something from a batch whose images are laid out as the device convolves them fastest.

    oneDNN's convolutions, on a CPU, save a copy each of their operands when channels come last, and all that follows
    the first convolution inherits its layout. A network that cannot bear it (`x.view(...)` of an image) gets the batch
    as it is, then and ever after.

    Args:
        objective: The loss, whose network may be indifferent to the layout.
        state: The state that `compute` evaluates it at.
        batch: The examples.
        compute: Called with the batch in one layout or the other, once or twice; returns the batch's loss and a result.

    Returns:
        The result of `compute`.
    """
    if not _convolves_channels_last(objective) or not _INDIFFERENT.get(objective, True):
        return compute(batch)[1]
    try:
        loss, result = compute(channels_last(batch))
    except (RuntimeError, UnsupportedModelError):
        # If it was not the layout, the same error comes again.
        result = compute(batch)[1]
        _INDIFFERENT[objective] = False
        return result
    if objective not in _INDIFFERENT:
        _INDIFFERENT[objective] = _same_loss(objective, state, batch, loss)
    return result if _INDIFFERENT[objective] else compute(batch)[1]


def channels_last(batch: Batch) -> Batch:
    """The same batch, its images (floating-point tensors of four axes) laid out channels-last."""
    return Batch(batch.index, batch.size, map_tensors(_channels_last, batch.data))


def _channels_last(tensor: Tensor) -> Tensor:
    images = tensor.ndim == 4 and tensor.is_floating_point()
    return tensor.contiguous(memory_format=torch.channels_last) if images else tensor


def _convolves_channels_last(objective: Objective) -> bool:
    return (
        objective.device.type == "cpu"
        and objective.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and any(isinstance(module, nn.Conv2d) for module in objective.network.modules())
    )


def _same_loss(objective: Objective, state: State, batch: Batch, loss: Float[Tensor, ""]) -> bool:
    with torch.no_grad():
        return bool(torch.isclose(loss, objective.batch_loss(state, batch), rtol=1e-3, equal_nan=True))
