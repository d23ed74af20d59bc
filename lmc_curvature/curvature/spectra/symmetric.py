"""Symmetric operators as the spectral algorithms use them: products with rows, their precision, and checks."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from tqdm.auto import tqdm

from lmc_curvature.errors import NonFiniteError, OperatorError, OptionError, check_memory, counted

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
        """Device of the products."""
        ...

    def matmat(self, matrix: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """The product with k vectors, float64."""
        ...


Operator = SymmetricOperator | Tensor
"""An operator, or a dense matrix."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """A square matrix A that is known by its products, with vectors as rows.

    Attributes:
        size: Dimension n.
        device: Device of the products.
        dtype: Type to keep vectors in: float32 where products are no better than that, since bases are large.
        rounding: Relative rounding error of one operation in a product.
        matmat: The product with vectors as columns.
    """

    size: int
    device: torch.device
    dtype: torch.dtype
    rounding: float
    matmat: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, operator: Operator) -> "Matrix":
        """Wrap an operator or a dense matrix, and refuse what cannot have a spectrum.

        Raises:
            OperatorError: The operator is not square, is empty, or is a matrix of other than real floating-point
                numbers.
        """
        if isinstance(operator, Tensor):
            if not operator.is_floating_point():
                raise OperatorError(f"The matrix has type {operator.dtype}; expected real floating-point numbers.")
            if operator.ndim != 2:
                raise OperatorError(f"The matrix has shape {tuple(operator.shape)}; expected (n, n).")
        elif not isinstance(operator, SymmetricOperator):
            raise OperatorError(
                f"The operator is a {type(operator).__name__}; expected a torch matrix, or an operator with shape, "
                "device and matmat, such as HessianOperator(objective)."
            )
        rows, columns = tuple(operator.shape)
        if rows != columns:
            raise OperatorError(
                f"The operator has shape {rows} × {columns}; expected a square one. A block between two layers has no "
                "eigenvalues: take a layer's own block, H.block(layer)."
            )
        if rows == 0:
            raise OperatorError("The operator has shape 0 × 0; expected at least one row.")
        precision, rounding = _precision(operator)
        matmat = _multiplier(operator) if isinstance(operator, Tensor) else operator.matmat
        return cls(rows, operator.device, torch.promote_types(precision, torch.float32), rounding, matmat)

    @contextlib.contextmanager
    def progress_bar(self, description: str, products: int, progress: bool | None) -> Iterator["Matrix"]:
        """The same matrix, whose products move a progress bar while the block runs."""
        silent = None if progress is None else not progress
        with tqdm(total=products, desc=description, unit="product", disable=silent) as bar:

            def matmat(columns: Tensor) -> Tensor:
                found = self.matmat(columns)
                bar.update(columns.shape[1])
                return found

            yield dataclasses.replace(self, matmat=matmat)

    def multiply(self, vectors: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        """Products with k vectors, in the vectors' type; vectors and products are rows.

        Raises:
            NonFiniteError: A product is infinite or not a number.
        """
        products = self.matmat(vectors.T).T.to(vectors.dtype).contiguous()
        bad = int((~torch.isfinite(products)).any(dim=1).sum())
        if bad:
            raise NonFiniteError(
                f"{bad} of {len(products)} products of the operator with finite vectors have entries that are infinite "
                "or not a number. Has the training diverged?"
            )
        return products

    def dense(self) -> Float64[Tensor, "n n"]:
        """The matrix, made symmetric, by its products with the unit vectors.

        Raises:
            OperatorError: The matrix is not symmetric.
            NonFiniteError: It has entries that are infinite or not a number.
        """
        units = torch.eye(self.size, dtype=torch.float64, device=self.device)
        matrix = torch.cat([self.multiply(rows) for rows in units.split(_CHUNK)])
        skew, norm = (float(torch.linalg.matrix_norm(part)) for part in (matrix - matrix.T, matrix))
        self.check_symmetric(skew**2 / 2, norm**2)
        return (matrix + matrix.T) / 2

    def check_symmetric(self, difference: float, scale: float) -> None:
        """Refuse a matrix whose products ⟨u, A v⟩ and ⟨v, A u⟩ differ by more than rounding.

        Callers take a random u and v = A u. The difference, relative to ‖v‖², is then 2 ‖K‖² / ‖A‖² in any dimension,
        with K the skew part of A; at two random vectors it would drown in the rounding errors of a large network.

        Args:
            difference: Size of ⟨u, A v⟩ − ⟨v, A u⟩.
            scale: Size of the two products.

        Raises:
            OperatorError: The matrix is not symmetric.
        """
        # Rounding in a network is some thousand times that of one operation, and far below 1 even in half precision.
        tolerance = min(max(1e5 * self.rounding, 1e-6), 0.5)
        if difference > tolerance * scale:
            raise OperatorError(
                f"The operator is not symmetric: ⟨u, Av⟩ and ⟨v, Au⟩ differ by {difference / scale:.2g} of their size, "
                f"and rounding explains {tolerance:.2g} at most. A Hessian is symmetric: does the loss change from one "
                "evaluation to the next? Of another matrix take (A + Aᵀ) / 2."
            )

    def random_rows(
        self, count: int, generator: torch.Generator, distribution: Distribution = "gaussian"
    ) -> Float[Tensor, "count n"]:
        """Random vectors as rows, of independent entries with mean zero and variance one.

        They are drawn on the CPU, one by one: a seed gives the same vectors on every device and for every count.
        """
        rows = torch.empty(count, self.size, dtype=self.dtype, device=self.device)
        for row in rows:
            drawn = torch.empty(self.size, dtype=torch.float32)
            if distribution == "rademacher":
                row.copy_(drawn.bernoulli_(0.5, generator=generator) * 2 - 1)
            else:
                row.copy_(drawn.normal_(generator=generator))
        return rows

    def gib(self, vectors: int) -> float:
        """GiB that some vectors take."""
        return vectors * self.size * self.dtype.itemsize / 2**30

    def check_room(self, vectors: int, memory_gib: float, remedy: str) -> None:
        """Raise `MemoryBudgetError` if some vectors take more than the budget."""
        what = f"Room for {counted(vectors, 'vector')} of {counted(self.size, 'entry')}"
        check_memory(self.gib(vectors), memory_gib, what, f"{remedy}, take a layer's block, or raise memory_gib.")


def _multiplier(matrix: Float[Tensor, "n n"]) -> Callable[[Tensor], Tensor]:
    exact = matrix.detach().double()
    return lambda columns: exact @ columns.double()


def _precision(operator: Operator) -> tuple[torch.dtype, float]:
    """The type of an operator's numbers, float64 if it does not say, and the rounding error of one operation."""
    objective = getattr(operator, "objective", None)
    for owner in (operator, objective):
        dtype = getattr(owner, "dtype", None)
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
            rounding = getattr(objective, "rounding", None) if owner is objective else None
            return dtype, rounding or torch.finfo(dtype).eps
    return torch.float64, torch.finfo(torch.float32).eps


def check_count_option(name: str, value: int, largest: int | None = None) -> None:
    """Refuse a count that is not a positive whole number, or exceeds the dimension of the operator.

    Raises:
        OptionError: Names the option and its range.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise OptionError(f"{name}={value!r}: expected a whole number, at least 1.")
    if largest is not None and value > largest:
        raise OptionError(f"{name}={value} exceeds the dimension of the operator, {largest}.")
