"""Claim: top_eigenpairs() finds the outermost eigenpairs, all copies of them, to the residual that it reports."""

import functools
import re
import warnings

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from tqdm.auto import tqdm

from lmc_curvature.curvature.spectra import eigenpairs, top_eigenpairs
from lmc_curvature.errors import ConvergenceWarning, MemoryBudgetError, OptionError
from tests.support.spectra import Counted, digits_dense, digits_hessian, digits_objective, spread, symmetric

# All of them together take seconds.
WAYS = pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])


def wanted(values, k, which):
    """The k outermost of all eigenvalues, the outermost first."""
    rank = {"largest": values, "smallest": -values, "magnitude": values.abs()}[which]
    return values[rank.argsort(descending=True)[:k]]


def check_pairs(matrix, found, tolerance=1e-3):
    """Vectors are orthonormal, and residuals are what they are said to be, and small."""
    matrix, vectors = matrix.double(), found.vectors.double()
    atol = 1e-12 if found.vectors.dtype == torch.float64 else 1e-5
    identity = torch.eye(vectors.shape[1], dtype=torch.float64)
    torch.testing.assert_close(vectors.T @ vectors, identity, rtol=0, atol=atol)
    true = torch.linalg.vector_norm(matrix @ vectors - vectors * found.values, dim=0)
    scale = float(torch.linalg.matrix_norm(matrix, ord=2))
    torch.testing.assert_close(found.residuals * found.values.abs(), true, rtol=1e-4, atol=10 * atol * scale)
    assert found.converged.all()
    assert (true <= tolerance * found.values.abs() + atol * scale).all()


@pytest.mark.check(after=5)
@WAYS
@pytest.mark.parametrize("k", [1, 4, 12])
@pytest.mark.parametrize("block_size", [1, 2, 5])
def test_eigenpairs_of_a_known_spectrum(which, k, block_size):
    values = torch.cat([torch.linspace(-0.9, 1, 240), torch.tensor([9.0, 4.0, 3.0, -3.5, -5.0, -2.0, 2.9])]).double()
    matrix = symmetric(values)
    found = top_eigenpairs(matrix, k, which=which, block_size=block_size, tolerance=1e-6)
    check_pairs(matrix, found, 1e-6)
    torch.testing.assert_close(found.values, wanted(values, k, which), rtol=1e-9, atol=0)


@pytest.mark.check(after=4)
@pytest.mark.parametrize("block_size", [1, 2, 4])
@pytest.mark.parametrize(
    ("values", "k"),
    [
        (torch.cat([torch.linspace(-1, 1, 295), torch.full((5,), 5.0)]), 7),
        (torch.cat([torch.linspace(-1, 1, 288), torch.full((7,), 3.0), torch.full((5,), 2.0)]), 6),
        (torch.cat([torch.linspace(-1, 1, 288), torch.full((7,), 3.0), torch.full((5,), 2.0)]), 10),
        (torch.cat([torch.linspace(-1, 1, 280), torch.full((20,), 8.0)]), 21),
        (torch.cat([torch.linspace(-1, 1, 298), torch.full((2,), 3.0)]), 4),
        (-torch.cat([torch.linspace(3, 4, 295), torch.full((5,), 1.0)]), 7),
        (torch.ones(300), 5),
    ],
)
def test_multiple_eigenvalues_are_found_with_all_their_copies(values, k, block_size):
    """A block of b vectors alone sees b copies of each."""
    matrix = symmetric(values)
    found = top_eigenpairs(matrix, k, block_size=block_size)
    check_pairs(matrix, found)
    torch.testing.assert_close(found.values, wanted(values.double(), k, "largest"), rtol=1e-4, atol=0)


