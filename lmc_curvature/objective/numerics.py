"""How an objective computes: the layout of images in memory."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lmc_curvature.errors import UnsupportedModelError
from lmc_curvature.objective.batches import Batch, map_tensors


def channels_last(batch: Batch) -> Batch:
    """The same batch, its images (floating-point tensors of four axes) laid out channels-last."""
    return Batch(batch.index, batch.size, map_tensors(_channels_last, batch.data))


def _channels_last(tensor: Tensor) -> Tensor:
    images = tensor.ndim == 4 and tensor.is_floating_point()
    return tensor.contiguous(memory_format=torch.channels_last) if images else tensor


def prefers_channels_last(network: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device convolves images faster where their channels come last.

    oneDNN's convolutions, on a CPU, save a copy each of their operands then, and all that follows the first
    convolution inherits its layout.
    """
    return (
        device.type == "cpu"
        and dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and any(isinstance(module, nn.Conv2d) for module in network.modules())
    )


def ignores_layout(loss: Callable[[Batch], Tensor], batch: Batch) -> bool:
    """Whether a loss is the same where images are channels-last; some networks cannot bear it (`x.view(...)`)."""
    with torch.no_grad():
        expected = loss(batch)
        try:
            return bool(torch.isclose(loss(channels_last(batch)), expected, rtol=1e-3, equal_nan=True))
        except (RuntimeError, UnsupportedModelError):
            return False


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type for sums of many numbers: float32 for half precision, which a sum does not fit into, else the same."""
    return torch.promote_types(dtype, torch.float32)
