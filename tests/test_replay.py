"""Claim: what is replayed is what a call would return, and what cannot be replayed is called, with a warning.

A CUDA device is stood in for, so that no machine needs one; where there is one, graphs are recorded on it.
"""

import contextlib
import gc
import itertools
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch

from lmc_curvature.errors import CaptureError, FallbackWarning
from lmc_curvature.objective.numerics import Numerics
from lmc_curvature.replay import CudaRecorder, Replays, copy_all, reason_of
from tests.support.devices import gpu
from tests.support.replaying import Repeater

# What stands in for a CUDA device's streams and graphs is of other types.
pytestmark = pytest.mark.usefixtures("untyped")


def squares(tensors):
    return [tensor.square() for tensor in tensors], ("squares", len(tensors))


def inputs(seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 3, 4, 4, generator=generator).contiguous(memory_format=torch.channels_last)
    return [torch.randn(3, generator=generator), torch.randint(9, (2, 2), generator=generator), images]


def test_a_function_is_recorded_at_its_second_call_and_replayed_from_then_on():
    repeater = Repeater()
    replays, found = Replays(lambda: repeater), []
    for call in range(5):
        found.append(replays("squares", squares, inputs(call)))
        assert (repeater.recorded, repeater.replayed) == (min(call, 1), call)
    # Later calls have changed nothing of earlier ones.
    for call, (tensors, layout) in enumerate(found):
        assert layout == ("squares", 3)
        torch.testing.assert_close(tensors, squares(inputs(call))[0], rtol=0, atol=0)


def test_where_nothing_is_recorded_functions_are_called():
    replays = Replays.on(torch.device("cpu"))
    assert not replays.records
    tensors = inputs(0)
    outcome = [tensors], None
    assert replays("same", lambda given: ([given], None), tensors) == outcome


def test_what_is_recorded_convolves_by_the_kernels_that_were_fastest():
    cudnn, seen = torch.backends.cudnn, []

    def look(given):
        # As whatever computes derivatives does.
        with Numerics(torch.device("cuda"), torch.float32).exact():
            seen.append((cudnn.benchmark, cudnn.deterministic))
        return list(given), None

    before = cudnn.benchmark, cudnn.benchmark_limit
    for replays in (Replays(Repeater), Replays(None)):
        replays("look", look, inputs(0))
        assert before == (cudnn.benchmark, cudnn.benchmark_limit)
    assert seen == [(True, True), (before[0], True)]


def test_functions_are_told_apart_by_their_keys():
    replays = Replays(Repeater)
    for call in range(3):
        for key, power in (("square", 2), ("cube", 3)):
            ((found,), _) = replays(key, lambda given, n=power: ([given[0] ** n], None), inputs(call))
            torch.testing.assert_close(found, inputs(call)[0] ** power)


def test_where_there_is_no_room_all_are_forgotten_and_recording_takes_more_calls():
    repeater = Repeater()
    replays = Replays(lambda: repeater, most=2)
    for key in ("a", "a", "b", "b", "c", "c"):
        replays(key, squares, inputs(0))
    assert repeater.recorded == 3
    # Of those that went, none is recorded at its next two calls.
    for recorded in (3, 3, 4):
        replays("a", squares, inputs(0))
        assert repeater.recorded == recorded


def test_where_nothing_is_left_that_was_recorded_another_recorder_records():
    made = []

    def make_recorder():
        made.append(Repeater())
        # The second can record nothing.
        return (lambda run: 1 / 0) if len(made) == 2 else made[-1]

    replays = Replays(make_recorder, most=2)

    def call(key, times):
        for _ in range(times):
            replays(key, squares, inputs(0))
        return [recorder.recorded for recorder in made]

    assert call("a", 2) == [1]
    assert call("b", 2) == [2]
    with pytest.warns(FallbackWarning, match="division by zero"):
        assert call("c", 2) == [2, 0]
    # That one is not tried again, and others later.
    assert call("c", 9) == [2, 0]
    assert call("a", 4) == [2, 0]
    assert call("a", 1) == [2, 0, 1]


def test_what_is_known_to_be_called_again_is_recorded_at_once():
    repeater = Repeater()
    replays = Replays(lambda: repeater)
    assert not replays.holds("a")
    replays("a", squares, inputs(0), at_once=True)
    assert (repeater.recorded, repeater.replayed, replays.holds("a")) == (1, 1, True)


