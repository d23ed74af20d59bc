"""Claim: densities are those of the true spectrum, as nearly as they say."""

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from scipy.stats import norm, wasserstein_distance

from lmc_curvature.curvature.operators.ggn import GGNOperator
from lmc_curvature.curvature.spectra import SpectralDensity, spectral_density
from lmc_curvature.curvature.spectra.density import WIDTH_SHARE
from lmc_curvature.errors import MemoryBudgetError, OptionError
from tests.support.spectra import (
    Counted,
    digits_dense,
    digits_hessian,
    digits_objective,
    network_like,
    spread,
    symmetric,
)

# All of them together take seconds.
NO_ROOM = 3e-4  # GiB: two vectors a probe, and their products, but no bases


def distance(density, values):
    """Wasserstein-1 distance to the true spectral measure, relative to the spectrum's width."""
    values = np.asarray(values)
    return wasserstein_distance(density.nodes.ravel(), values, density.weights.ravel()) / np.ptp(values)


def reconstructed(density):
    """Nodes and weights make a measure for each probe."""
    assert (density.weights >= 0).all()
    np.testing.assert_allclose(density.weights.sum(axis=1), 1, rtol=1e-10)
    assert (np.diff(density.nodes, axis=1) >= 0).all()
    return density


@pytest.mark.check(after=1)
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("memory_gib", [4.0, NO_ROOM], ids=["reorthogonalised", "two vectors each"])
@pytest.mark.parametrize("make", [network_like, spread], ids=["like a network", "uniform"])
def test_the_measure_is_near_the_true_one(make, memory_gib, distribution):
    values = make(1000)
    density = reconstructed(
        spectral_density(symmetric(values), probes=8, steps=40, distribution=distribution, memory_gib=memory_gib)
    )
    assert not density.exact
    assert density.nodes.shape == (8, 40)
    assert distance(density, values) < 0.01


@pytest.mark.check
@pytest.mark.parametrize("kind", ["whole", "layer", "block-diagonal", "Gauss-Newton", "float32"])
def test_the_density_of_a_network_is_near_that_of_its_dense_matrix(kind):
    whole = digits_hessian()
    operator = {
        "whole": lambda: whole,
        "layer": lambda: whole.block("0"),
        "block-diagonal": whole.block_diagonal,
        "Gauss-Newton": lambda: GGNOperator(digits_objective()),
        "float32": lambda: digits_hessian(torch.float32),
    }[kind]()
    values = torch.linalg.eigvalsh(digits_dense() if kind == "float32" else operator.to_dense())
    density = reconstructed(spectral_density(operator, probes=6, steps=30))
    assert not density.exact
    assert distance(density, values) < 0.01
    np.testing.assert_allclose(density.support[1], values[-1], rtol=1e-5)


def test_quadrature_is_exact_for_polynomials_of_the_starting_vectors():
    """Gauss: with m nodes, vᵀ Aᵖ v for p up to 2 m − 1, here of vectors of one entry each of size 1."""
    values = spread(300, 2.0, 4.0)
    matrix = symmetric(values)
    density = spectral_density(matrix, probes=3, steps=5, seed=7)
    generator = torch.Generator().manual_seed(7)
    probes = torch.stack([torch.empty(300).bernoulli_(0.5, generator=generator) * 2 - 1 for _ in range(3)]).double()
    powers = probes
    for order in range(1, 10):
        powers = powers @ matrix
        expected = (probes * powers).sum(dim=1) / 300
        np.testing.assert_allclose((density.weights * density.nodes**order).sum(axis=1), expected, rtol=1e-9)


