import pytest

from tests.support.benchmarking import rows, run


@pytest.mark.check
def test_imports_and_commands_are_timed(tmp_path):
    record = run("imports", tmp_path)
    unit, *others = rows(record, "imports")
    assert unit["multiple"] == 1.0
    assert [row["command"].split()[0] for row in others] == ["from", "lmc-curvature", "lmc-curvature", "lmc-curvature"]
    assert all(row["seconds"] > 0 for row in others)
    assert len(record["bars"]) == 4
