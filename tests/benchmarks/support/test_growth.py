import pytest

from benchmarks.support import growth
from benchmarks.support.timing import Spread


def test_fitted_exponent():
    assert growth.fitted_exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2.0)


def test_a_curve_a_road_and_its_exponent():
    rows = [
        {"road": road, "at": at, "ms": Spread.exactly(at**power), "samples": 1}
        for road, power in (("a", 1.0), ("b", 2.0))
        for at in (1, 2)
    ]
    rows.append({"road": "b", "at": 4, "ms": Spread.of([]), "samples": 0})
    panel = growth.growth_panel("width", "width", rows, key="at")
    assert [(line.label, line.xs) for line in panel.lines] == [("a", [1, 2]), ("b", [1, 2])]
    exponents = growth.exponent_rows([panel])
    assert [row["exponent"] for row in exponents] == pytest.approx([1.0, 2.0])
    assert [(row["quantity"], row["road"]) for row in exponents] == [("width", "a"), ("width", "b")]