@pytest.mark.parametrize("seed", [22, 148, 164, 237, 373])
def test_an_eigenvalue_of_which_the_start_has_little_is_not_passed_over(seed):
    """At these seeds the second of two close eigenvalues reaches the tolerance before the first is seen."""
    values = torch.cat([torch.linspace(-0.5, 0.8, 294), torch.tensor([1.3, 1.28, 1.26, 1.1, 1.0, 0.9])]).double()
    found = top_eigenpairs(torch.diag(values), 1, seed=seed)
    torch.testing.assert_close(found.values, wanted(values, 1, "largest"), rtol=1e-6, atol=0)


def test_products_of_low_precision_do_not_keep_a_search_from_ending():
    """They let the last residual reach the tolerance, and not a tenth of it."""
    values = spread(300, 3.0, 4.0, 5.0)
    generator = torch.Generator().manual_seed(0)

    class Inexact(Counted):
        dtype = torch.float32

        def matmat(self, matrix):
            products = super().matmat(matrix)
            noise = torch.randn(products.shape, generator=generator, dtype=torch.float64)
            return products + 2e-3 * noise * products.norm(dim=0) / len(products) ** 0.5

    operator = Inexact(values)
    found = top_eigenpairs(operator, 3)
    assert found.converged.all()
    assert 1e-4 < found.residuals[-1] < 1e-3
    assert operator.products < 50
    torch.testing.assert_close(found.values, wanted(values, 3, "largest"), rtol=1e-3, atol=0)


def test_copies_on_both_sides_of_zero():
    values = torch.cat([torch.linspace(-1, 1, 290), torch.tensor([5.0, -5.0] * 3 + [4.0, -4.0, 4.0, -4.0])]).double()
    found = top_eigenpairs(symmetric(values), 9, which="magnitude")
    torch.testing.assert_close(
        found.values.abs(), torch.tensor([5.0] * 6 + [4.0] * 3, dtype=torch.float64), rtol=1e-5, atol=0
    )
    assert int((found.values > 4.5).sum()) == 3


@WAYS
@pytest.mark.parametrize("rank", [0, 3])
def test_eigenvalues_that_are_zero_converge(which, rank):
    """No residual is small relative to zero; all there is to reach is rounding."""
    values = torch.cat([torch.zeros(300 - rank), torch.arange(1.0, rank + 1)])
    operator = Counted(values)
    found = top_eigenpairs(operator, 6, which=which)
    assert found.converged.all()
    assert found.products == operator.products < 40
    torch.testing.assert_close(found.values, wanted(values.double(), 6, which), rtol=1e-6, atol=1e-12)
    assert not found.residuals.isnan().any()


