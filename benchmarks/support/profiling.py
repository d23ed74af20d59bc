"""Time of a computation by ATen operation, and the rest, which is Python's."""

import argparse
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Occupation:
    """The time of a call, and the time within it in which a device works.

    Attributes:
        seconds: Of the call, without the profiler.
        kernel_seconds: In which a kernel ran, or on a CPU an operator; those at the same time count once.
    """

    seconds: float
    kernel_seconds: float

    @property
    def share(self) -> float:
        """The part of the call in which the device works; not-a-number where the profiler saw no kernel."""
        return self.kernel_seconds / self.seconds if self.kernel_seconds else math.nan


def occupation(run: Callable[[], Any], device: torch.device, *, calls: int = 3) -> Occupation:
    """How much of a call's time the device works, from calls after the first; kernels of replayed graphs count, too."""
    run()
    wall = statistics.median(seconds_once(run)[0] for _ in range(calls))
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as recorded:
        run()
        if cuda:
            torch.cuda.synchronize(device)
    events: Any = recorded.profiler
    spans = [
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in events.kineto_results.events()
        if _is_work(event, cuda)
    ]
    return Occupation(wall, covered(spans) / 1e9)


def _is_work(event: Any, cuda: bool) -> bool:
    if event.is_user_annotation() or event.name().startswith(("Memcpy", "Memset", "[memory]")):
        return False
    return (event.device_type().name == "CUDA") if cuda else "::" in event.name()


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of some spans, each from a start to an end."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _row(operation: str, calls: int | None, microseconds: float, wall: float) -> dict[str, Any]:
    return {"operation": operation, "calls": calls, "ms": microseconds / 1000, "share": microseconds / 1e6 / wall}
