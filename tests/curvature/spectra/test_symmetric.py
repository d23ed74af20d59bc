"""Claim: what has no spectrum is refused, with the reason, before long work."""

import pytest
import torch

from lmc_curvature import HessianOperator, LMCCurvatureError
from lmc_curvature.curvature.spectra import SymmetricOperator, lanczos, spectral_density, top_eigenpairs, trace
from lmc_curvature.curvature.spectra.symmetric import Matrix
from lmc_curvature.errors import NonFiniteError, OperatorError
from tests.support.spectra import Counted, digits_hessian, symmetric

ALGORITHMS = {
    "lanczos": lambda operator: lanczos(operator, 5),
    "top_eigenpairs": lambda operator: top_eigenpairs(operator, 3),
    "top_eigenpairs, one by one": lambda operator: top_eigenpairs(operator, 3, block_size=1),
    "spectral_density": lambda operator: spectral_density(operator, probes=2, steps=5),
}
anyhow = pytest.mark.parametrize("run", ALGORITHMS.values(), ids=ALGORITHMS)


class Sheared(Counted):
    """A diagonal matrix with something skew, or anything else, added to it."""

    def __init__(self, values, added, dtype=torch.float64):
        super().__init__(values)
        self.added, self.dtype = added, dtype

    def matmat(self, matrix):
        return super().matmat(matrix) + self.added(matrix.double())


def shift(matrix):
    """A skew matrix, as large in norm as the diagonals below."""
    return matrix.roll(1, 0) - matrix.roll(-1, 0)


@anyhow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_operator_that_is_not_symmetric_is_refused_after_two_steps(run, dtype):
    operator = Sheared(torch.linspace(-1, 2, 300), shift, dtype)
    with pytest.raises(OperatorError, match=r"not symmetric: ⟨u, Av⟩ and ⟨v, Au⟩ differ by .* of their size"):
        run(operator)
    assert operator.calls == 2


@anyhow
def test_a_large_operator_is_found_out_as_surely_as_a_small_one(run):
    operator = Sheared(torch.linspace(-1, 2, 300_000), shift, torch.float32)
    with pytest.raises(OperatorError, match="not symmetric"):
        run(operator)


@pytest.mark.check(after=8)
@anyhow
@pytest.mark.parametrize("seed", range(5))
def test_rounding_in_single_precision_is_not_taken_for_asymmetry(run, seed):
    generator = torch.Generator().manual_seed(seed)

    def rounding(matrix):
        return 1e-5 * matrix.norm(dim=0) * torch.randn(matrix.shape, generator=generator, dtype=torch.float64) / 20

    # One eigenvalue far above all others, so that random vectors see little of the norm.
    run(Sheared(torch.cat([torch.linspace(-1, 1, 399), torch.tensor([300.0])]), rounding, torch.float32))


@anyhow
def test_no_bar_is_shown_where_there_is_no_terminal(run, capsys):
    run(symmetric(torch.linspace(-1, 2, 60)))
    assert capsys.readouterr().err == ""


@anyhow
def test_networks_in_single_precision_are_symmetric(run):
    run(digits_hessian(torch.float32))


def test_a_small_asymmetric_matrix_is_refused_when_it_is_diagonalised():
    for matrix in (torch.arange(9.0).view(3, 3), torch.tensor([[0.0, 1.0], [-1.0, 0.0]])):
        with pytest.raises(OperatorError, match="not symmetric"):
            top_eigenpairs(matrix, 1)
        with pytest.raises(OperatorError, match="not symmetric"):
            spectral_density(matrix)


BAD_MATRICES = {
    "between layers": (lambda: digits_hessian().block("0", "2"), r"390 × 70; expected a square one.*H.block\(layer\)"),
    "wide": (lambda: torch.ones(2, 3), "shape 2 × 3; expected a square one"),
    "vector": (lambda: torch.ones(3), r"shape \(3,\); expected \(n, n\)"),
    "integers": (lambda: torch.eye(3).long(), "int64; expected real"),
    "complex": (lambda: torch.eye(3).to(torch.complex64), "complex64; expected real"),
    "empty": (lambda: torch.ones(0, 0), "shape 0 × 0"),
    "something else": (lambda: [[1.0]], "is a list; expected a torch matrix, or an operator"),
}


@pytest.mark.parametrize(("make", "message"), BAD_MATRICES.values(), ids=BAD_MATRICES)
@pytest.mark.parametrize("run", [*ALGORITHMS.values(), trace], ids=[*ALGORITHMS, "trace"])
def test_what_has_no_spectrum_is_refused(run, make, message, untyped):
    with pytest.raises(OperatorError, match=message) as error:
        run(make())
    assert isinstance(error.value, LMCCurvatureError)


@pytest.mark.parametrize("run", [*ALGORITHMS.values(), trace], ids=[*ALGORITHMS, "trace"])
@pytest.mark.parametrize("size", [10, 200])
def test_products_that_are_not_finite_are_refused(run, size):
    values = torch.ones(size)
    values[3] = torch.inf
    with pytest.raises(NonFiniteError, match="products of the operator .* infinite or not a number"):
        run(Counted(values))


def test_operators_and_matrices_are_told_apart():
    assert isinstance(digits_hessian(), SymmetricOperator)
    assert isinstance(digits_hessian().block("0"), SymmetricOperator)
    assert isinstance(HessianOperator, type)
    assert not isinstance(torch.eye(2), SymmetricOperator)


def test_a_dense_matrix_is_found_by_its_products():
    matrix = symmetric(torch.linspace(-2, 3, 600))
    wrapped = Sheared(torch.zeros(600), lambda vectors: matrix @ vectors)
    torch.testing.assert_close(Matrix.of(wrapped).dense(), matrix)
    assert wrapped.products == 600


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_random_vectors_have_unit_variance_and_do_not_depend_on_their_number(distribution):
    matrix = Matrix.of(Counted(torch.ones(5000)))
    few, many = (matrix.random_rows(count, torch.Generator().manual_seed(1), distribution).double() for count in (2, 6))
    torch.testing.assert_close(few, many[:2])
    covariance = many @ many.T / 5000
    torch.testing.assert_close(covariance, torch.eye(6, dtype=torch.float64), rtol=0, atol=0.08)
    assert set(many.abs().unique().tolist()) == {1.0} if distribution == "rademacher" else many.abs().max() > 3
