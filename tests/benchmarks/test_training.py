import math

import pytest
import torch

from benchmarks import training
from benchmarks.training import EAGER, GRAPH, training_report
from tests.support.benchmarking import rows, run


@pytest.mark.check
def test_loops_and_siblings_are_compared(tmp_path):
    record = run("training", tmp_path)
    loops = rows(record, "loop")
    assert [row["road"].split()[0] for row in loops] == ["lmc_curvature:", "plain", "plain"]
    for row in loops:
        assert row["rate"] == pytest.approx(64 / row["seconds"])
    assert [row["processes"] for row in rows(record, "siblings")] == [1, 2]
    assert [bar["what"] for bar in record["bars"]] == ["fastest plain loop / ours"]


@pytest.mark.check
def test_steps_are_timed_within_a_budget():
    (table,), bars, notes = training_report(torch.device("cpu"), 600.0, size="smoke")
    assert table.name == "training-steps"
    assert [(row["road"], row["dtype"], row["siblings"]) for row in table.rows] == [
        (EAGER, "float32", 1),
        (EAGER, "float32", 2),
        (EAGER, "bfloat16", 1),
    ]
    for row in table.rows:
        assert math.isfinite(row["ms"].median)
        # Three steps of 32 and one of 4, of each sibling.
        assert row["rate"] == pytest.approx(25e3 / row["ms"].median)
    assert (bars, notes) == ([], [])
    (table,), _, notes = training_report(torch.device("cpu"), 0.0, size="smoke")
    assert table.rows == []
    assert notes == [
        "Left out for want of time: eager, float32, 1 together; eager, float32, 2 together; "
        "eager, bfloat16, 1 together."
    ]


@pytest.mark.check
def test_a_row_that_fails_is_told_of_and_the_others_stay(monkeypatch):
    def fail(plan, data, precision, siblings, graph, end):
        if siblings == 2:
            raise torch.OutOfMemoryError("no memory")
        return step_row(plan, data, precision, siblings, graph, end)

    step_row = training._step_row
    monkeypatch.setattr(training, "_step_row", fail)
    (table,), _, notes = training_report(torch.device("cpu"), 600.0, size="smoke")
    assert len(table.rows) == 2
    assert notes == ["eager, float32, 2 together: no memory"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_steps_on_a_gpu_are_graphs():
    (table,), bars, notes = training_report(torch.device("cuda"), 600.0, size="smoke")
    assert {(row["road"], row["siblings"]) for row in table.rows} == {(EAGER, 1), (GRAPH, 1), (GRAPH, 2)}
    assert table.rows[0]["ratio"] == 1
    assert len(table.rows) == 9
    assert notes == []
    assert [bar.bound for bar in bars] == [3.5, 3.5, 1.3]