def test_other_precision_of_matrix_products_is_another_function(monkeypatch):
    repeater = Repeater()
    replays = Replays(lambda: repeater)
    for precision, recorded in (("ieee", 0), ("ieee", 1), ("tf32", 1), ("tf32", 2), ("ieee", 2)):
        monkeypatch.setattr(
            torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision=precision, allow_tf32=precision == "tf32")
        )
        replays("a", squares, inputs(0))
        assert repeater.recorded == recorded


def test_what_cannot_be_recorded_is_called_with_one_warning():
    def refused(run):
        raise CaptureError("Operation aten.sum of the loss cannot be swept: it waits.")

    replays = Replays(lambda: refused)
    replays("a", squares, inputs(0))
    with pytest.warns(
        FallbackWarning, match=r"because they cannot be .* graph: Operation aten.sum .*: it waits \(.*\.py, line"
    ):
        found = replays("a", squares, inputs(1))
    torch.testing.assert_close(found[0], squares(inputs(1))[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for key in ("a", "b", "b"):
            replays(key, squares, inputs(2))


def test_what_is_kept_is_freed_with_the_replays():
    class Device(torch.nn.Module):
        def forward(self, tensors):
            return squares(tensors)

    function, tensors, replays = Device(), inputs(0), Replays(lambda: lambda run: (lambda: None, run()))
    kept = [weakref.ref(function), *map(weakref.ref, tensors)]
    gc.disable()
    try:
        for _ in range(3):
            replays("a", function, tensors)
        (replay,) = replays._replays.values()
        buffers = [weakref.ref(buffer) for buffer in replay._buffers]
        del function, tensors, replay
        # Neither the function nor what it was given first.
        assert [reference() for reference in kept] == [None] * 4
        assert all(reference() is not None for reference in buffers)
        del replays
        assert [reference() for reference in buffers] == [None] * 3
    finally:
        gc.enable()


def test_inputs_are_copied_whatever_their_types_and_layouts():
    sources = [*inputs(3), torch.ones(2, requires_grad=True), torch.zeros(2).expand(3, 2), torch.tensor(4)]
    targets = [torch.empty_like(source) for source in sources]
    copy_all(targets, sources)
    assert not any(target.requires_grad for target in targets)
    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(target, source)


def test_the_reason_is_the_first_of_errors_or_one_in_words_of_our_own():
    def chained(*errors):
        try:
            try:
                raise errors[0]
            except type(errors[0]):
                raise errors[1]  # noqa: B904
        except type(errors[1]) as error:
            return reason_of(error)

    end = RuntimeError("operation failed due to a previous error during capture")
    assert chained(RuntimeError("it waits.\nmore"), end) == "it waits"
    assert chained(RuntimeError("it waits"), CaptureError("Operation aten.sum: it waits.")) == (
        "Operation aten.sum: it waits"
    )
    assert chained(CaptureError("Operation aten.sum: it waits"), end) == "Operation aten.sum: it waits"
    assert reason_of(KeyError()) == "KeyError"


# --- On a device that is stood in for


class Device:
    """Notes what is asked of a CUDA device, and ends a capture as torch does."""

    def __init__(self):
        self.events, self.waiting = [], 0
        self.own, self.current = (
            SimpleNamespace(
                name=name,
                device=torch.device("cuda", 0),
                device_index=0,
                wait_stream=lambda other, name=name: self.events.append(f"{name} waits for {other.name}"),
            )
            for name in ("own", "usual")
        )

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph, *, pool, stream, capture_error_mode):
        assert (pool, stream, capture_error_mode) == ("pool", self.own, "thread_local")
        self.events.append("capture")
        assert not gc.isenabled()
        try:
            yield
        except RuntimeError:
            # Torch notices at the end of the capture, and says no more.
            raise RuntimeError("operation failed due to a previous error during capture.")  # noqa: B904

    def call(self):
        """Note where, and whether it may wait."""
        self.events.append(f"call on {self.current.name}, {self.waiting}")

    def clone_state(self):
        return "fresh"

    def graphsafe_set_state(self, state):
        self.events.append(state)


@pytest.fixture
def device(monkeypatch):
    device = Device()
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: device.own)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: device.current)
    monkeypatch.setattr(torch.cuda, "stream", device.stream)
    monkeypatch.setattr(torch.cuda, "graph", device.graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "default_generators", (device,))
    graph = SimpleNamespace(replay=lambda: device.events.append("replay"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: device.waiting)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(device, "waiting", mode))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *where: device.events.append(where))
    return device


