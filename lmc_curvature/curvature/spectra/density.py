"""Spectral density and trace of a symmetric operator, from products with random vectors."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Float, Float64
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from lmc_curvature.curvature.spectra.lanczos import Chains, check_budget, vectors_gib
from lmc_curvature.curvature.spectra.symmetric import (
    Distribution,
    Operator,
    SymmetricOperator,
    as_operator,
    check_count_option,
    dense_matrix,
    multiply,
    random_rows,
)
from lmc_curvature.errors import OptionError, check_choice

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

TraceMethod = Literal["hutch++", "hutchinson"]
DISTRIBUTIONS: tuple[Distribution, ...] = ("rademacher", "gaussian")
TRACE_METHODS: tuple[TraceMethod, ...] = ("hutch++", "hutchinson")

# Wide enough for the peaks of single outliers to be seen, narrow enough for the bulk not to be the kernel's own shape.
WIDTH_SHARE = 0.004

# Numbers that the smoothed curve makes at once: points times nodes.
_CURVE_CHUNK = 2**22


@dataclass(frozen=True)
class Estimate:
    """A number that was estimated by random vectors.

    Attributes:
        value: The estimate.
        standard_error: Of it, from the spread between vectors; zero if the number is exact, NaN for a single vector.
    """

    value: float
    standard_error: float


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """How the eigenvalues of a symmetric matrix are distributed: a discrete measure for each random vector.

    The measures' mean approximates the spectral measure (1/n) Σ_i δ(λ − λ_i), which gives each eigenvalue the same
    share. Its moments and the smoothed curve are means over the vectors.

    Attributes:
        nodes: Where a measure has mass, (probes, steps), increasing.
        weights: The mass, (probes, steps), not negative; each row sums to 1.
        dimension: Number of eigenvalues, n.
        exact: Whether the nodes are all eigenvalues: there is a single row then, with weights 1/n.
    """

    nodes: Float64[np.ndarray, "probes steps"]
    weights: Float64[np.ndarray, "probes steps"]
    dimension: int
    exact: bool

    @property
    def mean(self) -> float:
        """Mean eigenvalue, which is trace / n."""
        return self.moment(1).value

    @property
    def support(self) -> tuple[float, float]:
        """The smallest and the largest node: estimates, from within, of the extreme eigenvalues."""
        return float(self.nodes.min()), float(self.nodes.max())

    def moment(self, order: int) -> Estimate:
        """Mean of λ to some power, which is trace(Aᵖ) / n.

        Raises:
            OptionError: The order is not a positive whole number.
        """
        check_count_option("order", order)
        return self._mean_over_probes((self.weights * self.nodes**order).sum(axis=1))

    def _mean_over_probes(self, values: Float64[np.ndarray, " probes"]) -> Estimate:
        return Estimate(float(values.mean()), 0.0 if self.exact else _standard_error(values))

    @cached_property
    def default_width(self) -> float:
        """The kernel's standard deviation by default, `WIDTH_SHARE` of the support."""
        low, high = self.support
        return WIDTH_SHARE * ((high - low) or max(abs(high), 1.0))

    def grid(self, points: int = 1001, *, width: float | None = None) -> Float64[np.ndarray, " points"]:
        """Equally spaced points that cover the support and four kernel widths on either side.

        Raises:
            OptionError: The number of points or the width is not positive.
        """
        check_count_option("points", points)
        low, high = self.support
        margin = 4 * self._checked_width(width)
        return np.linspace(low - margin, high + margin, points)

    def curve(
        self, points: Float[np.ndarray, " points"], *, width: float | None = None
    ) -> Float64[np.ndarray, " points"]:
        """The density smoothed by a Gaussian kernel, per unit of λ; it integrates to 1.

        Args:
            points: Where to evaluate it; `grid()` is a good choice.
            width: Standard deviation of the kernel, by default `default_width`.

        Raises:
            OptionError: The width is not positive.
        """
        width = self._checked_width(width)
        points = np.asarray(points, dtype=np.float64)
        nodes, weights = self.nodes.ravel(), self.weights.ravel() / len(self.weights)
        heights = np.empty_like(points)
        chunk = max(_CURVE_CHUNK // nodes.size, 1)
        for start in range(0, len(points), chunk):
            distances = (points[start : start + chunk, None] - nodes) / width
            heights[start : start + chunk] = np.exp(-0.5 * distances**2) @ weights
        return heights / (width * math.sqrt(2 * math.pi))

    def plot(self) -> "Figure | SubFigure":
        """Draw the smoothed density on a logarithmic scale; `draw_spectral_density` draws several over one another."""
        from lmc_curvature.curvature.spectra.drawing import draw_spectral_density

        return draw_spectral_density(self)

    def _checked_width(self, width: float | None) -> float:
        width = self.default_width if width is None else width
        if not 0 < width < math.inf:
            raise OptionError(f"width={width!r}: expected a positive standard deviation of the kernel.")
        return float(width)


def spectral_density(
    operator: Operator,
    *,
    probes: int = 8,
    steps: int = 64,
    distribution: Distribution = "rademacher",
    seed: int = 0,
    max_gib: float = 4.0,
    progress: bool = False,
) -> SpectralDensity:
    """Estimate how the eigenvalues of a symmetric operator are distributed, by stochastic Lanczos quadrature.

    From each of some random vectors v runs a Lanczos recurrence. The eigenvalues of its tridiagonal matrix, with the
    squared first entries of the eigenvectors as weights, are the Gauss quadrature of the measure
    Σ_i ⟨v, q_i⟩² δ(λ − λ_i), whose mean over v is the spectral measure (Ubaru, Chen and Saad 2017; for networks
    Ghorbani, Krishnan and Xiao 2019). It has the first 2 × `steps` moments of that measure.

    All recurrences take a step together, in one call of the operator. An operator whose dense matrix takes no more
    products, n ≤ `probes` × `steps`, and fits into memory, is diagonalised instead: the density is exact.

    Example:
        >>> density = spectral_density(HessianOperator(objective))
        >>> density.nodes, density.weights                          # (8, 64) each
        >>> density.curve(density.grid())                           # smoothed, for a picture
        >>> density.moment(1)                                       # mean eigenvalue, with its standard error

    Args:
        operator: A symmetric operator, or a dense matrix.
        probes: Random vectors. The statistical error falls with the square root of n × `probes`.
        steps: Lanczos steps, which is the number of nodes a vector.
        distribution: Of the vectors' entries. The Gaussian's error does not depend on the eigenvectors.
        seed: Of the random vectors.
        max_gib: Largest size of the bases, which hold n × `probes` × `steps` numbers of 4 or 8 bytes. If they do not
            fit, the recurrences run without reorthogonalisation and keep two vectors each: eigenvalues found early
            then come as several nodes that share the weight, to the same density (Chen, Trogdon and Ubaru 2021).
        progress: Show a progress bar over steps.

    Raises:
        OperatorError: The operator is not square, or is found not to be symmetric at the second step.
        OptionError: A number is not positive, or `distribution` is not a choice.
        MemoryBudgetError: Even two vectors a probe need more than `max_gib`.
        NonFiniteError: A product is not finite.
    """
    operator = as_operator(operator)
    check_count_option("probes", probes)
    check_count_option("steps", steps)
    check_choice("distribution", distribution, DISTRIBUTIONS)
    size = operator.shape[0]
    if size <= probes * steps and vectors_gib(operator, 3 * size) <= max_gib:
        return _exact_density(operator)
    steps = min(steps, size)
    check_budget(operator, 4 * probes, max_gib, "Take fewer probes or a layer's block, or raise max_gib.")
    generator = torch.Generator().manual_seed(seed)
    starts = random_rows(operator, probes, generator, distribution)
    chains = Chains(starts, steps, reorthogonalise=vectors_gib(operator, probes * steps) <= max_gib)
    chains.run(operator, steps, description="spectral density", progress=progress)
    nodes, weights = _quadratures(torch.stack(chains.alphas).numpy(), torch.stack(chains.betas[1:]).numpy())
    return SpectralDensity(nodes, weights, size, exact=False)


def _exact_density(operator: SymmetricOperator) -> SpectralDensity:
    values = torch.linalg.eigvalsh(dense_matrix(operator)).cpu().numpy()
    return SpectralDensity(values[None], np.full((1, len(values)), 1 / len(values)), len(values), exact=True)


def _quadratures(
    alphas: Float64[np.ndarray, "steps probes"], betas: Float64[np.ndarray, "steps probes"]
) -> tuple[Float64[np.ndarray, "probes steps"], Float64[np.ndarray, "probes steps"]]:
    """Nodes and weights of the quadrature that each column's tridiagonal matrix makes (Golub and Welsch 1969)."""
    nodes, weights = np.empty_like(alphas.T), np.zeros_like(alphas.T)
    for probe, (diagonal, off_diagonal) in enumerate(zip(alphas.T, betas.T, strict=True)):
        # A chain that has ended has a zero there; what follows has no weight, and repeats the last node.
        length = int(np.append(off_diagonal[:-1], 0.0).argmin()) + 1
        values, vectors = eigh_tridiagonal(diagonal[:length], off_diagonal[: length - 1])
        nodes[probe, :length], nodes[probe, length:] = values, values[-1]
        weights[probe, :length] = vectors[0] ** 2
    return nodes, weights


def trace(
    operator: Operator,
    *,
    probes: int = 60,
    method: TraceMethod = "hutch++",
    distribution: Distribution = "rademacher",
    seed: int = 0,
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
        distribution: Of the vectors' entries.
        seed: Of the random vectors.

    Raises:
        OperatorError: The operator is not square.
        OptionError: There are too few probes, or another option is not a choice.
        NonFiniteError: A product is not finite.
    """
    operator = as_operator(operator)
    check_choice("method", method, TRACE_METHODS)
    check_choice("distribution", distribution, DISTRIBUTIONS)
    check_count_option("probes", probes)
    if operator.shape[0] <= probes:
        return Estimate(float(_exact_trace(operator)), 0.0)
    least = 6 if method == "hutch++" else 2
    if probes < least:
        raise OptionError(f"probes={probes}: method={method!r} takes at least {least}.")
    generator = torch.Generator().manual_seed(seed)
    if method == "hutchinson":
        vectors = random_rows(operator, probes, generator, distribution)
        values = torch.linalg.vecdot(vectors, multiply(operator, vectors)).double().cpu().numpy()
        return Estimate(float(values.mean()), _standard_error(values))
    return _hutch_plus_plus(operator, probes, distribution, generator)


def _exact_trace(operator: SymmetricOperator) -> Tensor:
    units = torch.eye(operator.shape[0], dtype=torch.float64, device=operator.device)
    return multiply(operator, units).diagonal().sum()


def _hutch_plus_plus(
    operator: SymmetricOperator, probes: int, distribution: Distribution, generator: torch.Generator
) -> Estimate:
    third = probes // 3
    sketch = multiply(operator, random_rows(operator, third, generator, distribution))
    basis = torch.linalg.qr(sketch.T)[0].T.contiguous()
    vectors = random_rows(operator, probes - 2 * third, generator, distribution)
    vectors -= (vectors @ basis.T) @ basis
    rows = torch.cat([basis, vectors])
    values = torch.linalg.vecdot(rows, multiply(operator, rows)).double().cpu().numpy()
    within, outside = values[:third], values[third:]
    return Estimate(float(within.sum() + outside.mean()), _standard_error(outside))


def _standard_error(values: Float64[np.ndarray, " n"]) -> float:
    """Standard error of the mean of independent values; NaN for a single one."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
