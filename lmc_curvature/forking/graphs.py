"""Steps of training as CUDA graphs: recorded once, and replayed with one call in place of a launch for each kernel.

A recorded step reads and writes the same addresses at every replay, and does what it did when it was recorded. So it
must not wait for the device, whose answers it could not follow, nor draw random numbers: torch keeps one sequence of
these for a device, and networks trained side by side need one each.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lmc_curvature.agreement import near
from lmc_curvature.objective.randomness import drawing_module

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
    generator = torch.cuda.default_generators[stream.device_index]
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
        random_state, graph = generator.clone_state(), torch.cuda.CUDAGraph()
        try:
            with _waiting_refused():
                take(step)
            expected = outcome()
            # Other threads may use the device meanwhile; the step itself computes gradients in one.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                step()
        except RuntimeError as error:
            # A capture that fails leaves the generator in its midst, where nothing can be drawn, and the allocator.
            generator.graphsafe_set_state(random_state)
            with contextlib.suppress(RuntimeError, AttributeError):
                torch._C._cuda_endAllocateToPool(stream.device_index, pool)
            return _first_line(error)
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


@contextlib.contextmanager
def _waiting_refused() -> Iterator[None]:
    """Within the block, an operation that waits for the device raises a RuntimeError that names it.

    It would also end a capture, which then can name no reason.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        # That it does not detect all.
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _first_line(error: BaseException) -> str:
    """The first line of the error that led to an error: that of the operation, not that of the end of the capture."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
