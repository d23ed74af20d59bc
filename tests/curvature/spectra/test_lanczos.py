"""Claim: lanczos() returns a Lanczos decomposition, which any number of interruptions leave as it is."""

import math

import pytest
import torch
from scipy.sparse.linalg import eigsh

from lmc_curvature.curvature.spectra import Lanczos, lanczos
from lmc_curvature.curvature.spectra.lanczos import Chains
from lmc_curvature.curvature.spectra.symmetric import Matrix
from lmc_curvature.errors import DirectionError, MemoryBudgetError, OperatorError, OptionError
from tests.support.spectra import Counted, digits_dense, digits_hessian, spread, symmetric


def check_decomposition(matrix, run, atol=1e-12):
    """A Q = Q T + r eᵀ with orthonormal Q, to which r is orthogonal."""
    matrix, basis, residual = matrix.double(), run.basis.double(), run.residual.double()
    last = torch.zeros(run.steps, dtype=torch.float64)
    last[-1] = 1
    identity = torch.eye(run.steps, dtype=torch.float64)
    torch.testing.assert_close(basis.T @ basis, identity, rtol=0, atol=atol)
    torch.testing.assert_close(basis.T @ residual, torch.zeros_like(last), rtol=0, atol=atol)
    expected = basis @ run.tridiagonal() + torch.outer(residual, last)
    torch.testing.assert_close(matrix @ basis, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("steps", [1, 2, 40, 200])
def test_the_decomposition_holds(steps):
    matrix = symmetric(spread(200, 5.0, 8.0))
    run = lanczos(matrix, steps)
    assert run.steps == steps
    check_decomposition(matrix, run)
    assert run.invariant == (steps == 200)


def test_orthogonality_does_not_suffer_from_converged_eigenvalues():
    """Without reorthogonalisation copies of the outliers appear after some thirty steps."""
    matrix = symmetric(spread(400, *[10.0**i for i in range(1, 5)]))
    run = lanczos(matrix, 120)
    check_decomposition(matrix, run, atol=1e-10)
    values, _ = run.ritz_values()
    assert int((values > 5).sum()) == 4
    torch.testing.assert_close(values[-4:], torch.tensor([1e1, 1e2, 1e3, 1e4], dtype=torch.float64))


def test_all_steps_give_all_eigenvalues():
    values = torch.linspace(-3, 4, 60, dtype=torch.float64) ** 3
    found, residuals = lanczos(symmetric(values), 60).ritz_values()
    torch.testing.assert_close(found, values, rtol=1e-9, atol=1e-9)
    assert residuals.max() == 0


def test_residuals_of_ritz_pairs_are_what_the_recurrence_says():
    matrix = symmetric(spread(150, 3.0, 4.0))
    run = lanczos(matrix, 25)
    values, residuals = run.ritz_values()
    vectors = run.ritz_vectors()
    true = torch.linalg.vector_norm(matrix @ vectors - vectors * values, dim=0)
    torch.testing.assert_close(residuals, true, rtol=1e-8, atol=1e-11)
    nearest = (torch.linalg.eigvalsh(matrix) - values[:, None]).abs().amin(dim=1)
    assert (nearest <= residuals + 1e-12).all()
    assert residuals[-1] < 1e-6 < residuals[12]


@pytest.mark.parametrize("parts", [(1, 29), (29, 1), (10, 15, 5), (1, 1, 28)])
def test_a_resumed_run_is_one_long_run(parts):
    matrix = symmetric(spread(100, 5.0))
    whole, resumed = lanczos(matrix, 30, seed=3), lanczos(matrix, parts[0], seed=3)
    for more in parts[1:]:
        operator = Counted([0.0])
        operator.shape, operator.matmat = (100, 100), lambda rows: matrix @ rows.double()
        resumed = lanczos(operator, more, resume=resumed)
    for name in ("alphas", "betas", "basis", "residual"):
        torch.testing.assert_close(getattr(resumed, name), getattr(whole, name), rtol=1e-11, atol=1e-11)


def test_a_resumed_run_makes_only_the_new_products():
    operator = Counted(spread(100, 5.0))
    first = lanczos(operator, 20)
    lanczos(operator, 7, resume=first)
    assert operator.products == operator.calls == 27


@pytest.mark.parametrize(
    ("values", "distinct"),
    [
        (torch.ones(20), 1),
        (torch.zeros(20), 1),
        (torch.tensor([1.0, 1.0, 2.0, 2.0, 5.0, 5.0, 5.0]), 3),
        (torch.cat([torch.zeros(95), torch.arange(1.0, 6.0)]), 6),
    ],
)
def test_the_recurrence_ends_with_an_invariant_subspace(values, distinct):
    matrix = symmetric(values)
    run = lanczos(matrix, len(values))
    assert run.invariant
    assert run.steps == distinct
    check_decomposition(matrix, run)
    torch.testing.assert_close(run.ritz_values()[0], values.double().unique(), rtol=0, atol=1e-12)
    again = lanczos(matrix, len(values) - distinct, resume=run)
    assert again.steps == distinct
    torch.testing.assert_close(again.basis, run.basis)


def test_a_start_that_is_an_eigenvector_stays_alone():
    matrix = symmetric(spread(50, 7.0))
    values, vectors = torch.linalg.eigh(matrix)
    run = lanczos(matrix, 10, start=1000 * vectors[:, 3])
    assert (run.steps, run.invariant) == (1, True)
    torch.testing.assert_close(run.alphas, values[3:4])


def test_the_start_is_the_first_vector():
    start = torch.arange(1.0, 51.0)
    run = lanczos(symmetric(spread(50)), 5, start=start)
    torch.testing.assert_close(run.basis[:, 0], (start / start.norm()).double())


def test_seeds_make_runs_repeatable():
    matrix = symmetric(spread(50))
    torch.testing.assert_close(lanczos(matrix, 9, seed=4).alphas, lanczos(matrix, 9, seed=4).alphas, rtol=0, atol=0)
    assert not torch.allclose(lanczos(matrix, 9, seed=4).alphas, lanczos(matrix, 9, seed=5).alphas)


def test_global_random_numbers_are_left_alone():
    state = torch.get_rng_state()
    lanczos(symmetric(spread(50)), 9)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.check
@pytest.mark.parametrize("layer", [None, "0", "2"])
def test_a_networks_extreme_eigenvalues_are_those_of_its_dense_hessian(layer):
    hessian = digits_hessian() if layer is None else digits_hessian().block(layer)
    expected = torch.linalg.eigvalsh(hessian.to_dense())
    values, _ = lanczos(hessian, 70).ritz_values()
    torch.testing.assert_close(values[-3:], expected[-3:], rtol=1e-6, atol=0)
    torch.testing.assert_close(values[:1], expected[:1], rtol=1e-6, atol=1e-9)
    scipy_values = eigsh(hessian.to_scipy(), k=3, which="LA", return_eigenvectors=False)
    torch.testing.assert_close(values[-3:], torch.from_numpy(scipy_values).sort().values, rtol=1e-6, atol=0)


def test_single_precision_is_kept_and_good_enough():
    hessian = digits_hessian(torch.float32)
    run = lanczos(hessian, 60)
    assert run.basis.dtype == torch.float32
    assert run.alphas.dtype == torch.float64
    check_decomposition(digits_dense(), run, atol=1e-4)
    expected = torch.linalg.eigvalsh(digits_dense())
    torch.testing.assert_close(run.ritz_values()[0][-3:], expected[-3:], rtol=1e-4, atol=0)


def test_chains_in_lock_step_are_separate_runs():
    """One of them starts in an invariant subspace, and ends before the others."""
    values = spread(80, 6.0)
    operator = Counted(values)
    starts = torch.randn(3, 80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    starts[1] = 0
    starts[1, :4] = 1
    chains = Chains(starts, 12)
    chains.run(Matrix.of(operator), 12, description="", progress=False)
    assert (operator.calls, operator.products) == (12, 12 + 4 + 12)
    for chain, start in enumerate(starts):
        alone = lanczos(torch.diag(values), 12, start=start)
        assert alone.steps == (4 if chain == 1 else 12)
        alphas = torch.stack(chains.alphas)[:, chain]
        torch.testing.assert_close(alphas[: alone.steps], alone.alphas, rtol=1e-10, atol=1e-12)
        assert (alphas[alone.steps :] == 0).all()


def test_without_reorthogonalisation_the_recurrence_is_the_same_as_long_as_nothing_has_converged():
    matrix = Matrix.of(symmetric(spread(200)))
    start = torch.randn(1, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    short, full = Chains(start, 15, reorthogonalise=False), Chains(start, 15)
    for chains in (short, full):
        chains.run(matrix, 15, description="", progress=False)
    assert short.basis.shape == (1, 2, 200)
    torch.testing.assert_close(torch.stack(short.alphas), torch.stack(full.alphas), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(torch.stack(short.betas), torch.stack(full.betas), rtol=1e-9, atol=1e-11)


def test_another_operator_cannot_resume_a_run():
    run = lanczos(symmetric(spread(60), seed=0), 10)
    with pytest.raises(OperatorError, match="not symmetric"):
        lanczos(symmetric(spread(60), seed=1), 10, resume=run)
    with pytest.raises(DirectionError, match="of dimension 60; this one has 61"):
        lanczos(symmetric(spread(61)), 10, resume=run)


def _resumable(steps=5):
    return lanczos(symmetric(spread(20)), steps)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 21}, OptionError, "steps=21 exceeds the dimension of the operator, 20"),
        ({"steps": 0}, OptionError, "steps=0: expected a whole number, at least 1"),
        ({"steps": 2.5}, OptionError, "steps=2.5: expected a whole number"),
        ({"steps": 16, "resume": _resumable()}, OptionError, "steps, with those of resume,=21 exceeds"),
        ({"steps": 3, "resume": _resumable(), "start": torch.ones(20)}, OptionError, "Both start and resume"),
        ({"steps": 3, "start": torch.ones(19)}, DirectionError, r"start has shape \(19,\); expected \(20,\)"),
        ({"steps": 3, "start": torch.zeros(20)}, DirectionError, "norm 0; expected a finite vector that is not zero"),
        ({"steps": 3, "start": torch.full((20,), math.nan)}, DirectionError, "norm nan; expected a finite vector"),
        (
            {"steps": 3, "memory_gib": 1e-9},
            MemoryBudgetError,
            "3 vectors of 20 entries takes 4.47e-07.*fewer steps",
        ),
    ],
)
def test_bad_options_are_refused_before_any_product(options, error, message, untyped):
    operator = Counted(spread(20))
    with pytest.raises(error, match=message):
        lanczos(operator, **options)
    assert operator.calls == 0


def test_progress_counts_steps(capsys):
    lanczos(symmetric(spread(20)), 7, progress=True)
    assert "7/7" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_everything_stays_on_the_operators_device():
    matrix = symmetric(spread(200, 5.0))
    run, expected = lanczos(matrix.cuda(), 30), lanczos(matrix, 30)
    assert isinstance(run, Lanczos)
    for name in ("alphas", "betas", "basis", "residual"):
        assert getattr(run, name).is_cuda
        torch.testing.assert_close(getattr(run, name).cpu(), getattr(expected, name), rtol=1e-8, atol=1e-8)