def test_a_call_is_made_on_the_stream_then_recorded_and_compared(device):
    def run():
        device.call()
        return [torch.ones(2), torch.tensor([1])], "layout"

    replay, (tensors, layout) = CudaRecorder(torch.device("cuda"))(run)
    assert device.events == [
        "own waits for usual",
        "call on own, error",
        "capture",
        "call on own, 0",
        "usual waits for own",
        "replay",
    ]
    assert (len(tensors), layout) == (2, "layout")
    replay()
    assert device.events[-1] == "replay"


def test_no_two_recorders_share_a_stream(device, monkeypatch):
    numbers = itertools.cycle(range(32))
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: next(numbers))
    # One that records nothing takes none.
    recorders = [CudaRecorder(torch.device("cuda")) for _ in range(40)]
    next(numbers)
    assert {recorder._place[0] for recorder in recorders[:32]} == set(range(32))
    # Where there is none left, one is shared.
    assert recorders[32]._place[0] in range(32)


def test_a_call_that_waits_is_named_before_it_is_recorded(device):
    def run():
        if device.waiting == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="called a synchronizing"):
        CudaRecorder(torch.device("cuda"))(run)
    assert device.events == ["own waits for usual", "usual waits for own"]
    assert (device.waiting, device.current.name) == (0, "usual")


def test_a_capture_that_fails_leaves_nothing_behind(device):
    def run():
        if not device.waiting:
            raise RuntimeError("operation not permitted when stream is capturing")
        return [], None

    with pytest.raises(RuntimeError) as found:
        CudaRecorder(torch.device("cuda"))(run)
    assert reason_of(found.value) == "operation not permitted when stream is capturing"
    assert device.events[2:] == ["fresh", (0, "pool"), "usual waits for own"]
    assert gc.isenabled()
    assert device.current.name == "usual"


@pytest.mark.parametrize("other", [torch.tensor([1.0, 2.1]), torch.tensor([1, 3])])
def test_a_replay_that_gives_other_numbers_is_refused(device, other):
    expected = torch.tensor([1, 2], dtype=other.dtype)
    with pytest.raises(RuntimeError, match="a replay gives other numbers"):
        CudaRecorder(torch.device("cuda"))(lambda: ([expected if device.waiting else other], None))


# --- On a device


@gpu
def test_a_graph_gives_what_its_call_gives():
    replays = Replays.on(torch.device("cuda"))

    def run(tensors):
        weight, x = (tensor.detach().requires_grad_() for tensor in tensors)
        loss = torch.tanh(x @ weight).square().sum()
        return torch.autograd.grad(loss, [weight, x]), "layout"

    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        tensors = [torch.randn(*shape, generator=generator).cuda() for shape in ((5, 4), (3, 5))]
        found, layout = replays("gradients", run, tensors)
        assert layout == "layout"
        torch.testing.assert_close(list(found), list(run(tensors)[0]))
    assert replays.holds("gradients")


@gpu
def test_a_call_that_waits_is_called_on_a_device_and_leaves_it_usable():
    replays = Replays.on(torch.device("cuda"))
    ones = [torch.ones(2, device="cuda")]

    def run(tensors):
        return [tensors[0] * tensors[0].sum().item()], None

    replays("waits", run, ones)
    with pytest.warns(FallbackWarning, match="synchroniz"):
        replays("waits", run, ones)
    assert replays("waits", run, ones)[0][0].tolist() == [2.0, 2.0]
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.rand(2, device="cuda").isfinite().all()


@gpu
def test_memory_goes_with_the_replays():
    replays = Replays.on(torch.device("cuda"))
    large = [torch.ones(2**22, device="cuda")]
    for _ in range(3):
        replays("large", lambda tensors: ([(tensors[0] * 2 + 1).sum().reshape(1)], None), large)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    del replays
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    # The copy of what it was given, and what it computed.
    assert held - torch.cuda.memory_reserved() >= 2 * 2**24
