"""Means weigh batches by their examples, standard errors estimate how far they scatter, and ranks are correlated."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import t

from lmc_curvature.averages import interval, rank_correlation, standard_error, weighted_mean, with_error
from lmc_curvature.errors import OptionError

_batch = st.tuples(st.integers(1, 20), arrays(np.float64, (2, 3), elements=st.floats(-1e3, 1e3)))


@given(st.lists(_batch, min_size=1, max_size=6))
def test_the_mean_is_the_mean_over_all_examples(batches):
    sizes, values = (np.array(column) for column in zip(*batches, strict=True))
    mean = weighted_mean(values, sizes)
    assert mean.dtype == np.float64
    np.testing.assert_allclose(mean, np.repeat(values, sizes, axis=0).mean(0), rtol=1e-10, atol=1e-9)


def test_scalars_average_to_an_array_without_axes():
    assert weighted_mean(np.array([1.0, 4.0]), np.array([2, 1])).shape == ()
    assert weighted_mean(np.array([1.0, 4.0]), np.array([2, 1])) == 2.0


@pytest.mark.parametrize("batches", [2, 7])
def test_equal_batches_have_the_usual_standard_error(batches):
    values = np.random.default_rng(0).normal(size=(batches, 2, 3))
    expected = values.std(axis=0, ddof=1) / np.sqrt(batches)
    np.testing.assert_allclose(standard_error(values, np.full(batches, 4)), expected, rtol=1e-12)


def test_unequal_batches_have_the_expected_variance():
    # Batch means of n_b unit-variance examples: the estimate's expectation is (1 − Σ w²) B / (B − 1) / n exactly.
    sizes = np.array([30, 10, 10, 5])
    values = np.random.default_rng(0).normal(size=(4, 20000)) / np.sqrt(sizes)[:, None]
    weights = sizes / sizes.sum()
    expected = (1 - (weights**2).sum()) * 4 / 3 / sizes.sum()
    assert (standard_error(values, sizes) ** 2).mean() == pytest.approx(expected, rel=0.03)


def test_batches_without_weight_might_as_well_not_be_there():
    values, weights = np.random.default_rng(0).normal(size=(5, 2)), np.array([0.5, 0.0, 2.25, 0.0, 1.0])
    kept = weights > 0
    np.testing.assert_allclose(weighted_mean(values, weights), weighted_mean(values[kept], weights[kept]), rtol=1e-14)
    np.testing.assert_allclose(standard_error(values, weights), standard_error(values[kept], weights[kept]), rtol=1e-14)
    assert np.isnan(standard_error(values, np.array([0.0, 3.0, 0.0, 0.0, 0.0]))).all()


def test_a_single_batch_has_no_standard_error():
    error = standard_error(np.ones((1, 2, 3)), np.array([5]))
    assert error.shape == (2, 3)
    assert np.isnan(error).all()


@pytest.mark.parametrize("values", [[1.0, 4.0, 1.5], [-3.0, -1.0, 0.0, 0.0, 1.0, 3.0]])
def test_the_interval_of_few_batches_or_of_even_ones_is_students(values):
    found = interval(np.array(values), np.ones(len(values)), level=0.9)
    expected = t.interval(0.9, len(values) - 1, np.mean(values), np.std(values, ddof=1) / np.sqrt(len(values)))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def _share_of_intervals_that_hold_the_mean(draw, mean, batches):
    generator = np.random.default_rng(0)
    found = [interval(draw(generator, batches), np.ones(batches)) for _ in range(400)]
    return np.mean([low <= mean <= high for low, high in found])


def test_intervals_hold_the_mean_as_often_as_they_say():
    def normal(generator, batches):
        return generator.normal(3.0, 2.0, batches)

    def rare(generator, batches):
        return generator.lognormal(0.0, 1.0, batches)

    for batches in (3, 5, 20):
        assert _share_of_intervals_that_hold_the_mean(normal, 3.0, batches) == pytest.approx(0.95, abs=0.03)
    # Student's alone holds it in 87 of a hundred cases, with 20 batches.
    assert 0.9 < _share_of_intervals_that_hold_the_mean(rare, math.exp(0.5), 20) < 0.97


def test_an_interval_does_not_depend_on_unit_origin_or_batches_without_weight():
    generator = np.random.default_rng(0)
    values, weights = generator.exponential(size=9), generator.uniform(1, 3, 9)
    low, high = interval(values, weights)
    np.testing.assert_allclose(interval(5 - 2 * values, 7 * weights), (5 - 2 * high, 5 - 2 * low), rtol=1e-10)
    more = np.append(values, 50.0), np.append(weights, 0.0)
    np.testing.assert_allclose(interval(*more), (low, high), rtol=1e-10)
    assert interval(np.ones(6), np.ones(6)) == pytest.approx((1, 1), rel=1e-12)
    assert np.isnan(interval(np.ones(1), np.ones(1))).all()
    with pytest.raises(OptionError, match="level=1"):
        interval(values, weights, level=1)


def test_rank_correlation_by_hand_and_of_finite_pairs_alone():
    # Of four pairs, ρ = 1 − Σd² / 10.
    first, second = np.array([3.0, 1.0, 4.0, 2.0]), np.array([30.0, 20.0, 40.0, 10.0])
    assert rank_correlation(first, second) == pytest.approx(0.8)
    unknown = np.array([np.nan, 9.0]), np.array([0.0, np.inf])
    with_unknown = (np.append(known, more) for known, more in zip((first, second), unknown, strict=True))
    assert rank_correlation(*with_unknown) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("first", "second"),
    [([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [0, 0, 0]), ([], []), ([1, np.nan, 3], [1, 2, 3])],
)
def test_ranks_of_few_or_equal_values_have_no_correlation(first, second, recwarn):
    assert math.isnan(rank_correlation(np.array(first, dtype=float), np.array(second, dtype=float)))
    assert not recwarn


def test_an_error_is_shown_and_that_it_is_unknown():
    assert with_error(0.123456, 0.0123) == "0.1235 ± 0.012"
    assert with_error(-2e-7, 0.0, digits=3) == "-2e-07 ± 0"
    assert with_error(0.5, math.nan) == with_error(0.5, math.inf) == "0.5 ± unknown (one batch)"
    assert with_error(0.5, 0.1, of="sampling") == "0.5 ± 0.1 (sampling)"
    assert with_error(0.5, math.nan, of="sampling") == "0.5 ± unknown (one batch)"
