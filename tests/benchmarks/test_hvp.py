import pytest

from tests.support.benchmarking import INSTALLED, check_roads, rows, run


@pytest.mark.check
def test_one_product_and_several(tmp_path):
    record = run("hvp", tmp_path)
    one, many = rows(record, "one"), rows(record, "many")
    check_roads(one, ["HessianOperator @ v", "torch.func", *INSTALLED])
    check_roads(many, ["HessianOperator @ V", *INSTALLED])
    assert all(row["error"] < 1e-5 for row in [*one, *many] if not row["road"].startswith("gradient"))
    against_peers = ["the fastest peer" in bar["what"] for bar in record["bars"]]
    assert sum(against_peers) == (2 if INSTALLED else 0)
