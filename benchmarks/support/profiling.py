"""Time of a computation by ATen operation, and the rest, which is Python's."""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.support.report import Table
from benchmarks.support.timing import seconds_once

# The first kind whose words an operation's name contains.
_KINDS = {
    "convolution, backward": ("convolution_backward", "conv_backward", "cudnn_convolution_backward", "dgrad", "wgrad"),
    "convolution, forward": ("conv",),
    "matrix product": ("mm", "linear", "dot", "matmul", "gemm"),
    "copy and layout": ("copy_", "contiguous", "clone", "to_copy", "cat", "stack", "fill_", "zero", "pad", "Memcpy"),
    "reduction": ("sum", "mean", "max_pool", "softmax", "norm"),
    "allocation and views": (
        "empty",
        "view",
        "reshape",
        "as_strided",
        "slice",
        "select",
        "expand",
        "permute",
        "resize",
    ),
    "elementwise": ("",),
}


def add_profile(parser: argparse.ArgumentParser) -> None:
    """Add the option that asks for `profile_table`."""
    parser.add_argument("--profile", action="store_true", help="also show where our time goes")


def profile_table(what: str, run: Callable[[], Any], device: torch.device, *, top: int = 12) -> Table:
    """Time within operations by kind, and the operations that take most of it.

    On CUDA the times are those of the kernels; on a CPU, those within operations, without what they call. The profiler
    slows Python down, so what is left for it is measured against the same call without the profiler.
    """
    run()
    wall = min(seconds_once(run)[0] for _ in range(3))
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as recorded:
        run()
    times = [
        (event.key, event.count, event.self_device_time_total if cuda else event.self_cpu_time_total)
        for event in recorded.key_averages()
        # Kernels are listed themselves, too; their time is that of the operations that launched them.
        if event.device_type.name == "CPU"
    ]
    times = sorted((entry for entry in times if entry[2] > 0), key=lambda entry: -entry[2])
    kinds: dict[str, tuple[int, float]] = {}
    for name, count, microseconds in times:
        kind = next(kind for kind, words in _KINDS.items() if any(word in name for word in words))
        calls, total = kinds.get(kind, (0, 0.0))
        kinds[kind] = (calls + count, total + microseconds)
    inside = sum(total for _, total in kinds.values()) / 1e6
    rows = [_row(f"all: {kind}", *kinds[kind], wall) for kind in sorted(kinds, key=lambda kind: -kinds[kind][1])]
    rows.append(_row("outside operations (Python, dispatch)", None, 1e6 * max(wall - inside, 0.0), wall))
    rows += [_row(name, count, microseconds, wall) for name, count, microseconds in times[:top]]
    return Table("profile", f"Time of {what} by operation (share of a call without the profiler)", rows)


def _row(operation: str, calls: int | None, microseconds: float, wall: float) -> dict[str, Any]:
    return {"operation": operation, "calls": calls, "ms": microseconds / 1000, "share": microseconds / 1e6 / wall}
