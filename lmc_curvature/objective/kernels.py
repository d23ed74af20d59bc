"""Convolutions whose kernel in oneDNN is wrong, and the same convolutions by another kernel."""

from typing import Any

from torch import Tensor, nn

# The channels that a kernel takes at a time: eight by AVX2, sixteen by AVX-512.
_BLOCK = 16


def has_wrong_kernel(module: nn.Module) -> bool:
    """Tell if a module's gradient may be wrong where images are channels-last, on a CPU.

    oneDNN's gradient of the weights of 1×1 convolutions of few channels, with a stride, writes beyond its own memory
    where images are channels-last (its issue 6035): the process ends, hangs or goes on with wrong numbers.
    """
    return isinstance(module, nn.Conv2d) and _is_wrong(module.weight, module.stride, module.padding)


def right_kernel(input: Tensor, weight: Tensor, stride: Any, padding: Any) -> tuple[Tensor, Any]:
    """The images and the stride of `F.conv2d`; where its kernel is wrong, the pixels that it strides to, and 1."""
    if input.device.type != "cpu" or not _is_wrong(weight, stride, padding):
        return input, stride
    rows, columns = _pair(stride)
    return input[..., ::rows, ::columns], 1


def _is_wrong(weight: Tensor, stride: Any, padding: Any) -> bool:
    few = weight.ndim == 4 and weight.shape[1] < _BLOCK and tuple(weight.shape[2:]) == (1, 1)
    return few and max(_pair(stride)) > 1 and (padding == "valid" or (padding != "same" and max(_pair(padding)) == 0))


def _pair(value: Any) -> tuple[int, int]:
    rows, columns = (value, value) if isinstance(value, int) else (value[0], value[-1])
    return rows, columns
