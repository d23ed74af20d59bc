import pytest

from tests.support.benchmarking import check_roads, rows, run


@pytest.mark.check
def test_growth_with_each_quantity(tmp_path):
    record = run("scaling", tmp_path)
    for quantity, values in (("depth", [8, 14]), ("batches", [1, 2]), ("width", [2])):
        found = rows(record, quantity)
        check_roads(found, ["sweep", "loop of products"])
        assert [row["at"] for row in found] == [value for value in values for _ in range(2)]
    assert len(rows(record, "exponents")) == 4
    assert [bar["what"] for bar in record["bars"]] == ["sweep: exponent in layers", "sweep: exponent in batches"]