@pytest.mark.parametrize(("probes", "steps"), [(8, 64), (1, 40), (40, 1)])
def test_a_small_operator_gives_the_exact_density(probes, steps):
    values = torch.linspace(-3, 4, 40, dtype=torch.float64)
    density = spectral_density(symmetric(values), probes=probes, steps=steps)
    assert density.exact
    np.testing.assert_allclose(density.nodes, values[None], rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(density.weights, 1 / 40)
    assert density.moment(2).standard_error == 0
    assert density.moment(2).value == pytest.approx(float((values**2).mean()))


def test_an_exact_density_costs_no_more_products_than_an_estimate():
    operator = Counted(spread(200))
    spectral_density(operator, probes=4, steps=50)
    assert operator.products == 200
    operator = Counted(spread(201))
    spectral_density(operator, probes=4, steps=50)
    assert (operator.products, operator.calls) == (200, 50)


def test_few_distinct_eigenvalues_end_the_recurrences():
    values = torch.cat([torch.zeros(700), torch.ones(200), torch.full((100,), 5.0)])
    density = reconstructed(spectral_density(symmetric(values), probes=10, steps=30, distribution="gaussian"))
    assert density.support == pytest.approx((0, 5))
    masses = [density.weights[np.abs(density.nodes - value) < 1e-9].sum() / 10 for value in (0, 1, 5)]
    np.testing.assert_allclose(masses, [0.7, 0.2, 0.1], atol=0.02)
    assert (density.weights[:, 3:] < 1e-20).all()


def test_an_operator_of_zeros_has_its_mass_at_zero():
    for size in (10, 1000):
        density = reconstructed(spectral_density(torch.zeros(size, size), probes=3, steps=20))
        assert density.mean == 0
        assert density.support == (0, 0)
        assert trapezoid(density.curve(density.grid()), density.grid()) == pytest.approx(1, abs=1e-3)


@pytest.mark.check
def test_moments_have_calibrated_standard_errors():
    values = network_like(500)
    operator = Counted(values)
    # A diagonal matrix has no variance under Rademacher vectors.
    densities = [
        spectral_density(operator, probes=16, steps=6, distribution="gaussian", seed=seed) for seed in range(150)
    ]
    for order in (1, 2, 3):
        truth = float((values**order).mean())
        found = [density.moment(order) for density in densities]
        deviations = np.array([(each.value - truth) / each.standard_error for each in found])
        assert abs(deviations.mean()) < 0.5
        assert 0.8 < np.quantile(np.abs(deviations), 0.68) < 1.35


def test_the_mean_is_the_trace_over_the_dimension():
    density = spectral_density(symmetric(spread(200, 40.0)), probes=200, steps=1)
    assert density.mean == pytest.approx(40 / 200, rel=1e-9)
    assert density.moment(1).value == density.mean


def test_one_probe_has_no_standard_error():
    assert np.isnan(spectral_density(Counted(spread(100)), probes=1, steps=10).moment(1).standard_error)


def test_the_curve_is_the_measure_smoothed():
    density = SpectralDensity(
        np.array([[0.0, 2.0], [0.0, 3.0]]), np.array([[0.5, 0.5], [0.75, 0.25]]), dimension=10, exact=False
    )
    points = np.linspace(-1, 4, 7)
    expected = 0.625 * norm.pdf(points, 0, 0.2) + 0.25 * norm.pdf(points, 2, 0.2) + 0.125 * norm.pdf(points, 3, 0.2)
    np.testing.assert_allclose(density.curve(points, width=0.2), expected, rtol=1e-12)
    assert density.default_width == pytest.approx(3 * WIDTH_SHARE)
    grid = density.grid(500)
    assert (grid[0], grid[-1]) == pytest.approx((-12 * WIDTH_SHARE, 3 + 12 * WIDTH_SHARE))
    assert trapezoid(density.curve(grid), grid) == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(density.curve(points), density.curve(points, width=3 * WIDTH_SHARE))


def test_seeds_make_densities_repeatable():
    matrix = symmetric(spread(300))
    one, same, other = (spectral_density(matrix, probes=2, steps=9, seed=seed).nodes for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"probes": 0}, OptionError, "probes=0: expected a whole number, at least 1"),
        ({"steps": 1.5}, OptionError, "steps=1.5: expected a whole number"),
        ({"memory_gib": "1"}, OptionError, "memory_gib='1': expected a positive number"),
        ({"distribution": "normal"}, OptionError, "distribution='normal' is not a choice"),
        (
            {"memory_gib": 1e-9},
            MemoryBudgetError,
            "2000 entries takes .* memory_gib=1e-09: take fewer probes",
        ),
    ],
)
def test_bad_options_of_a_density_are_refused(options, error, message, untyped):
    operator = Counted(spread(2000))
    with pytest.raises(error, match=message):
        spectral_density(operator, **options)
    assert operator.calls == 0


def test_bad_options_of_a_curve_are_refused():
    density = spectral_density(Counted(spread(20)))
    with pytest.raises(OptionError, match="width=0.0: expected a positive"):
        density.curve(density.grid(), width=0.0)
    with pytest.raises(OptionError, match="points=0"):
        density.grid(0)
    with pytest.raises(OptionError, match="order=0"):
        density.moment(0)


def test_progress_counts_steps(capsys):
    spectral_density(Counted(spread(100)), probes=2, steps=9, progress=True)
    assert "9/9" in capsys.readouterr().err


def test_progress_counts_products_where_the_matrix_is_small(capsys):
    spectral_density(Counted(spread(10)), probes=2, steps=9, progress=True)
    assert "10/10" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_devices_agree():
    matrix = symmetric(network_like(600))
    here, there = (spectral_density(each, probes=4, steps=30) for each in (matrix, matrix.cuda()))
    assert wasserstein_distance(
        here.nodes.ravel(), there.nodes.ravel(), here.weights.ravel(), there.weights.ravel()
    ) == pytest.approx(0, abs=1e-6)
