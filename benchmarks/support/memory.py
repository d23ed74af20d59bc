"""Memory that a computation has allocated at its peak, and memory that is free."""

import gc
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# Assumed where the system does not tell.
_UNKNOWN_FREE_BYTES = 4 * 2**30


def peak_bytes(run: Callable[[], Any], device: torch.device) -> float:
    """Bytes that a call has allocated at its peak, over what was allocated before it.

    On CUDA the allocator keeps count. On a CPU torch has no such counter, but its profiler is told of everything that
    the allocator gives and takes back (oneDNN's scratch space among it): the running sum's maximum is the peak.
    Memory that the call frees but did not allocate is not seen by either.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device) - before)
    return _profiled_peak(run)


def graph_pool_bytes(device: torch.device) -> float:
    """Bytes that CUDA graphs keep to themselves, replayed or not; they count as allocated in no replay."""
    if device.type != "cuda":
        return 0.0
    segments = torch.cuda.memory_snapshot()
    return float(
        sum(
            segment["total_size"]
            for segment in segments
            if tuple(segment["segment_pool_id"]) != (0, 0) and segment["device"] == (device.index or 0)
        )
    )


def _profiled_peak(run: Callable[[], Any]) -> float:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events: Any = recorded.profiler
    # Not recorded.events(), which leaves out what it can attribute to an operation.
    changes = [event for event in events.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        total += change.nbytes()
        peak = max(peak, total)
    return float(peak)


def free_bytes(device: torch.device) -> float:
    """Bytes of memory that nobody uses."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError):
        return float(_UNKNOWN_FREE_BYTES)


def columns_that_fit(
    run_columns: Callable[[int], Any],
    columns: int,
    device: torch.device,
    *,
    probe: int = 2,
    free: float | None = None,
) -> int:
    """The number of columns that a vectorised road can take at once, in two thirds of the memory that is free.

    Args:
        run_columns: Does the work for the first columns, for a given number of them.
        columns: Number of all columns.
        device: The device that must hold them.
        probe: Number of columns to estimate the need from, which is taken to be proportional.
        free: Bytes that are free; by default those of the device.

    Returns:
        The number; 1 if the work fails, as is then seen when it is measured.
    """
    probe = min(probe, columns)
    try:
        run_columns(probe)
        each = max(peak_bytes(lambda: run_columns(probe), device) / probe, 1.0)
    except RuntimeError:
        return 1
    free = free_bytes(device) if free is None else free
    return max(1, min(columns, int(free * 2 / 3 / each)))
