"""Numbers and names are short, and minus signs are long."""

import pytest

from lmc_curvature.plotting.text import correlation_text, number_with_error, short_name, short_number, tick_numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.00288, "0.0029"),
        (2.0, "2.0"),
        (123.4, "123"),
        (-0.5, "−0.50"),
        (5.4e-5, "5.4e−5"),
        (0.0, "0"),
        (2e5, "2.0e5"),
    ],
)
def test_short_numbers(value, text):
    assert short_number(value) == text


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.00288, 0.0004, "0.0029 ± 0.0004"),
        (9.6e-4, 7e-5, "(9.6 ± 0.7)e−4"),
        (2.5, float("nan"), "2.5 ± unknown (one batch)"),
        (0.0, float("nan"), "0"),
        (0.0, 0.0, "0"),
        (12.0, 30.0, "12 ± 30"),
    ],
)
def test_numbers_with_errors(value, error, text):
    assert number_with_error(value, error) == text


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0.25, -12000.0, 0.0], ["0.25", "−12000", "0"]),
        ([0.0, 5e-4, 1e-3], ["0", "5e−4", "1e−3"]),
        ([1e-4, 1e-3, 0.01, 0.1], ["1e−4", "1e−3", "1e−2", "1e−1"]),
        ([1.25e6, -10.0], ["1.25e6", "−1e1"]),
        # What rounding leaves of zero is zero, and asks for no exponent.
        ([-0.1, 2.8e-17, 0.1], ["−0.1", "0", "0.1"]),
    ],
)
def test_numbers_of_ticks_have_one_notation(values, texts):
    assert tick_numbers(values) == texts


def test_correlations():
    assert [correlation_text(value) for value in (-0.5, 1.0, float("nan"))] == ["−0.50", "1.00", "undefined"]


def test_names_are_shortened_at_the_front():
    assert short_name("stage.0.conv", 12) == "stage.0.conv"
    assert short_name("a.stage.0.conv", 12) == "…tage.0.conv"
