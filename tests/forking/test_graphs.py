"""Claim: what cannot be replayed is told by name. A CUDA device is stood in for, so that no machine needs one."""

import contextlib
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lmc_curvature.forking.graphs import record_steps

# What stands in for a CUDA device's streams and graphs is of other types.
pytestmark = pytest.mark.usefixtures("untyped")

STREAM = SimpleNamespace(device_index=0)


class Device:
    """Notes what is asked of a CUDA device, and ends a capture as torch does."""

    def __init__(self):
        self.waiting, self.pools, self.generator_states, self.capturing, self.ended = 0, [], [], False, []
        self.outcome = self.outcome_of_replays = (2.0, 0.5)

    def record(self, model, steps, rewind=lambda: None):
        return record_steps(model, steps, STREAM, rewind=rewind, outcome=lambda: torch.tensor(self.outcome))

    def replayed(self):
        self.outcome = self.outcome_of_replays

    def clone_state(self):
        return "fresh"

    def graphsafe_set_state(self, state):
        self.generator_states.append(state)

    @contextlib.contextmanager
    def graph(self, graph, *, pool, stream, capture_error_mode):
        assert (stream, capture_error_mode) == (STREAM, "thread_local")
        self.pools.append(pool)
        self.capturing = True
        try:
            yield
        except RuntimeError:
            # Torch notices at the end of the capture, and says no more.
            raise RuntimeError("operation failed due to a previous error during capture.")  # noqa: B904
        finally:
            self.capturing = False


@pytest.fixture
def device(monkeypatch):
    device = Device()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "default_generators", (device,))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=partial(device.replayed)))
    monkeypatch.setattr(torch.cuda, "graph", device.graph)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: device.waiting)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(device, "waiting", mode))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *where: device.ended.append(where))
    return device


def test_every_step_is_recorded_once_in_one_pool(device):
    model, events = nn.Linear(2, 2), []

    def step(size):
        model(torch.ones(size, 2))
        events.append((size, device.capturing))

    steps = {size: partial(step, size) for size in (5, 3)}
    replays = device.record(model, steps, partial(events.append, "rewind"))
    assert list(replays) == [5, 3]
    assert replays[5] is not replays[3]
    assert device.pools[0] is device.pools[1]
    for size in (5, 3):
        assert events.count((size, True)) == 1
        # There are libraries that choose their kernels in the first calls.
        assert events.count((size, False)) >= 3
    # Before each step that is taken and each replay, and within none that is recorded.
    assert events.count("rewind") == 2 + sum(event[1] is False for event in events if event != "rewind")
    assert events[events.index((5, True)) - 1] == (5, False)
    assert device.waiting == 0
    assert device.generator_states == []


def draws_from_python(module, inputs, output):
    import random

    return output * random.random()


@pytest.mark.parametrize("where", ["dropout", "itself", "python"])
def test_a_network_that_draws_random_numbers_is_not_recorded(device, where):
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5) if where == "dropout" else nn.Tanh())
    if where == "itself":
        model.register_forward_hook(lambda module, inputs, output: output * torch.rand(()))
    if where == "python":
        model[1].register_forward_hook(draws_from_python)
    before = torch.get_rng_state()
    found = device.record(model, {2: lambda: model(torch.ones(2, 2))})
    named = "Sequential" if where == "itself" else "1"
    assert found == f"module '{named}' draws random numbers"
    assert not device.pools
    assert where != "python" or torch.equal(before, torch.get_rng_state())


def test_a_step_that_waits_is_named_before_it_is_recorded(device):
    def step():
        if device.waiting:
            raise RuntimeError("called a synchronizing CUDA operation.\nA trace follows.")

    assert device.record(nn.Tanh(), {2: step}) == "called a synchronizing CUDA operation"
    assert not device.pools
    assert device.waiting == 0


def test_the_reason_is_that_of_the_step_and_not_of_the_end_of_the_capture(device):
    def step():
        if device.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    found = device.record(nn.Tanh(), {2: step})
    assert found == "operation not permitted when stream is capturing"
    # What a capture leaves behind that fails would let no module draw.
    assert device.generator_states == ["fresh"]
    assert device.ended == [(0, device.pools[0])]


@pytest.mark.parametrize("other", [(2.1, 0.5), (2.0, 0.52), (float("nan"), 0.5)])
def test_a_replay_that_does_something_else_is_not_used(device, other):
    device.outcome_of_replays = other
    found = device.record(nn.Tanh(), {2: lambda: None})
    assert found == (
        "the losses of its examples sum to 2 and it moves the network by 0.5, and replayed these are "
        f"{other[0]:.6g} and {other[1]:.6g}"
    )


@pytest.mark.parametrize("same", [(2.001, 0.5005), (float("nan"), float("inf"))])
def test_replays_differ_by_rounding(device, same):
    device.outcome_of_replays = same
    device.outcome = tuple(value * 1.0001 for value in same)
    assert list(device.record(nn.Tanh(), {2: lambda: None})) == [2]


def test_a_step_that_is_wrong_by_itself_is_an_error(device):
    def step():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        device.record(nn.Tanh(), {2: step})
