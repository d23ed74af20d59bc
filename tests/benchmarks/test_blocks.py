import pytest

from tests.support.benchmarking import INSTALLED, check_roads, rows, run


@pytest.mark.check
def test_the_last_layer(tmp_path):
    record = run("blocks", tmp_path, "--profile")
    roads = ["layer_hessian", "the same, method='products'", "HessianOperator.block", "torch.func.hessian"]
    roads += [peer for peer in INSTALLED if peer == "curvlinops"]
    check_roads(rows(record, "roads"), roads)
    check_roads(rows(record, "alone"), roads)
    assert all(row["error"] < 1e-5 for row in [*rows(record, "roads"), *rows(record, "alone")])
    assert record["setting"]["parameters"] == 170
    assert "torch.func.hessian / ours" in [bar["what"] for bar in record["bars"]]
    assert "all: convolution, forward" in [row["operation"] for row in rows(record, "profile")]
