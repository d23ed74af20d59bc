"""Work that a GPU repeats, as one CUDA graph, so that it does not wait for launches from Python."""

import gc
from collections.abc import Callable
from typing import Any

import torch

# What libraries choose or allocate at first calls must be over before the work is captured.
_WARM_UPS = 3


def replayed(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The function that replays what a call does on a CUDA device; elsewhere the call itself.

    What the call reads must stay where it is: a replay reads it there again. The replay returns nothing.
    """
    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    # Nothing may be freed while it is captured.
    gc.collect()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph.replay
