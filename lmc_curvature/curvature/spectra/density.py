"""The density of the eigenvalues of a symmetric operator, from products with random vectors."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import numpy as np
import torch
from jaxtyping import Float, Float64

from lmc_curvature.curvature.spectra.lanczos import Chains
from lmc_curvature.curvature.spectra.symmetric import Distribution, Matrix, Operator, check_count_option
from lmc_curvature.curvature.spectra.trace import Estimate
from lmc_curvature.errors import OptionError, check_budget, check_choice, counted
from lmc_curvature.plotting.summary import Display, Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

# Wide enough for the peaks of single outliers to be seen, narrow enough for the bulk not to be the kernel's own shape.
WIDTH_SHARE = 0.004


@dataclass(frozen=True, eq=False, repr=False)
class SpectralDensity(Display):
    """The distribution of the eigenvalues of a symmetric matrix, as a discrete measure for each random vector.

    The measures' mean approximates the spectral measure (1/n) Σ_i δ(λ − λ_i), which gives each eigenvalue the same
    share. Its moments and the smoothed curve are means over the vectors.

    Attributes:
        nodes: Positions of the mass of each measure, (probes, steps), increasing.
        weights: Mass at the nodes, (probes, steps), not negative; each row sums to 1.
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
        moments = (self.weights * self.nodes**order).sum(axis=1)
        return Estimate(float(moments[0]), 0.0) if self.exact else Estimate.mean_of(moments)

    @property
    def default_width(self) -> float:
        """Standard deviation of the kernel by default, `WIDTH_SHARE` of the support."""
        low, high = self.support
        # Eigenvalues that coincide up to rounding have no width that a grid of them could show.
        size = max(abs(low), abs(high))
        return WIDTH_SHARE * (high - low if high - low > 1e-9 * size else size or 1.0)

    def grid(self, points: int = 1001, *, width: float | None = None) -> Float64[np.ndarray, " points"]:
        """Equally spaced points that cover the support and four kernel widths on either side.

        Raises:
            OptionError: The number of points or the width is not positive.
        """
        check_count_option("points", points)
        low, high = self.support
        margin = 4 * check_width(self.default_width if width is None else width)
        return np.linspace(low - margin, high + margin, points)

    def curve(
        self, points: Float[np.ndarray, " points"], *, width: float | None = None
    ) -> Float64[np.ndarray, " points"]:
        """The density smoothed by a Gaussian kernel, per unit of λ; it integrates to 1.

        Args:
            points: Positions to evaluate it at; `grid()` is a good choice.
            width: Standard deviation of the kernel, by default `default_width`.

        Raises:
            OptionError: The width is not positive.
        """
        width = check_width(self.default_width if width is None else width)
        points = np.asarray(points, dtype=np.float64)
        nodes, weights = self.nodes.ravel(), self.weights.ravel() / len(self.weights)
        # One by one: all points at once would take as many numbers as there are points times nodes.
        heights = [np.exp(-0.5 * ((point - nodes) / width) ** 2) @ weights for point in points]
        return np.array(heights) / (width * math.sqrt(2 * math.pi))

    def plot(self) -> "Figure | SubFigure":
        """Draw the smoothed density on a logarithmic scale; `draw_spectral_density` draws several over one another."""
        from lmc_curvature.curvature.spectra.drawing import draw_spectral_density

        return draw_spectral_density(self)

    def _summary(self) -> Summary:
        low, high = self.support
        probes, steps = self.nodes.shape
        mean = self.moment(1)
        error = f" ± {mean.standard_error:.2g} (sampling)" if mean.standard_error > 0 else ""
        made = "by the eigenvalues themselves" if self.exact else f"from {probes} × {steps} Lanczos nodes"

        def draw() -> "Figure":
            from lmc_curvature.curvature.spectra.drawing import draw_small_density

            return draw_small_density(self)

        return Summary(
            f"SpectralDensity of {counted(self.dimension, 'eigenvalue')}, {made}",
            {"mean eigenvalue": f"{mean.value:.4g}{error}", "from, to": f"{low:.4g}, {high:.4g}"},
            ".plot(), .curve(density.grid()), .moment(order), .nodes, .weights",
            draw,
        )


def check_width(width: float) -> float:
    """Return the width of a kernel, and raise `OptionError` unless it is positive and finite."""
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
    memory_gib: float = 4.0,
    progress: bool | None = None,
) -> SpectralDensity:
    """Estimate the density of the eigenvalues of a symmetric operator, by stochastic Lanczos quadrature.

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
        distribution: Distribution of the vectors' entries. The Gaussian's error does not depend on the eigenvectors.
        seed: Seed of the random vectors.
        memory_gib: Largest size of the bases, which hold n × `probes` × `steps` numbers of 4 or 8 bytes. If they do
            not fit, the recurrences run without reorthogonalisation and keep two vectors each: eigenvalues found early
            then come as several nodes that share the weight, to the same density (Chen, Trogdon and Ubaru 2021).
        progress: Show a progress bar over steps, or products; by default on a terminal and in notebooks.

    Raises:
        OperatorError: The operator is not square, or is found not to be symmetric at the second step.
        OptionError: A number is not positive, or `distribution` is not a choice.
        MemoryBudgetError: Even two vectors a probe need more than `memory_gib`.
        NonFiniteError: A product is not finite.
    """
    matrix = Matrix.of(operator)
    check_count_option("probes", probes)
    check_count_option("steps", steps)
    check_choice("distribution", distribution, get_args(Distribution))
    check_budget(memory_gib)
    size = matrix.size
    if size <= probes * steps and matrix.gib(3 * size) <= memory_gib:
        with matrix.progress_bar("spectral density", size, progress) as operand:
            values = torch.linalg.eigvalsh(operand.dense()).cpu().numpy()
        return SpectralDensity(values[None], np.full((1, size), 1 / size), size, exact=True)
    steps = min(steps, size)
    matrix.check_room(4 * probes, memory_gib, "take fewer probes")
    starts = matrix.random_rows(probes, torch.Generator().manual_seed(seed), distribution)
    chains = Chains(starts, steps, reorthogonalise=matrix.gib(probes * steps) <= memory_gib)
    chains.run(matrix, steps, description="spectral density", progress=progress)
    nodes, weights = _quadratures(torch.stack(chains.alphas).numpy(), torch.stack(chains.betas).numpy())
    return SpectralDensity(nodes, weights, size, exact=False)


def _quadratures(
    alphas: Float64[np.ndarray, "steps probes"], betas: Float64[np.ndarray, "steps probes"]
) -> tuple[Float64[np.ndarray, "probes steps"], Float64[np.ndarray, "probes steps"]]:
    """Nodes and weights of the Gauss quadrature of each column's tridiagonal matrix (Golub and Welsch 1969)."""
    nodes, weights = np.empty_like(alphas.T), np.zeros_like(alphas.T)
    for probe, (diagonal, off_diagonal) in enumerate(zip(alphas.T, betas.T, strict=True)):
        # A chain that has ended has a zero there; what follows has no weight, and repeats the last node.
        length = int(np.append(off_diagonal[:-1], 0.0).argmin()) + 1
        # NumPy reads the lower triangle only.
        values, vectors = np.linalg.eigh(np.diag(diagonal[:length]) + np.diag(off_diagonal[: length - 1], -1))
        nodes[probe, :length], nodes[probe, length:] = values, values[-1]
        weights[probe, :length] = vectors[0] ** 2
    return nodes, weights