@WAYS
@pytest.mark.parametrize(("size", "k"), [(1, 1), (5, 5), (20, 3), (100, 30), (100, 100)])
def test_a_small_operator_is_diagonalised(which, size, k):
    values = torch.linspace(-2, 3, size) if size > 1 else torch.ones(1)
    matrix = symmetric(values)
    found = top_eigenpairs(matrix, k, which=which)
    assert found.products == size
    expected = wanted(values.double(), k, which)
    torch.testing.assert_close(found.values.abs(), expected.abs(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(matrix @ found.vectors, found.vectors * found.values, rtol=0, atol=1e-12)


@pytest.mark.check(after=1)
@WAYS
@pytest.mark.parametrize("part", ["network", "0", "2", "block-diagonal"])
def test_eigenvalues_of_a_network_are_those_of_its_dense_hessian(which, part):
    whole = digits_hessian()
    hessian = {"network": whole, "block-diagonal": whole.block_diagonal()}.get(part) or whole.block(part)
    dense = hessian.to_dense()
    found = top_eigenpairs(hessian, 6, which=which, tolerance=1e-6)
    check_pairs(dense, found, 1e-6)
    expected = torch.linalg.eigvalsh(dense)
    # A last layer's Hessian has eigenvalues that are zero.
    torch.testing.assert_close(found.values, wanted(expected, 6, which), rtol=1e-6, atol=1e-13 * float(expected[-1]))
    assert found.products <= len(dense)


def test_eigenvalues_of_a_gauss_newton_matrix():
    from lmc_curvature.curvature.operators.ggn import GGNOperator

    operator = GGNOperator(digits_objective())
    dense = operator.to_dense()
    found = top_eigenpairs(operator, 8, tolerance=1e-6)
    check_pairs(dense, found, 1e-6)
    torch.testing.assert_close(found.values, torch.linalg.eigvalsh(dense).flip(0)[:8], rtol=1e-6, atol=0)


def test_scipy_agrees():
    hessian = digits_hessian()
    found = top_eigenpairs(hessian, 5, tolerance=1e-6)
    values, vectors = eigsh(hessian.to_scipy(), k=5, which="LA", tol=1e-10)
    np.testing.assert_allclose(found.values, values[::-1], rtol=1e-6)
    overlaps = np.abs(np.sum(found.vectors.numpy() * vectors[:, ::-1], axis=0))
    np.testing.assert_allclose(overlaps, 1, atol=1e-8)


@pytest.mark.check
@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-4])
def test_single_precision_reaches_what_it_can(tolerance):
    found = top_eigenpairs(digits_hessian(torch.float32), 10, tolerance=tolerance)
    assert found.vectors.dtype == torch.float32
    check_pairs(digits_dense(), found, tolerance)
    expected = torch.linalg.eigvalsh(digits_dense()).flip(0)[:10]
    torch.testing.assert_close(found.values, expected, rtol=max(tolerance**2, 1e-5), atol=0)


def test_fewer_passes_and_products_than_scipy():
    """Both stop at the same relative residual; a pass over the data makes a block of products."""
    values = torch.linalg.eigvalsh(digits_dense())
    operator = Counted(values)
    found = top_eigenpairs(operator, 10)
    made = 0

    def multiply(vector):
        nonlocal made
        made += 1
        return values.numpy() * vector.ravel()

    start = np.random.default_rng(0).standard_normal(460)
    eigsh(LinearOperator((460, 460), matvec=multiply), k=10, tol=1e-3, which="LA", v0=start)
    assert operator.products == found.products
    assert operator.calls < made
    assert operator.products < 1.5 * made


@WAYS
def test_a_full_search_space_restarts(which):
    """With room for sixteen vectors, and for their images, the space is full many times before the end."""
    values = spread(400, 2.0, 3.0)
    operator = Counted(values)
    found = top_eigenpairs(operator, 4, which=which, memory_gib=50 * 400 * 8 / 2**30, max_products=3000)
    assert found.converged.all()
    assert operator.products > 40
    assert (found.residuals <= 1e-3).all()
    # 1 and −1 are equally far from zero.
    expected = wanted(values, 4, which).sort().values
    torch.testing.assert_close(found.values.sort().values, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("max_products", [3, 4, 11])
def test_what_has_not_converged_is_said(max_products):
    operator = Counted(spread(300, 50.0))
    with pytest.warns(ConvergenceWarning, match=rf"3 eigenpairs have not .* after {max_products} products; the worst"):
        found = top_eigenpairs(operator, 3, tolerance=1e-8, max_products=max_products)
    assert operator.products == found.products == max_products
    assert not found.converged.all()
    true = torch.linalg.vector_norm(operator.matmat(found.vectors) - found.vectors * found.values, dim=0)
    torch.testing.assert_close(found.residuals, true / found.values.abs())
    assert ((found.residuals <= 1e-8) == found.converged).all()


def test_no_warning_when_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        top_eigenpairs(symmetric(spread(100, 3.0)), 1)


def test_seeds_make_runs_repeatable():
    matrix = symmetric(spread(100, 3.0))
    one, same, other = (top_eigenpairs(matrix, 2, seed=seed).residuals for seed in (0, 0, 1))
    torch.testing.assert_close(one, same, rtol=0, atol=0)
    assert not torch.allclose(one, other, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k": 41}, OptionError, "k=41 exceeds the dimension of the operator, 40"),
        ({"k": 0}, OptionError, "k=0: expected a whole number, at least 1"),
        ({"k": 2, "which": "larges"}, OptionError, "which='larges' is not a choice: did you mean 'largest'"),
        ({"k": 2, "tolerance": 0.0}, OptionError, "tolerance=0.0: expected a relative residual between 0 and 1"),
        ({"k": 2, "block_size": 0}, OptionError, "block_size=0: expected a whole number"),
        ({"k": 2, "max_products": 1}, OptionError, "max_products=1: 2 eigenpairs take at least as many"),
        (
            {"k": 2, "memory_gib": 1e-7},
            MemoryBudgetError,
            "40 entries takes .* memory_gib=1e-07: ask for fewer",
        ),
    ],
)
def test_bad_options_are_refused_before_any_product(options, error, message, untyped):
    operator = Counted(spread(40))
    with pytest.raises(error, match=message):
        top_eigenpairs(operator, **options)
    assert operator.calls == 0


