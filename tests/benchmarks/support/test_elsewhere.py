import time

import pytest
import torch

from benchmarks.support.elsewhere import Elsewhere
from benchmarks.support.timing import PACES, Road


def makers(*, value):
    def bad():
        raise RuntimeError("cannot")

    return {"good": lambda: Road("good", lambda: torch.tensor([value]), int, vectors=2, note="made"), "bad": bad}


def sleepers():
    time.sleep(60)
    return {}


def _elsewhere(function, arguments):
    return Elsewhere("Roads", function, arguments, PACES["smoke"], torch.device("cpu"))


@pytest.mark.check
def test_what_another_process_measures():
    found, notes = _elsewhere(makers, {"value": 1.5}).measured(60)
    assert list(found) == ["good"]
    good = found["good"]
    assert good.result.tolist() == [1.5]
    assert (good.road.vectors, good.road.note) == (2, "made")
    assert 0 < good.multiples[0] < float("inf")
    assert notes == ["bad is missing, since it cannot be made: RuntimeError: cannot"]


def test_who_is_not_ready_is_left_out():
    begun = time.monotonic()
    process = _elsewhere(sleepers, {})
    assert process.measured(0.1) == ({}, ["Roads are missing: they were not ready, or not measured, in time."])
    assert time.monotonic() - begun < 30
    assert not process._process._popen or process._process.exitcode is not None


@pytest.mark.check
def test_an_error_elsewhere_is_said():
    found, notes = _elsewhere(makers, {"unknown": 1}).measured(60)
    assert found == {}
    assert notes[0].startswith("A process that made roads failed: TypeError")
