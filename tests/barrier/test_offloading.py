"""Claim: states of several anchors are held where they fit, else made one at a time, and the numbers are the same."""

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from lmc_curvature import Objective, Segment, predict_barrier
from lmc_curvature.barrier.evaluation import ErrorWatch
from lmc_curvature.barrier.offloading import is_offloaded, offload_notes
from lmc_curvature.curvature.problem import Problem
from lmc_curvature.errors import NonFiniteError, OptionError
from lmc_curvature.segment import StatesOnDemand
from tests.support.cases import CASES
from tests.support.devices import gpu
from tests.support.networks import permuted_pair
from tests.support.sweeping import assert_projections_agree

CONV = CASES["conv, interpolate"]
_CPU, _GPU = torch.device("cpu"), torch.device("cuda")
_GIB = 2**30


@pytest.mark.parametrize(
    ("offload", "size", "device", "expected"),
    [
        ("auto", 2**20, _CPU, False),
        ("auto", _GIB, _CPU, True),
        ("auto", _GIB, _GPU, False),
        ("auto", 3 * _GIB, _GPU, True),
        ("none", 3 * _GIB, _GPU, False),
        ("none", _GIB, _CPU, False),
        ("cpu", 2**20, _GPU, True),
        ("cpu", 2**20, _CPU, True),
    ],
)
def test_states_are_held_where_they_take_little(offload, size, device, expected):
    assert is_offloaded(offload, size, device, free=8.0 * _GIB) == expected


def test_small_states_are_held_even_where_little_is_free():
    assert not is_offloaded("auto", 2**20, _GPU, free=0.0)


@pytest.mark.usefixtures("untyped")
def test_another_choice_is_refused():
    disk: Any = "disk"
    with pytest.raises(OptionError, match="offload='disk'.*auto"):
        _predict(disk)


def _predict(offload, **options):
    models = permuted_pair((6, 5, 3), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 6, generator=generator, dtype=torch.float64)
    batches = [(each, each[:, :3].argmax(1)) for each in x]
    return predict_barrier(*models, batches, offload=offload, progress=False, **options)


@pytest.mark.check
@pytest.mark.parametrize("method", ["sweep", "differences"])
def test_numbers_are_the_same_wherever_states_are(method):
    held, offloaded = (_predict(offload, method=method, witness=False) for offload in ("none", "cpu"))
    for one, other in zip(held.anchors, offloaded.anchors, strict=True):
        np.testing.assert_array_equal(one.projection.batch_curvatures, other.projection.batch_curvatures)
        np.testing.assert_array_equal(one.projection.batch_losses, other.projection.batch_losses)
    np.testing.assert_array_equal(held.errors, offloaded.errors)
    # In the host's memory both are.
    assert offloaded.notes == held.notes


def test_states_that_are_not_held_are_given_up():
    objective = Objective(CONV.model(0), CONV.batches())
    segment = Segment(CONV.model(0), CONV.model(1))
    states = StatesOnDemand({"near": lambda: segment.point(0.25), "far": lambda: segment.point(0.75)})
    (direction, *_) = segment.directions().values()
    problem = Problem.of(objective, states, [direction], held=False)
    assert [point.place for point in problem.points] == [" at near", " at far"]
    point = problem.points[1]
    torch.testing.assert_close(point.state["conv1.weight"], segment.point(0.75)["conv1.weight"], rtol=0, atol=0)
    left = weakref.ref(point.state["conv1.weight"])
    del point
    gc.collect()
    assert left() is None
    held = Problem.of(objective, dict(states), [direction])
    assert held.points[0] is held.points[0]


def test_a_state_that_is_not_finite_is_refused_before_it_is_made_again():
    objective = Objective(CONV.model(0), CONV.batches())
    bad = {"conv1.weight": torch.full_like(objective.state()["conv1.weight"], torch.nan)}
    with pytest.raises(NonFiniteError, match="Entry 'conv1.weight' of here has"):
        Problem.of(objective, StatesOnDemand({"here": lambda: bad}), [objective.state()], held=False)


def test_ends_of_a_segment_share_its_entries():
    segment = Segment(CONV.model(0), CONV.model(1))
    for alpha, end in ((0.0, segment.start), (1.0, segment.end)):
        state = segment.point(alpha)
        assert all(state[name].data_ptr() == tensor.data_ptr() for name, tensor in end.items())


def test_what_offloading_is_called_in_results():
    assert offload_notes(_CPU) == ()
    assert "on cuda:1 one at a time (offload='cpu')" in offload_notes(torch.device("cuda:1"))[0]


def test_errors_are_those_of_states_made_on_demand():
    objective = Objective(CONV.model(0), CONV.batches())
    segment = Segment(CONV.model(0), CONV.model(1))
    points = {"a": segment.start, "half": segment.point(0.5)}
    watches = (
        ErrorWatch(objective, points),
        ErrorWatch(objective, StatesOnDemand({n: lambda s=s: s for n, s in points.items()})),
    )
    with objective.one_pass() as batches:
        for batch in batches:
            for watch in watches:
                watch(batch)
    one, other = (watch.errors() for watch in watches)
    np.testing.assert_array_equal(one, other)


@gpu
def test_on_a_gpu_states_are_brought_one_at_a_time():
    found = {offload: _predict(offload, device="cuda", anchors=5) for offload in ("none", "cpu")}
    for one, other in zip(found["none"].anchors, found["cpu"].anchors, strict=True):
        assert_projections_agree(one.projection, other.projection, relative=1e-9)
    assert any("one at a time (offload='cpu')" in note for note in found["cpu"].notes)
    assert not any("offload" in note for note in found["none"].notes)
