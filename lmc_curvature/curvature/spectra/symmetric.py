"""What the spectral algorithms ask of a matrix: a symmetric operator that multiplies several vectors at once."""

from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from lmc_curvature.errors import NonFiniteError, OperatorError, OptionError

Distribution = Literal["rademacher", "gaussian"]

# Columns of a dense matrix that are computed in one call.
_CHUNK = 512


@runtime_checkable
class SymmetricOperator(Protocol):
    """A symmetric matrix that is known by its products.

    Any `CurvatureOperator` is one: a Hessian, a Gauss-Newton matrix, a layer's block of either. If the operator has a
    `dtype`, or an `objective` that has one, it tells how much rounding its products carry; otherwise that of float32
    is assumed.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns, (n, n)."""
        ...

    @property
    def device(self) -> torch.device:
        """Where products are computed."""
        ...

    def matmat(self, matrix: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """The product with k vectors, float64."""
        ...


Operator = SymmetricOperator | Tensor
"""What the spectral algorithms take: an operator, or a dense matrix."""


class _DenseOperator:
    """A dense matrix with the interface of an operator."""

    def __init__(self, matrix: Float[Tensor, "n n"]):
        self._matrix = matrix.detach().double()
        self.shape, self.device, self.dtype = (len(matrix), len(matrix)), matrix.device, matrix.dtype

    def matmat(self, matrix: Float[Tensor, "n k"]) -> Float64[Tensor, "n k"]:
        return self._matrix @ matrix.double()


def as_operator(operator: Operator) -> SymmetricOperator:
    """Wrap a dense matrix, and refuse what cannot have a spectrum.

    Raises:
        OperatorError: The operator is not square, is empty, or is a matrix of other than real floating-point numbers.
    """
    if isinstance(operator, Tensor):
        if not operator.is_floating_point():
            raise OperatorError(f"The matrix has type {operator.dtype}; expected real floating-point numbers.")
        if operator.ndim != 2:
            raise OperatorError(f"The matrix has shape {tuple(operator.shape)}; expected (n, n).")
    elif not isinstance(operator, SymmetricOperator):
        raise OperatorError(
            f"The operator is a {type(operator).__name__}; expected a torch matrix, or an operator with shape, device "
            "and matmat, such as HessianOperator(objective)."
        )
    rows, columns = tuple(operator.shape)
    if rows != columns:
        raise OperatorError(
            f"The operator has shape {rows} × {columns}; expected a square one. A block between two layers has no "
            "eigenvalues: take a layer's own block, H.block(layer)."
        )
    if rows == 0:
        raise OperatorError("The operator has shape 0 × 0; expected at least one row.")
    return _DenseOperator(operator) if isinstance(operator, Tensor) else operator


def precision_of(operator: SymmetricOperator) -> torch.dtype | None:
    """The floating-point type that an operator computes in; None if it does not say."""
    for owner in (operator, getattr(operator, "objective", None)):
        dtype = getattr(owner, "dtype", None)
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
            return dtype
    return None


def storage_dtype(operator: SymmetricOperator) -> torch.dtype:
    """The type to keep vectors in: float32 where products are no better than that, since bases are large."""
    precision = precision_of(operator)
    return torch.float64 if precision is None else torch.promote_types(precision, torch.float32)


def rounding_of(operator: SymmetricOperator) -> float:
    """The relative rounding error of one operation of the operator."""
    own = getattr(operator, "dtype", None)
    rounding = getattr(getattr(operator, "objective", None), "rounding", None)
    if isinstance(rounding, float) and not isinstance(own, torch.dtype):
        return rounding
    return torch.finfo(precision_of(operator) or torch.float32).eps


def multiply(operator: SymmetricOperator, vectors: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
    """Products with k vectors, which stand and come back as rows, in the vectors' type.

    Raises:
        NonFiniteError: A product is infinite or not a number.
    """
    products = operator.matmat(vectors.T).T.to(vectors.dtype).contiguous()
    bad = int((~torch.isfinite(products)).any(dim=1).sum())
    if bad:
        raise NonFiniteError(
            f"{bad} of {len(products)} products of the operator with finite vectors have entries that are infinite or "
            "not a number. Has the training diverged?"
        )
    return products


def dense_matrix(operator: SymmetricOperator) -> Float64[Tensor, "n n"]:
    """The operator as a symmetric matrix, by its products with the unit vectors.

    Raises:
        OperatorError: The matrix is not symmetric.
        NonFiniteError: It has entries that are infinite or not a number.
    """
    size = operator.shape[0]
    units = torch.eye(size, dtype=torch.float64, device=operator.device)
    matrix = torch.cat([multiply(operator, rows) for rows in units.split(_CHUNK)])
    skew, size = (float(torch.linalg.matrix_norm(part)) for part in (matrix - matrix.T, matrix))
    check_symmetric(operator, skew**2 / 2, size**2)
    return (matrix + matrix.T) / 2


def check_symmetric(operator: SymmetricOperator, difference: float, scale: float) -> None:
    """Refuse an operator whose products ⟨u, A v⟩ and ⟨v, A u⟩ differ by more than rounding.

    The difference is to be taken at random u and v = A u. Relative to ‖v‖² it is there 2 ‖K‖² / ‖A‖², with K the skew
    part of A, in any dimension; at two random vectors it would drown in the rounding errors of a large network.

    Args:
        operator: Tells how much rounding to allow for.
        difference: Between the two products.
        scale: The size of the products.

    Raises:
        OperatorError: The operator is not symmetric.
    """
    # Rounding in a network is some thousand times that of one operation, and far below 1 even in half precision.
    tolerance = min(max(1e5 * rounding_of(operator), 1e-6), 0.5)
    if difference > tolerance * scale:
        raise OperatorError(
            f"The operator is not symmetric: ⟨u, Av⟩ and ⟨v, Au⟩ differ by {difference / scale:.2g} of their size, and "
            f"rounding explains {tolerance:.2g} at most. A Hessian is symmetric: does the loss change from one "
            "evaluation to the next? Of another matrix take (A + Aᵀ) / 2."
        )


def random_rows(
    operator: SymmetricOperator, count: int, generator: torch.Generator, distribution: Distribution = "gaussian"
) -> Float[Tensor, "count n"]:
    """Random vectors as rows, of independent entries with mean zero and variance one.

    They are drawn on the CPU, one by one: a seed gives the same vectors on every device and for every count.
    """
    size, dtype = operator.shape[0], storage_dtype(operator)
    rows = torch.empty(count, size, dtype=dtype, device=operator.device)
    for row in rows:
        drawn = torch.empty(size, dtype=torch.float32)
        if distribution == "rademacher":
            drawn.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
        else:
            drawn.normal_(generator=generator)
        row.copy_(drawn)
    return rows


def check_count_option(name: str, value: int, largest: int | None = None) -> None:
    """Refuse a count that is not a positive whole number, or exceeds the dimension of the operator.

    Raises:
        OptionError: Names the option and its range.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise OptionError(f"{name}={value!r}: expected a whole number, at least 1.")
    if largest is not None and value > largest:
        raise OptionError(f"{name}={value} exceeds the dimension of the operator, {largest}.")
