"""The precision, the kernels and the layout of images in memory that an objective computes with."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lmc_curvature.agreement import near
from lmc_curvature.errors import LMCCurvatureError
from lmc_curvature.objective.batches import Batch, map_tensors
from lmc_curvature.objective.differentiable import plain_calls


@contextlib.contextmanager
def outside_inference() -> Iterator[None]:
    """Within the block, tensors can take part in differentiation, also under `torch.inference_mode()`."""
    gradients = torch.is_grad_enabled()
    # Leaving that mode would switch gradients on.
    with torch.inference_mode(False), torch.set_grad_enabled(gradients):
        yield


@dataclass(frozen=True)
class Numerics:
    """The precision and the kernels that a network is computed with.

    Attributes:
        device: The device.
        dtype: The floating-point type.
        allow_tf32: Whether convolutions on a CUDA device may round float32 to TF32.
        recurrent: Whether the network has recurrent layers: cuDNN's kernels for them have no second derivative.
    """

    device: torch.device
    dtype: torch.dtype
    allow_tf32: bool = False
    recurrent: bool = False

    @classmethod
    def of(cls, network: nn.Module, device: torch.device, dtype: torch.dtype, allow_tf32: bool) -> "Numerics":
        """Those of a network."""
        return cls(device, dtype, allow_tf32, any(isinstance(module, nn.RNNBase) for module in network.modules()))

    @property
    def rounding(self) -> float:
        """Relative rounding error of one operation as things are: that of TF32 or of autocast where they are on."""
        kind = self.device.type
        errors = [torch.finfo(self.dtype).eps]
        if kind == "cuda" and self.dtype == torch.float32 and self.allow_tf32:
            errors.append(2.0**-10)
        if torch.is_autocast_enabled(kind):
            errors.append(torch.finfo(torch.get_autocast_dtype(kind)).eps)
        return max(errors)

    def exact(self, *, cudnn: bool = True) -> AbstractContextManager[None]:
        """Within the block, convolutions on a CUDA device are deterministic, and rounded to TF32 only if allowed.

        Where `torch.backends.cudnn.benchmark` is on, cuDNN times its kernels, and which is fastest may change from run
        to run.

        Args:
            cudnn: Let cuDNN compute.
        """
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        now = torch.backends.cudnn
        return now.flags(
            enabled=cudnn,
            benchmark=now.benchmark,
            benchmark_limit=now.benchmark_limit,
            deterministic=True,
            allow_tf32=self.allow_tf32,
        )

    @contextlib.contextmanager
    def differentiating_operations(self) -> Iterator[None]:
        """Within the block, operations of an existing graph have exact first and second derivatives."""
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            # The fused attention kernels have no second derivative; the plain mathematics has.
            sdpa_kernel(SDPBackend.MATH),
            self.exact(cudnn=not self.recurrent),
        ):
            yield

    @contextlib.contextmanager
    def differentiating(self) -> Iterator[None]:
        """Within the block, all that a network calls has exact first and second derivatives."""
        with self.differentiating_operations(), plain_calls():
            yield


def channels_last(batch: Batch) -> Batch:
    """A batch whose images (floating-point tensors of four axes) are laid out channels-last."""
    return dataclasses.replace(batch, data=map_tensors(_channels_last, batch.data))


def _channels_last(tensor: Tensor) -> Tensor:
    images = tensor.ndim == 4 and tensor.is_floating_point()
    return tensor.contiguous(memory_format=torch.channels_last) if images else tensor


def bears_channels_last(network: nn.Module, numerics: Numerics, loss: Callable[[Batch], Tensor], batch: Batch) -> bool:
    """Tell if images whose channels come last are convolved faster, and have the same loss, on some batch."""
    return prefers_channels_last(network, numerics.device, numerics.dtype) and ignores_layout(loss, batch)


def prefers_channels_last(network: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Tell if a device convolves images faster where their channels come last.

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
    """Tell if a loss is the same where images are channels-last; some networks cannot bear it (`x.view(...)`)."""
    with torch.no_grad():
        expected = loss(batch)
        try:
            found = loss(channels_last(batch))
            rounding = torch.finfo(expected.dtype).eps
            return bool(near("layout", found, expected, rounding=rounding, scale=expected.abs(), floor=1e-8))
        except (RuntimeError, LMCCurvatureError):
            return False


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type for sums of many numbers: float32 for half precision, which a sum does not fit into, else the same."""
    return torch.promote_types(dtype, torch.float32)


def largest_values(tensors: Iterable[Tensor]) -> Tensor:
    """The largest magnitude in each tensor: infinite or not a number where one of its values is.

    With few calls for all of them, so that a CUDA device is asked once about a whole state.
    """
    filled = [tensor if tensor.numel() else tensor.new_zeros(1) for tensor in tensors]
    return torch.stack(torch.ops.aten._foreach_norm.Scalar(filled, float("inf"))) if filled else torch.zeros(0)
