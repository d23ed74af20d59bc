"""The benchmark of the library's checks of itself runs, and the table of checks promises no less than they cost."""

import pytest

from benchmarks import checks
from benchmarks.support.problems import image_problem
from tests.support import benchmarking


@pytest.mark.check
def test_every_check_has_a_row(tmp_path):
    record = benchmarking.run("checks", tmp_path)
    rows = {row["check"]: row for row in benchmarking.rows(record, "checks")}
    names = {part.row for part in checks.PARTS}
    assert set(rows) == names | {checks.SWEEP, "all checks"}
    # Batches as small as these are not cut.
    for name in names - {"captured graphs", "mixing"}:
        assert rows[name]["F"] > 0, name
    assert rows["captured graphs"]["later_F"] > 0


@pytest.mark.check
def test_checks_cost_what_the_table_says():
    problem = image_problem("resnet20", 128)
    first, later = checks.operations(problem)
    for row in {part.row for part in checks.PARTS} - {checks.CAPTURE}:
        cost = max(first.get(row, 0.0), later.get(row, 0.0))
        assert 0.3 * checks.promised(row) <= cost <= checks.promised(row), row
    assert first[checks.SWEEP] == pytest.approx(later[checks.SWEEP], rel=1e-6)
    # The witness included.
    assert sum(first.values()) - first[checks.CAPTURE] - later[checks.SWEEP] < 12
