"""Extreme eigenpairs of a symmetric operator, to a given residual."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor
from tqdm.auto import tqdm

from lmc_curvature.curvature.spectra.ritz import SearchSpace
from lmc_curvature.curvature.spectra.symmetric import Matrix, Operator, check_count_option
from lmc_curvature.errors import ConvergenceWarning, OptionError, check_choice, counted
from lmc_curvature.plotting.summary import Display, Summary, some

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Which = Literal["largest", "smallest", "magnitude"]

# Vectors of one call share the graph of a batch's gradient: b of them cost 3 + 4.5 b forward passes, so one at a time
# costs 7.5 a product, two 6, and four 5.25. But a block of b takes more products, for its polynomials are of 1/b the
# degree: 29, 34, 38 and 42 products for b = 1, 2, 3, 4 on the Hessians of four trained networks (ten eigenpairs, 1e-3).
# Two win, and unlike one they see the second copy of an eigenvalue, so that a search for more is rarely needed.
_BLOCK_SIZE = 2

# An eigenvalue of which little is in the first block may be passed over: the last Ritz pair comes near the one after
# it, with a part of the vector wanted that leaves a residual of that part times the gap. A smaller residual uncovers
# it: a tenth of the tolerance, for 9 % more products, misses 4 of 5040 searches (spectra whose outer eigenvalues lie
# close, k = 1, 3, 8) where the tolerance misses 24.
# Products of low precision may never reach it, so there is an end.
_LAST = 0.1
_MOST_FURTHER = 10


@dataclass(frozen=True, eq=False, repr=False)
class Eigenpairs(Display):
    """Eigenvalues of a symmetric operator at one end of its spectrum, with their vectors and residuals.

    All tensors are on the operator's device.

    Attributes:
        values: Eigenvalues λ, (k,), the outermost first.
        vectors: Orthonormal eigenvectors v as columns, (n, k), in the operator's precision.
        residuals: ‖A v − λ v‖ / |λ|, (k,), from products that were made. An eigenvalue of A lies within |λ| times
            this of λ, and in practice much nearer: the error goes with the residual's square.
        converged: Whether the residual is at most the tolerance, or cannot be told from the rounding of the products
            (as for eigenvalues that are zero), (k,).
        products: Number of products with the operator that were made.
    """

    values: Float64[Tensor, " k"]
    vectors: Float[Tensor, "n k"]
    residuals: Float64[Tensor, " k"]
    converged: Bool[Tensor, " k"]
    products: int

    def plot(self) -> "Figure":
        """Draw the eigenvalues, the outermost first."""
        from lmc_curvature.curvature.spectra.drawing import draw_eigenvalues

        residuals = self.values.abs() * self.residuals
        return draw_eigenvalues(self.values.cpu().numpy(), residuals.cpu().numpy(), "eigenvalues")

    def _summary(self) -> Summary:
        count = len(self.values)
        return Summary(
            f"Eigenpairs: {count} in dimension {len(self.vectors):,}, by {counted(self.products, 'product')}",
            {
                "values": some([f"{value:.4g}" for value in self.values.tolist()]),
                "residuals": f"{float(self.residuals.max()):.2g} of its eigenvalue, at most",
                "converged": "all" if self.converged.all() else f"{int(self.converged.sum())} of {count}",
            },
            ".values, .vectors, .residuals, .converged, .plot()",
            self.plot,
        )


def top_eigenpairs(
    operator: Operator,
    k: int,
    *,
    which: Which = "largest",
    tolerance: float = 1e-3,
    max_products: int | None = None,
    block_size: int = _BLOCK_SIZE,
    seed: int = 0,
    memory_gib: float = 4.0,
    progress: bool | None = None,
) -> Eigenpairs:
    """Find the k outermost eigenvalues of a symmetric operator, and their eigenvectors.

    Block Lanczos in the form of Davidson's method (Davidson 1975; Saad 2011, section 8.4): the search space grows by
    the residuals of Ritz pairs that are not yet exact enough, at most `block_size` at a time, and restarts from the
    best Ritz vectors when it is full. The images of its basis are kept, so residuals need no further products.

    The residual says how near a vector is to an eigenvector, and not which eigenvalue it is of: one whose vector has
    almost no part in the random start may be passed over, and the next one be found in its place. The last pair is
    therefore refined to a tenth of the tolerance, in ten steps at most, which uncovers most of these. Of spectra whose
    outer eigenvalues are 1 % apart, one search in a thousand or two still passes one over; where that matters, compare
    another `seed`.

    Multiple eigenvalues are found with all their copies. A block of b random vectors can see b copies, so where b
    Ritz values coincide, the space orthogonal to them is searched for another. An operator of few rows is diagonalised
    in one call: its search space starts as the whole space.

    Example:
        >>> found = top_eigenpairs(HessianOperator(objective), 10)
        >>> found.values, found.residuals                           # λ and ‖H v − λ v‖ / |λ|, (10,) each
        >>> top_eigenpairs(H.block("fc"), 1, which="smallest")      # of a layer's own Hessian, from the lower end

    Args:
        operator: A symmetric operator, or a dense matrix.
        k: Eigenpairs to find, at most n.
        which: `"largest"` and `"smallest"` by value, so from the upper and the lower end; `"magnitude"`: furthest
            from zero.
        tolerance: Relative residual to reach.
        max_products: Give up after this many products, by default 300 + 60 k.
        block_size: Products in one call of the operator.
        seed: Seed of the random start.
        memory_gib: Largest size of the search space and its images, 4 or 8 bytes a number as in `lanczos`. A smaller
            space restarts more often.
        progress: Show a progress bar over eigenpairs; by default on a terminal and in notebooks.

    Warns:
        ConvergenceWarning: Some pairs have not converged, or copies of a multiple eigenvalue were not searched for that
            may stand before them; `Eigenpairs.converged` says which.

    Raises:
        OperatorError: The operator is not square, or is found not to be symmetric at the second step.
        OptionError: `k` is not a whole number from 1 to the dimension, or another option has a bad value.
        MemoryBudgetError: The smallest search space would need more than `memory_gib`.
        NonFiniteError: A product is not finite.
    """
    matrix = Matrix.of(operator)
    check_choice("which", which, get_args(Which))
    check_count_option("k", k, matrix.size)
    check_count_option("block_size", block_size)
    max_products = 300 + 60 * k if max_products is None else max_products
    check_count_option("max_products", max_products)
    if max_products < k:
        raise OptionError(f"max_products={max_products}: {k} eigenpairs take at least as many products.")
    if not 0 < tolerance < 1:
        raise OptionError(f"tolerance={tolerance!r}: expected a relative residual between 0 and 1.")
    # Products with a basis of the whole space are no more than a search would take.
    if matrix.size <= min(max(4 * k, 32), max_products):
        block_size = matrix.size
    block_size = min(block_size, max_products)
    rank = {"largest": torch.positive, "smallest": torch.neg, "magnitude": torch.abs}[which]
    capacity, generator = _capacity(matrix, k, block_size, memory_gib), torch.Generator().manual_seed(seed)
    search = _Search(matrix, rank, tolerance, capacity, block_size, max_products, generator)
    # Without miniters the count of products would stand still until the next pair has converged, which may take long.
    with tqdm(total=k, desc="eigenpairs", disable=None if progress is None else not progress, miniters=0) as bar:
        space, norms, converged = _all_copies(search, k, bar)
    values = space.values[:k]
    residuals = norms / values.abs().clamp(min=1e-300)
    values, residuals, converged = (tensor.to(matrix.device) for tensor in (values, residuals, converged))
    pairs = Eigenpairs(values, space.vectors(k).T, residuals, converged, search.products)
    _warn_unless_converged(pairs, tolerance, max_products)
    return pairs


def _capacity(matrix: Matrix, k: int, block_size: int, memory_gib: float) -> int:
    """Number of vectors that the search space may hold."""
    # A larger space costs more than its products save; few searches need as much.
    useful = min(matrix.size, 60 + 10 * k)
    least = min(matrix.size, k + 3 * block_size)
    # Spaces are kept twice, with their images; the second one is that in which copies are searched for.
    matrix.check_room(2 * (least + least // 4 + 3 * block_size), memory_gib, "ask for fewer eigenpairs")
    affordable = int(memory_gib / matrix.gib(2) / 1.25) - 3 * block_size
    return max(least, min(useful, affordable))


@dataclass
class _Search:
    """A search for eigenpairs: its operator, its options, and the state that its spaces share.

    Attributes:
        rank: Turns eigenvalues into numbers that are larger the further out they lie.
        products: Number of products made.
        scale: Largest absolute Ritz value in any space so far, the best that is known of the operator's norm.
        is_checked: Whether the operator was found to be symmetric.
    """

    matrix: Matrix
    rank: Callable[[Tensor], Tensor]
    tolerance: float
    capacity: int
    block_size: int
    max_products: int
    generator: torch.Generator
    products: int = 0
    scale: float = 0.0
    is_checked: bool = False

    @property
    def left(self) -> int:
        """Number of products that may still be made."""
        return max(self.max_products - self.products, 0)

    @property
    def rounding(self) -> float:
        """Norm of the residuals that cannot be told from rounding."""
        return 10 * self.matrix.rounding * self.scale

    def random_block(self, space: SearchSpace, count: int) -> Float[Tensor, "b n"]:
        """Random orthonormal vectors orthogonal to a space, no more than it and the budget have room for."""
        count = min(count, self.left, space.rest)
        return space.orthonormalised(self.matrix.random_rows(count, self.generator))

    def extend(self, space: SearchSpace, block: Float[Tensor, "b n"], k: int) -> None:
        """Add a block to a space. If it is full, keep the k first Ritz vectors and some more, and drop the rest."""
        if space.size + len(block) > space.capacity:
            # Neighbours of the k first are kept too: what is known of them keeps the search fast.
            space.compress(k + (space.capacity - k) // 3)
        first = space.size
        self.products += len(block)
        difference = space.append(block, self.matrix.multiply(block))
        if not self.is_checked and (first or space.rest == 0):
            scale = float(torch.linalg.matrix_norm(space.gram[:, : first or space.size]))
            # The Gram matrix is made symmetric, which leaves nothing of a skew one.
            self.matrix.check_symmetric(difference, max(scale, difference))
            self.is_checked = True
        self.scale = max(self.scale, float(space.values.abs().max()))


def _refine(
    search: _Search,
    space: SearchSpace,
    block: Float[Tensor, "b n"],
    k: int,
    bar: tqdm,
    *,
    limit: int | float = math.inf,
    most_further: int = _MOST_FURTHER,
) -> tuple[Float64[Tensor, " k"], Bool[Tensor, " k"]]:
    """Extend a space by a block, and then by residuals, until its k outermost Ritz pairs have converged.

    The last of them is then refined further, in `most_further` steps at most. It ends earlier if the search has made
    `limit` products in all, or as many as it may.

    Returns:
        The norms of these pairs' residuals, and whether each is small enough; of fewer pairs if the space has fewer.
    """
    further = most_further
    while True:
        search.extend(space, block, k)
        count, complete = min(k, space.size), space.rest == 0
        residuals = space.residuals(count)
        norms = torch.linalg.vector_norm(residuals, dim=1).double().cpu()
        # All that is left in a complete space is rounding.
        goals = search.tolerance * space.values[:count].abs()
        converged = complete | (norms <= goals.clamp(min=search.rounding))
        bar.set_postfix(products=search.products, refresh=False)
        bar.update(int(converged.sum()) - bar.n)
        if search.products >= min(limit, search.max_products) or complete:
            return norms, converged
        if count == k and converged.all():
            if further == 0 or norms[-1] <= max(_LAST * float(goals[-1]), search.rounding):
                return norms, converged
            further -= 1
            lacking = torch.tensor([k - 1])
        else:
            # Residuals of pairs that are exact enough would only make others, which nobody asked for, more exact.
            further = most_further
            lacking = (~converged).nonzero().flatten()[: min(search.block_size, search.left)]
        block = space.orthonormalised(residuals[lacking.to(residuals.device)])
        if len(block) == 0:
            block = search.random_block(space, search.block_size)


def _all_copies(search: _Search, k: int, bar: tqdm) -> tuple[SearchSpace, Float64[Tensor, " k"], Bool[Tensor, " k"]]:
    """Search for k pairs, and then for copies of multiple eigenvalues that the first blocks could not see.

    Returns:
        The space that has them as its first Ritz pairs, the norms of their residuals, and whether each is small enough.
    """
    nothing = search.matrix.random_rows(0, search.generator)
    space = SearchSpace(search.capacity, excluded=nothing, rank=search.rank)
    norms, converged = _refine(search, space, search.random_block(space, search.block_size), k, bar)
    while search.left > 0 and space.rest > 0 and converged.all() and _copies_hide_before(search, space, norms):
        # Nothing is hidden from a space that is complete, and completing it is then the shorter way.
        near = space.rest <= min(space.size, search.left, space.capacity - space.size)
        missed = search.random_block(space, space.rest) if near else _missed(search, space, len(norms))
        if len(missed) == 0:
            break
        norms, converged = _refine(search, space, space.orthonormalised(missed), k, bar)
    if search.left == 0 and space.rest > 0 and (first := _copies_hide_before(search, space, norms)):
        # The search for copies was cut short: another pair may stand in each of these places.
        converged[first:] = False
    return space, norms, converged


def _copies_hide_before(search: _Search, space: SearchSpace, norms: Float64[Tensor, " k"]) -> int:
    """The first pair that a multiple eigenvalue's copies outside the space may come before; 0 where none hide.

    A block of b vectors sees b copies, so others may hide where b Ritz values coincide that lie further out than the
    last one.
    """
    values, k, seen = space.values, len(norms), search.block_size
    order = values[:k].argsort().tolist()
    places = []
    for window in (order[start : start + seen] for start in range(k - seen + 1)):
        others = torch.ones(len(values), dtype=torch.bool)
        others[window] = False
        gap = float((values[others].unsqueeze(1) - values[window]).abs().min()) if others.any() else math.inf
        # Ritz values are exact to the square of their residuals over the gap (Parlett 1998, section 11.7).
        error = 4 * float((norms[window] ** 2).sum()) / max(gap, 1e-300) + search.rounding
        if k - 1 not in window and float(values[window].max() - values[window].min()) <= error:
            places.append(max(window) + 1)
    return min(places, default=0)


def _missed(search: _Search, space: SearchSpace, k: int) -> Float[Tensor, "missed n"]:
    """Ritz vectors orthogonal to the first k of a space, as rows, of values further out than the last of these."""
    capacity = search.capacity // 4 + 3 * search.block_size
    outside = SearchSpace(capacity, excluded=space.vectors(k), rank=search.rank)
    block = search.random_block(outside, search.block_size)
    # Where nothing is missing this is for nothing; it should not cost more than the search itself.
    _refine(search, outside, block, 1, tqdm(disable=True), limit=2 * search.products, most_further=0)
    last = space.values[k - 1]
    margin = 10 * search.tolerance**2 * last.abs() + search.rounding
    return outside.vectors(int((search.rank(outside.values) > search.rank(last) + margin).sum()))


def _warn_unless_converged(pairs: Eigenpairs, tolerance: float, max_products: int) -> None:
    lacking = ~pairs.converged
    count, products = len(pairs.values), counted(pairs.products, "product")
    if lacking.any() and bool((pairs.residuals[lacking] <= tolerance).all()):
        warnings.warn(
            f"The last {int(lacking.sum())} of {count} eigenpairs may not be the outermost: {products} were not enough "
            f"to search for all copies of a multiple eigenvalue before them. Raise max_products={max_products}.",
            ConvergenceWarning,
            stacklevel=3,
        )
    elif lacking.any():
        warnings.warn(
            f"{int(lacking.sum())} of {count} eigenpairs have not reached the relative residual {tolerance:g} after "
            f"{products}; the worst stands at {float(pairs.residuals.max()):.2g}. Raise max_products={max_products}, "
            "or the tolerance if products are too inexact for it.",
            ConvergenceWarning,
            stacklevel=3,
        )
