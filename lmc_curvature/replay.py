"""Functions of tensors as CUDA graphs: recorded once, and replayed with one call in place of a launch for each kernel.

A graph reads and writes the same addresses at every replay, and does what it did when it was recorded. So what is
recorded must not wait for the device, whose answers it could not follow, nor draw random numbers: torch keeps one
sequence of these for a device.
"""

import contextlib
import functools
import gc
import traceback
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmc_curvature.agreement import all_near
from lmc_curvature.errors import FallbackWarning, LMCCurvatureError

Outcome = tuple[Sequence[Tensor], Any]
"""Tensors that were computed, and what says how they are to be read."""

Recorder = Callable[[Callable[[], Outcome]], tuple[Callable[[], Any], Outcome]]
"""A function that records a call: it returns what repeats the call, and where the tensors are then."""

# Functions that are kept at the same time.
_MOST = 8
# Kernels that are timed for a convolution: each takes the first call longer.
_KERNELS = 4
# Streams that torch has for a device.
_STREAMS = 32


class Replays:
    """Calls functions of tensors, and records those that are called again, to replay them from then on.

    The first call of a function lets libraries choose their kernels, and is all that is paid for what is called once.
    A function that cannot be recorded, or does something else when it is replayed, is called as it is, with a warning
    that says why.

    A replay computes in memory of its own, which stays taken for as long as it may be called: all of them share as much
    as the largest needs, beside copies of what each is given and what each returns, with what that holds. It is freed
    with this object. Where there is no room for another function, or one cannot be recorded, all are forgotten, and it
    takes more calls until one is recorded again.

    Args:
        make_recorder: Makes what records calls, anew whenever all were forgotten, since a pool whose graphs are gone
            cannot be used again. None where functions are only called.
        most: Functions to keep.
    """

    def __init__(self, make_recorder: Callable[[], Recorder] | None, *, most: int = _MOST):
        self._make_recorder, self._most = make_recorder, most
        self._recorder: Recorder | None = None
        self._replays: dict[Hashable, _Replay] = {}
        # By hash, so that nothing is kept alive.
        self._calls: dict[int, int] = {}
        self._failures: set[int] = set()
        self._patience, self._has_warned = 1, False

    @classmethod
    def on(cls, device: torch.device) -> "Replays":
        """Those of a device: recorded on a CUDA device, and called on any other."""
        return cls(functools.partial(CudaRecorder, device) if device.type == "cuda" else None)

    @property
    def records(self) -> bool:
        """Whether functions are recorded at all."""
        return self._make_recorder is not None

    def holds(self, key: Hashable) -> bool:
        """Whether a function was recorded, so that the last call of it was a replay."""
        return _with_precision(key) in self._replays

    def __call__(
        self,
        key: Hashable,
        function: Callable[[list[Tensor]], Outcome],
        inputs: list[Tensor],
        *,
        at_once: bool = False,
    ) -> Outcome:
        """What a function makes of tensors.

        Args:
            key: A value that differs between functions that do something else, and between shapes and types of inputs.
            function: The function, of nothing but the inputs that changes from call to call.
            inputs: Tensors on the device.
            at_once: Record the first call already.

        Returns:
            What the function returns. No later call changes the tensors; what says how to read them is that of the call
            that was recorded.
        """
        if self._make_recorder is None:
            return function(inputs)
        with fastest_kernels():
            return self._call(self._make_recorder, _with_precision(key), function, inputs, at_once)

    def _call(
        self,
        make_recorder: Callable[[], Recorder],
        key: Hashable,
        function: Callable[[list[Tensor]], Outcome],
        inputs: list[Tensor],
        at_once: bool,
    ) -> Outcome:
        if key not in self._replays:
            calls = self._calls[hash(key)] = self._calls.get(hash(key), 0) + 1
            if hash(key) in self._failures or (calls <= self._patience and not at_once):
                return function(inputs)
            if len(self._replays) >= self._most:
                self.forget()
            self._recorder = self._recorder or make_recorder()
            try:
                self._replays[key] = _Replay(self._recorder, function, inputs)
            except Exception as error:  # noqa: BLE001 - whatever it is, it comes again, or does not, where it is called
                self._note_failure(key, error)
        # Where it failed, what had been computed until then is free by now.
        replay = self._replays.get(key)
        return function(inputs) if replay is None else replay(inputs)

    def _note_failure(self, key: Hashable, error: Exception) -> None:
        # What was begun and goes may take with it what others are computed in.
        self.forget()
        self._failures.add(hash(key))
        if not self._has_warned:
            warnings.warn(
                "Operations are launched one by one, which is slower, because they cannot be replayed as a CUDA graph: "
                f"{reason_of(error)}{_line_of(error)}.",
                FallbackWarning,
                stacklevel=5,
            )
        self._has_warned = True

    def forget(self) -> None:
        """Forget all functions, whose recordings go, and be slower to record them again."""
        self._replays.clear()
        self._recorder = None
        self._calls.clear()
        self._patience *= 2


