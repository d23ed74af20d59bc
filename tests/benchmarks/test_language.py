import pytest

from tests.support.benchmarking import INSTALLED, check_roads, rows, run


@pytest.mark.check
def test_the_sweep_and_loops(tmp_path):
    record = run("language", tmp_path)
    found = rows(record, "roads")
    peers = ["curvlinops, loop of products"] if "curvlinops" in INSTALLED else []
    check_roads(found, ["sweep", "loop of products on a kept graph", *peers])
    # A loop gives the entries of its directions, which are the sweep's.
    assert all(row["error"] < 1e-5 for row in found[1:])
    # Token and position embeddings, four projections, and the last normalisation.
    assert record["setting"]["matrix"] == 6
    assert [bar["bar"] for bar in record["bars"]][:2] == ["≤ 60", "≤ 4"]
