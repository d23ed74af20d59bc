"""The trace of an operator, estimated from products with random vectors."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from lmc_curvature.curvature.spectra.symmetric import Distribution, Matrix, Operator, check_count_option
from lmc_curvature.errors import OptionError, check_choice
from lmc_curvature.plotting.summary import Display, Summary

TraceMethod = Literal["hutch++", "hutchinson"]


@dataclass(frozen=True, repr=False)
class Estimate(Display):
    """A number that was estimated by random vectors.

    Attributes:
        value: The estimate.
        standard_error: Its standard error, from the spread between vectors; zero if the number is exact, NaN for a
            single vector.
    """

    value: float
    standard_error: float

    def _summary(self) -> Summary:
        if self.standard_error == 0:
            return Summary(f"Estimate: {self.value:.6g} (exact)")
        if not math.isfinite(self.standard_error):
            return Summary(f"Estimate: {self.value:.6g} from a single random vector, which tells no error")
        error = f"± {self.standard_error:.2g} (standard error, from the spread between random vectors)"
        return Summary(f"Estimate: {self.value:.6g} {error}")

    @classmethod
    def mean_of(cls, samples: Float64[np.ndarray, " n"]) -> "Estimate":
        """The mean of independent samples."""
        error = samples.std(ddof=1) / math.sqrt(len(samples)) if len(samples) > 1 else math.nan
        return cls(float(samples.mean()), float(error))


def trace(
    operator: Operator,
    *,
    probes: int = 60,
    method: TraceMethod = "hutch++",
    distribution: Distribution = "rademacher",
    seed: int = 0,
    progress: bool | None = None,
) -> Estimate:
    """Estimate the trace of an operator from products with random vectors.

    `"hutchinson"` averages ⟨v, A v⟩ over the vectors (Hutchinson 1989), in one call of the operator. `"hutch++"`
    (Meyer, Musco, Musco and Woodruff 2021) spends a third of the products on finding a basis Q of the largest
    eigenvalues, a third on their part trace(Qᵀ A Q) of the trace, which is exact, and only estimates the rest; it
    takes two calls. Networks have a few large eigenvalues, so its error is several times smaller for as many products.

    The standard error is from the spread between the vectors that estimate, for Hutch++ given Q: with g of them the
    error over it follows about Student's t with g − 1 degrees of freedom. An operator with no more rows than `probes`
    gives its exact trace. It need not be symmetric.

    Args:
        operator: An operator, or a dense matrix.
        probes: Products to make, at least 2, and 6 for Hutch++.
        method: `"hutch++"` or `"hutchinson"`.
        distribution: Distribution of the vectors' entries.
        seed: Seed of the random vectors.
        progress: Show a progress bar over products; by default on a terminal and in notebooks.

    Raises:
        OperatorError: The operator is not square.
        OptionError: There are too few probes, or another option is not a choice.
        NonFiniteError: A product is not finite.
    """
    matrix = Matrix.of(operator)
    check_choice("method", method, get_args(TraceMethod))
    check_choice("distribution", distribution, get_args(Distribution))
    check_count_option("probes", probes)
    least = 6 if method == "hutch++" else 2
    if least > probes and matrix.size > probes:
        raise OptionError(f"probes={probes}: method={method!r} takes at least {least}.")
    generator = torch.Generator().manual_seed(seed)
    with matrix.progress_bar("trace", min(probes, matrix.size), progress) as operand:
        if matrix.size <= probes:
            units = torch.eye(matrix.size, dtype=torch.float64, device=matrix.device)
            return Estimate(float(_quadratic_forms(operand, units).sum()), 0.0)
        if method == "hutchinson":
            return Estimate.mean_of(_quadratic_forms(operand, matrix.random_rows(probes, generator, distribution)))
        return _hutch_plus_plus(operand, probes, distribution, generator)


def _hutch_plus_plus(matrix: Matrix, probes: int, distribution: Distribution, generator: torch.Generator) -> Estimate:
    third = probes // 3
    sketch = matrix.multiply(matrix.random_rows(third, generator, distribution))
    basis = torch.linalg.qr(sketch.T)[0].T.contiguous()
    vectors = matrix.random_rows(probes - 2 * third, generator, distribution)
    vectors -= (vectors @ basis.T) @ basis
    values = _quadratic_forms(matrix, torch.cat([basis, vectors]))
    rest = Estimate.mean_of(values[third:])
    return Estimate(float(values[:third].sum() + rest.value), rest.standard_error)


def _quadratic_forms(matrix: Matrix, rows: Float[Tensor, "k n"]) -> Float64[np.ndarray, " k"]:
    """⟨v, A v⟩ of each row v."""
    return torch.linalg.vecdot(rows, matrix.multiply(rows)).double().cpu().numpy()