@contextlib.contextmanager
def fastest_kernels() -> Iterator[None]:
    """Within the block, cuDNN times its kernels for a convolution that is new to it, and keeps the fastest.

    What it takes otherwise is a guess, for many small images at once up to forty times slower: Fourier transforms.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.benchmark_limit
    cudnn.benchmark, cudnn.benchmark_limit = True, _KERNELS
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.benchmark_limit = before


def _with_precision(key: Hashable) -> Hashable:
    """A key, with what decides which kernels compute matrix products: they are recorded, too."""
    return key, torch.backends.cuda.matmul.fp32_precision


class _Replay:
    """A function that was recorded with copies of its inputs."""

    def __init__(self, recorder: Recorder, function: Callable[[list[Tensor]], Outcome], inputs: list[Tensor]):
        buffers = [torch.empty_like(tensor) for tensor in inputs]
        # The same tensors, for autograd others: what it has recorded may be replayed with other numbers.
        self._buffers = [buffer.data for buffer in buffers]
        copy_all(self._buffers, inputs)
        self._replay, self._outcome = recorder(lambda: function(buffers))

    def __call__(self, inputs: list[Tensor]) -> Outcome:
        copy_all(self._buffers, inputs)
        self._replay()
        tensors, layout = self._outcome
        return [tensor.clone() for tensor in tensors], layout


@torch.no_grad()
def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors into others of the same shapes and types, those of one type with one call."""
    for dtype in {tensor.dtype for tensor in targets}:
        pairs = [pair for pair in zip(targets, sources, strict=True) if pair[0].dtype == dtype]
        torch.ops.aten._foreach_copy_.default([target for target, _ in pairs], [source for _, source in pairs])


class CudaRecorder:
    """Records calls as CUDA graphs, on one stream and in one pool of memory.

    They must not be replayed at the same time, and where one is destroyed all must be: with it goes what cuBLAS
    computes in on its stream. So no other recorder has the same.

    Args:
        device: The device.
    """

    # What is garbage, and not yet collected, still has its graphs.
    _all: ClassVar["weakref.WeakSet[CudaRecorder]"] = weakref.WeakSet()

    def __init__(self, device: torch.device):
        self._device = device

    @functools.cached_property
    def _place(self) -> tuple[torch.cuda.Stream, Any]:
        """The stream and the pool."""
        # torch has a few streams, and hands them out again and again.
        streams, taken = (
            [torch.cuda.Stream(self._device) for _ in range(_STREAMS)],
            [each._place[0] for each in self._all],
        )
        stream = next((stream for stream in streams if stream not in taken), streams[0])
        self._all.add(self)
        return stream, torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Outcome]) -> tuple[Callable[[], Any], Outcome]:
        """The graph's replay and its outcome, which was compared with that of the call itself.

        Raises:
            RuntimeError: What is called waits for the device, or does something else when it is replayed.
        """
        stream, pool = self._place
        with on_stream(stream):
            with waiting_refused():
                expected, _ = run()
            graph, outcome = graph_of(run, stream, pool)
        graph.replay()
        if not all(_is_same(*pair) for pair in zip(outcome[0], expected, strict=True)):
            raise RuntimeError("a replay gives other numbers than the call that was recorded")
        return graph.replay, outcome


def _is_same(found: Tensor, expected: Tensor) -> bool:
    if expected.is_floating_point():
        return all_near("replays", found, expected, rounding=0.0)
    return torch.equal(found, expected)


@contextlib.contextmanager
def on_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """Within the block, a stream is the current one: it waits for what was asked before, and is waited for after."""
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        current.wait_stream(stream)


def graph_of(run: Callable[[], Any], stream: torch.cuda.Stream, pool: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A call as a CUDA graph, and what it returned: tensors without numbers until the graph is replayed.

    It should have been made on the stream before, where libraries choose their kernels and allocate their workspaces.

    Args:
        run: The call.
        stream: The stream to record it on.
        pool: The pool of memory that it computes in.
    """
    generator = torch.cuda.default_generators[stream.device_index]
    random_state, graph = generator.clone_state(), torch.cuda.CUDAGraph()
    collects = gc.isenabled()
    # Other graphs may be garbage, and are not to be destroyed in between.
    gc.disable()
    try:
        # Other threads may use the device meanwhile; gradients are computed in one.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            returned = run()
    except Exception:
        # A capture that fails leaves the generator in its midst, where nothing can be drawn, and the allocator.
        generator.graphsafe_set_state(random_state)
        with contextlib.suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(stream.device_index, pool)
        raise
    finally:
        if collects:
            gc.enable()
    return graph, returned


@contextlib.contextmanager
def waiting_refused() -> Iterator[None]:
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


def reason_of(error: BaseException) -> str:
    """The first line of the error that led to an error: that of the operation, not that of the end of the capture.

    One of this library is in words of its own.
    """
    while error.__context__ is not None and not isinstance(error, LMCCurvatureError):
        error = error.__context__
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__


def _line_of(error: BaseException) -> str:
    """The last line of other code than torch's and the library's that led to an error, to end a sentence with."""
    while error.__context__ is not None:
        error = error.__context__
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    return f" ({frames[-1].filename}, line {frames[-1].lineno}: {frames[-1].line})" if frames else ""
