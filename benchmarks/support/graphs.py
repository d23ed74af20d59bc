"""Work that a GPU repeats, as one CUDA graph, so that it does not wait for launches from Python."""

from collections.abc import Callable
from typing import Any

import torch

from lmc_curvature.replay import graph_of, on_stream

# What libraries choose or allocate at first calls must be over before the work is captured.
_WARM_UPS = 3


def replayed(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The function that replays what a call does on a CUDA device; elsewhere the call itself.

    What the call reads must stay where it is: a replay reads it there again. The replay returns nothing.
    """
    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream(device)
    with on_stream(stream):
        for _ in range(_WARM_UPS):
            run()
    graph, _ = graph_of(run, stream, torch.cuda.graph_pool_handle())
    return graph.replay
