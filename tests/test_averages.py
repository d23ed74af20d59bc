"""Claim: means weigh batches by their examples, and standard errors estimate how far such means scatter."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lmc_curvature.averages import standard_error, weighted_mean

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


def test_a_single_batch_has_no_standard_error():
    error = standard_error(np.ones((1, 2, 3)), np.array([5]))
    assert error.shape == (2, 3)
    assert np.isnan(error).all()
