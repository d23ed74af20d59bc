import pytest

from benchmarks.support import tables


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (12, "12"),
        ("first", "first"),
        (0.0, "0"),
        (1234.5, "1234"),
        (0.01234, "0.0123"),
        (1.234e-5, "1.23e-05"),
        (1.234e8, "1.23e+08"),
        (float("inf"), "inf"),
    ],
)
def test_numbers(value, text):
    assert tables.number_text(value) == text


def test_quartiles_stand_beside_a_median_unless_they_are_the_same():
    assert tables.cell({"ms": 2.0, "ms_quartiles": [1.0, 3.0]}, "ms") == "2.00 [1.00, 3.00]"
    assert tables.cell({"ms": 2.0, "ms_quartiles": [2.0, 2.0]}, "ms") == "2.00"
    assert tables.cell({"error": 1.23456}, "error") == "1.2"


def test_columns_stand_in_one_order_and_only_with_values():
    lines = tables.markdown_table([{"ms": 1.0, "road": "a", "other": 3}, {"road": "b", "note": ""}])
    assert lines == ["| road | ms |", "| --- | --- |", "| a | 1.00 |", "| b |  |"]
