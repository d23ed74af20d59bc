"""Claim: traces are the true ones, as nearly as their standard errors say."""

import numpy as np
import pytest
import torch

from lmc_curvature.curvature.spectra import trace
from lmc_curvature.errors import OptionError
from tests.support.spectra import Counted, digits_dense, digits_hessian, network_like, spread, symmetric

METHODS = pytest.mark.parametrize("method", ["hutch++", "hutchinson"])


@pytest.mark.check
@METHODS
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_traces_have_calibrated_standard_errors(method, distribution):
    values = network_like(400)
    matrix, truth = symmetric(values), float(values.sum())
    found = [trace(matrix, probes=60, method=method, distribution=distribution, seed=seed) for seed in range(200)]
    deviations = np.array([(each.value - truth) / each.standard_error for each in found])
    assert abs(deviations.mean()) < 0.3
    # Of Student's t with 19 or more degrees of freedom, 68 % lies within 1.02.
    assert 0.85 < np.quantile(np.abs(deviations), 0.68) < 1.25


def test_hutch_plus_plus_is_several_times_more_accurate():
    values = network_like(400)
    matrix, truth = symmetric(values), float(values.sum())
    errors = {
        method: np.std([trace(matrix, method=method, seed=seed).value - truth for seed in range(40)])
        for method in ("hutch++", "hutchinson")
    }
    assert errors["hutch++"] < errors["hutchinson"] / 3


@METHODS
def test_the_trace_of_a_network(method):
    estimate = trace(digits_hessian(), method=method)
    assert estimate.standard_error > 0
    assert estimate.value == pytest.approx(float(digits_dense().trace()), abs=4 * estimate.standard_error)
    block = digits_hessian().block("2")
    exact = trace(block, probes=70)
    assert exact.standard_error == 0
    assert exact.value == pytest.approx(float(block.to_dense().trace()), rel=1e-9)


@pytest.mark.parametrize(("method", "calls"), [("hutch++", 2), ("hutchinson", 1)])
@pytest.mark.parametrize("probes", [20, 21, 22])
def test_traces_take_the_products_they_are_given_in_few_calls(method, calls, probes):
    operator = Counted(spread(100))
    trace(operator, method=method, probes=probes)
    assert (operator.products, operator.calls) == (probes, calls)


@METHODS
@pytest.mark.parametrize(("size", "total"), [(100, 21), (15, 15)])
def test_progress_counts_products(method, size, total, capsys):
    trace(symmetric(spread(size)), probes=21, method=method)
    trace(symmetric(spread(size)), probes=21, method=method, progress=False)
    assert not capsys.readouterr().err
    trace(symmetric(spread(size)), probes=21, method=method, progress=True)
    assert f"{total}/{total}" in capsys.readouterr().err


def test_the_trace_of_a_matrix_of_low_rank_is_exact():
    matrix = symmetric(torch.cat([torch.zeros(195), torch.arange(1.0, 6.0)]))
    estimate = trace(matrix, probes=30)
    assert estimate.value == pytest.approx(15, rel=1e-9)
    assert estimate.standard_error < 1e-9


def test_a_trace_does_not_need_symmetry():
    matrix = torch.triu(torch.ones(100, 100, dtype=torch.float64), 1) + torch.diag(spread(100))
    estimate = trace(matrix, probes=90)
    assert estimate.value == pytest.approx(float(spread(100).sum()), abs=4 * estimate.standard_error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probes": 0}, "probes=0: expected a whole number, at least 1"),
        ({"probes": 5}, r"probes=5: method='hutch\+\+' takes at least 6"),
        ({"probes": 1, "method": "hutchinson"}, "probes=1: method='hutchinson' takes at least 2"),
        ({"method": "hutch"}, "method='hutch' is not a choice: did you mean 'hutch"),
        ({"distribution": "normal"}, "distribution='normal' is not a choice"),
    ],
)
def test_bad_options_of_a_trace_are_refused(options, message, untyped):
    operator = Counted(spread(200))
    with pytest.raises(OptionError, match=message):
        trace(operator, **options)
    assert operator.calls == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_devices_agree():
    matrix = symmetric(network_like(600))
    assert trace(matrix).value == pytest.approx(trace(matrix.cuda()).value, rel=1e-8)
