import pytest

from tests.support.benchmarking import INSTALLED, check_roads, rows, run


@pytest.mark.check
def test_every_road_and_the_first_call(tmp_path):
    record = run("projection", tmp_path, "--profile")
    own = ["sweep", "loop of products on a kept graph", "HessianOperator @ V", "loop of HessianOperator @ v", "vmap"]
    check_roads(rows(record, "roads"), [*own, *(f"{peer}, loop of products" for peer in INSTALLED)])
    assert all(row["error"] < 1e-5 for row in rows(record, "roads"))
    agreement = {row["dtype"]: row["error"] for row in rows(record, "agreement")}
    assert agreement["float32"] < 1e-5
    assert agreement["float64"] < 1e-9
    *steps, total = rows(record, "first")
    assert total["ms"] == pytest.approx(sum(step["ms"] for step in steps))
    profile = {row["operation"]: row for row in rows(record, "profile")}
    assert profile["all: convolution, forward"]["calls"] > 0
    assert any("peak of the sweep" in bar["what"] for bar in record["bars"])