def test_progress_counts_eigenpairs(capsys):
    top_eigenpairs(symmetric(spread(100, 3.0, 4.0)), 2, progress=True)
    assert "2/2" in capsys.readouterr().err


def test_progress_goes_on_counting_products_between_two_pairs(capsys, monkeypatch):
    monkeypatch.setattr(eigenpairs, "tqdm", functools.partial(tqdm, mininterval=0))
    values = torch.cat([torch.tensor([10.0]), torch.linspace(1, 2, 400)])
    with pytest.warns(ConvergenceWarning):
        top_eigenpairs(symmetric(values), 2, tolerance=1e-9, max_products=60, progress=True)
    assert len(set(re.findall(r"1/2 .*?products=(\d+)", capsys.readouterr().err))) > 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@WAYS
def test_everything_stays_on_the_operators_device(which):
    values = spread(300, 3.0, 4.0, 4.0, 4.0)
    found = top_eigenpairs(symmetric(values).cuda(), 5, which=which)
    for name in ("values", "vectors", "residuals", "converged"):
        assert getattr(found, name).is_cuda
    torch.testing.assert_close(found.values.cpu(), wanted(values, 5, which), rtol=1e-4, atol=0)


@pytest.mark.check(after=2)
@pytest.mark.parametrize("which", ["largest", "smallest"])
@pytest.mark.parametrize("max_products", [60, 100, 200, 300, 600])
def test_copies_that_were_not_searched_for_are_warned_of(max_products, which):
    # Every eigenvalue ten times, which is more than a block of random vectors sees.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 40, dtype=torch.float64, generator=generator)
    matrix = torch.kron(x.T @ x / 300, torch.eye(10, dtype=torch.float64))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = top_eigenpairs(matrix, 15, which=which, max_products=max_products)
    expected = wanted(torch.linalg.eigvalsh(matrix), 15, which)
    assert torch.allclose(found.values, expected, rtol=1e-4) or caught
    assert bool(found.converged.all()) == (not caught)


def test_a_search_for_copies_that_was_cut_short_is_named(monkeypatch):
    def refine(search, space, *given, **options):
        # The budget ends with the first search.
        found = original(search, space, *given, **options)
        search.max_products = search.products
        return found

    original = eigenpairs._refine
    monkeypatch.setattr(eigenpairs, "_refine", refine)
    matrix = torch.diag(torch.cat([torch.full((30,), 3.0), torch.linspace(1, 2, 170)]).double())
    with pytest.warns(ConvergenceWarning, match="may not be the outermost: .* all copies of a multiple eigenvalue"):
        found = top_eigenpairs(matrix, 12)
    certain = int(found.converged.sum())
    assert found.converged.tolist() == [True] * certain + [False] * (12 - certain)
    assert certain < 12
    assert torch.allclose(found.values[:certain], torch.full((certain,), 3.0, dtype=torch.float64))
