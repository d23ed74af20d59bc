import pytest

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
