"""The precision, the kernels and the layout of images in memory that a network is trained with."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from lmc_curvature.forking.configuration import Precision
from lmc_curvature.objective.kernels import has_wrong_kernel


@contextlib.contextmanager
def training_kernels(device: torch.device, precision: Precision) -> Iterator[None]:
    """Within the block, a CUDA device computes by deterministic kernels, and rounds to TF32 only if asked to."""
    if device.type != "cuda":
        yield
        return
    rounds, before = precision == "tf32", torch.get_float32_matmul_precision()
    cudnn, asked = torch.backends.cudnn, "high" if rounds else "highest"
    with cudnn.flags(enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=rounds):
        # Setting what is set already would not be without effect on torch's other options of precision.
        if asked != before:
            torch.set_float32_matmul_precision(asked)
        try:
            yield
        finally:
            if asked != before:
                torch.set_float32_matmul_precision(before)


def fastest_layout(model: nn.Module, precision: Precision) -> torch.memory_format:
    """The layout of images in which a network is trained fastest on its device: channels-last, with exceptions.

    On several threads of a CPU, torch's backward pass of batch normalisation takes four times longer on channels-last
    images than on one, and some convolutions have a wrong gradient (`has_wrong_kernel`). On a GPU channels-last is
    what tensor cores take, which do not compute in float32.
    """
    if next(model.parameters()).device.type != "cpu":
        slower = precision == "float32"
    else:
        modules = list(model.modules())
        slower = torch.get_num_threads() > 1 and any(isinstance(module, nn.BatchNorm2d) for module in modules)
        slower = slower or any(map(has_wrong_kernel, modules))
    return torch.contiguous_format if slower else torch.channels_last
