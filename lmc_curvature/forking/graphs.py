"""Steps of training as CUDA graphs (see `replay.py`), of networks that are trained side by side."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lmc_curvature.agreement import near
from lmc_curvature.objective.randomness import drawing_module
from lmc_curvature.replay import graph_of, reason_of, waiting_refused

# Libraries choose their kernels and allocate their workspaces in the first calls on a stream.
_WARM_UPS = 2

Step = Callable[[], Any]


def record_steps(
    model: nn.Module,
    steps: Mapping[int, Step],
    stream: torch.cuda.Stream,
    *,
    rewind: Step,
    outcome: Callable[[], Float[Tensor, "2"]],
) -> dict[int, Step] | str:
    """Return the replays of some steps, or why a step cannot be replayed.

    The steps are taken a few times first, and each replay once, to compare it with the step itself: a network that
    counts its calls, or keeps what it has computed, may go on otherwise than it was recorded.

    Args:
        model: The network that the steps train.
        steps: The steps by the number of their examples. One is never run while another is.
        stream: The current stream, on which they are to be replayed, and no other step is. What cuBLAS computes in
            belongs to a stream, and goes with any graph that was recorded on it: networks that shared one could not be
            trained side by side.
        rewind: Called before each step that is taken, so that all are the same.
        outcome: The sum of the losses of the step that was taken, and how far it has moved the network.
    """
    pool = torch.cuda.graph_pool_handle()
    replays: dict[int, Step] = {}

    def take(step: Step) -> None:
        rewind()
        step()

    for size, step in steps.items():
        for _ in range(_WARM_UPS):
            take(step)
        drawing = drawing_module(model, partial(take, step))
        if drawing is not None:
            return f"module {drawing or type(model).__name__!r} draws random numbers"
        try:
            with waiting_refused():
                take(step)
            expected = outcome()
            graph, _ = graph_of(step, stream, pool)
        except RuntimeError as error:
            return reason_of(error)
        take(graph.replay)
        found, rounding = outcome(), torch.finfo(torch.float32).eps
        if not near("replays", found, expected, rounding=rounding, scale=expected.abs()).all():
            loss, moved, other_loss, other_moved = (*expected.tolist(), *found.tolist())
            return (
                f"the losses of its examples sum to {loss:.6g} and it moves the network by {moved:.6g}, and replayed "
                f"these are {other_loss:.6g} and {other_moved:.6g}"
            )
        replays[size] = graph.replay
    return replays
