"""Extreme eigenpairs of a symmetric operator, to a residual that is asked for."""

import math
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor
from tqdm.auto import tqdm

from lmc_curvature.curvature.spectra.lanczos import check_budget, vectors_gib
from lmc_curvature.curvature.spectra.ritz import RitzPairs, SearchSpace
from lmc_curvature.curvature.spectra.symmetric import (
    Operator,
    SymmetricOperator,
    as_operator,
    check_count_option,
    check_symmetric,
    dense_matrix,
    multiply,
    random_rows,
    rounding_of,
    storage_dtype,
)
from lmc_curvature.errors import ConvergenceWarning, OptionError, check_choice

Which = Literal["largest", "smallest", "magnitude"]
WHICH: tuple[Which, ...] = ("largest", "smallest", "magnitude")

# Vectors of one call share the graph of a batch's gradient: b of them cost 3 + 4.5 b forward passes, so one at a time
# costs 7.5 a product, two 6, and four 5.25. But a block of b takes more products, for its polynomials are of 1/b the
# degree: 29, 34, 38 and 42 products for b = 1, 2, 3, 4 on the Hessians of four trained networks (ten eigenpairs, 1e-3).
# Two win, and unlike one they see the second copy of an eigenvalue, so that a search for more is rarely needed.
_BLOCK_SIZE = 2


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Eigenvalues of a symmetric operator at one end of its spectrum, with their vectors and how exact they are.

    All tensors are on the operator's device.

    Attributes:
        values: Eigenvalues λ, (k,), the outermost first.
        vectors: Orthonormal eigenvectors v as columns, (n, k), in the operator's precision.
        residuals: ‖A v − λ v‖ / |λ|, (k,), from products that were made. An eigenvalue of A lies within |λ| times
            this of λ, and in practice much nearer: the error goes with the residual's square.
        converged: Whether the residual is at most the tolerance, or cannot be told from the rounding of the products
            (as for eigenvalues that are zero), (k,).
        products: Products with the operator that were made.
    """

    values: Float64[Tensor, " k"]
    vectors: Float[Tensor, "n k"]
    residuals: Float64[Tensor, " k"]
    converged: Bool[Tensor, " k"]
    products: int


def top_eigenpairs(
    operator: Operator,
    k: int,
    *,
    which: Which = "largest",
    tolerance: float = 1e-3,
    max_products: int | None = None,
    block_size: int = _BLOCK_SIZE,
    seed: int = 0,
    max_gib: float = 4.0,
    progress: bool = False,
) -> Eigenpairs:
    """Find the k outermost eigenvalues of a symmetric operator, and their eigenvectors.

    Block Lanczos in the form of Davidson's method (Davidson 1975; Saad 2011, section 8.4): the search space grows by
    the residuals of Ritz pairs that are not yet exact enough, at most `block_size` at a time, and restarts from the
    best Ritz vectors when it is full. The images of its basis are kept, so residuals need no further products.

    Multiple eigenvalues are found with all their copies. A block of b random vectors can see b copies, so where b
    Ritz values coincide, the space orthogonal to them is searched for another. An operator with so few rows that its
    dense matrix is cheaper is diagonalised instead.

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
        seed: Of the random start.
        max_gib: Largest size of the search space and its images, 4 or 8 bytes a number as in `lanczos`. A smaller
            space restarts more often.
        progress: Show a progress bar over eigenpairs.

    Warns:
        ConvergenceWarning: Some pairs have not converged; `Eigenpairs.converged` says which.

    Raises:
        OperatorError: The operator is not square, or is found not to be symmetric at the second step.
        OptionError: `k` is not a whole number from 1 to the dimension, or another option has a bad value.
        MemoryBudgetError: The smallest search space would need more than `max_gib`.
        NonFiniteError: A product is not finite.
    """
    operator = as_operator(operator)
    size = operator.shape[0]
    check_choice("which", which, WHICH)
    check_count_option("k", k, size)
    check_count_option("block_size", block_size)
    max_products = 300 + 60 * k if max_products is None else max_products
    check_count_option("max_products", max_products)
    if max_products < k:
        raise OptionError(f"max_products={max_products}: {k} eigenpairs take at least as many products.")
    if not 0 < tolerance < 1:
        raise OptionError(f"tolerance={tolerance!r}: expected a relative residual between 0 and 1.")
    criterion = _Criterion(which, tolerance, 10 * rounding_of(operator))
    if size <= max(4 * k, 32) and size <= max_products:
        return _dense_eigenpairs(operator, k, criterion)
    block_size = min(block_size, max_products)
    capacity = _capacity(operator, k, block_size, max_gib)
    search = _Search(
        operator, criterion, capacity=capacity, block_size=block_size, max_products=max_products, seed=seed
    )
    with tqdm(total=k, desc="eigenpairs", disable=not progress) as bar:
        found = _as_eigenpairs(search, *_all_copies(search, k, bar), k)
    _warn_unless_converged(found, tolerance, max_products)
    return found


@dataclass(frozen=True)
class _Criterion:
    """Which eigenpairs are wanted, to which relative residual, and which share of the norm is rounding."""

    which: Which
    tolerance: float
    rounding: float

    def rank(self, values: Float64[Tensor, "*m"]) -> Float64[Tensor, "*m"]:
        """A number for each value that is larger the more it is wanted."""
        return {"largest": values, "smallest": -values, "magnitude": values.abs()}[self.which]


def _dense_eigenpairs(operator: SymmetricOperator, k: int, criterion: _Criterion) -> Eigenpairs:
    matrix = dense_matrix(operator)
    values, vectors = torch.linalg.eigh(matrix)
    chosen = criterion.rank(values).argsort(descending=True)[:k]
    stored = vectors[:, chosen].to(storage_dtype(operator))
    rest = torch.linalg.vector_norm(matrix @ stored.double() - values[chosen] * stored.double(), dim=0)
    return Eigenpairs(
        values=values[chosen],
        vectors=stored,
        residuals=rest / values[chosen].abs().clamp(min=1e-300),
        converged=torch.ones(k, dtype=torch.bool, device=values.device),
        products=operator.shape[0],
    )


def _capacity(operator: SymmetricOperator, k: int, block_size: int, max_gib: float) -> int:
    """Vectors that the search space may hold."""
    # A space much larger than this is no longer small beside the products; few searches need as much.
    wanted = min(operator.shape[0], 60 + 10 * k)
    least = min(operator.shape[0], k + 3 * block_size)
    # Spaces are kept twice, with their images.
    needed = 2 * (least + _outside_capacity(least, block_size))
    check_budget(operator, needed, max_gib, "Ask for fewer eigenpairs, take a layer's block, or raise max_gib.")
    affordable = int(max_gib / vectors_gib(operator, 2) / 1.25) - 3 * block_size
    return max(least, min(wanted, affordable))


def _outside_capacity(capacity: int, block_size: int) -> int:
    """Vectors that the space may hold in which copies are searched for."""
    return capacity // 4 + 3 * block_size


class _Search:
    """A search for eigenpairs: what is wanted, and how many products it has taken."""

    def __init__(
        self,
        operator: SymmetricOperator,
        criterion: _Criterion,
        *,
        capacity: int,
        block_size: int,
        max_products: int,
        seed: int,
    ):
        self.operator, self.criterion = operator, criterion
        self.capacity, self.block_size, self.max_products = capacity, block_size, max_products
        self.generator = torch.Generator().manual_seed(seed)
        self.products = 0
        self.scale = 0.0
        self._checked = False

    @property
    def left(self) -> int:
        """Products that may still be made."""
        return max(self.max_products - self.products, 0)

    @property
    def rounding(self) -> float:
        """The size of residuals that cannot be told from rounding."""
        return self.criterion.rounding * self.scale

    def new_space(self) -> SearchSpace:
        """An empty space."""
        dtype, device = storage_dtype(self.operator), self.operator.device
        return SearchSpace(self.capacity, torch.zeros(0, self.operator.shape[0], dtype=dtype, device=device))

    def random_block(self, space: SearchSpace, count: int) -> Float[Tensor, "b n"]:
        """Random vectors that are orthonormal to a space, no more than there is room and budget for."""
        count = min(count, self.left, space.dimension - space.size)
        return space.orthonormalised(random_rows(self.operator, count, self.generator))

    def extend(self, space: SearchSpace, block: Float[Tensor, "b n"], k: int) -> RitzPairs:
        """Take a block into the space, which keeps room for k wanted pairs; its Ritz pairs, the most wanted first."""
        if space.size + len(block) > space.capacity:
            # Beside the wanted Ritz vectors, their neighbours: what is known of these keeps the search fast.
            space.compress(self._ordered(space), k + (space.capacity - k) // 3)
        first = space.size
        self.products += len(block)
        difference = space.append(block, multiply(self.operator, block))
        if first and not self._checked:
            check_symmetric(self.operator, difference, float(torch.linalg.matrix_norm(space.gram[:, :first])))
            self._checked = True
        pairs = self._ordered(space)
        # The largest Ritz value in any space so far is the best that is known of the operator's norm.
        self.scale = max(self.scale, float(pairs.values.abs().max()))
        return pairs

    def _ordered(self, space: SearchSpace) -> RitzPairs:
        pairs = space.ritz_pairs()
        return pairs.ordered(self.criterion.rank(pairs.values).argsort(descending=True))


@dataclass(frozen=True, eq=False)
class _Found:
    """The wanted Ritz pairs of a space, k of them or as many as there are.

    Attributes:
        pairs: All pairs, the wanted ones first.
        norms: Norms of the wanted pairs' residuals, (k,), on the CPU.
        converged: Whether each of them is small enough, (k,), on the CPU.
    """

    pairs: RitzPairs
    norms: Float64[Tensor, " k"]
    converged: Bool[Tensor, " k"]


def _refine(
    search: _Search, space: SearchSpace, block: Float[Tensor, "b n"], k: int, bar: tqdm, limit: int | None = None
) -> _Found:
    """Extend a space by a block, and then by residuals, until its k most wanted Ritz pairs have converged.

    It ends before if the search has made `limit` products in all, by default as many as it may.
    """
    limit = search.max_products if limit is None else min(limit, search.max_products)
    while True:
        pairs = search.extend(space, block, k)
        wanted = min(k, space.size)
        residuals = space.residuals(pairs, wanted)
        norms = torch.linalg.vector_norm(residuals, dim=1).double().cpu()
        converged = norms <= (search.criterion.tolerance * pairs.values[:wanted].abs()).clamp(min=search.rounding)
        bar.set_postfix(products=search.products, refresh=False)
        bar.update(int(converged.sum()) - bar.n)
        ended = search.products >= limit or space.size == space.dimension
        if ended or (wanted == k and converged.all()):
            return _Found(pairs, norms, converged)
        # Residuals of pairs that are exact enough would only make others, which nobody asked for, more exact.
        lacking = (~converged).nonzero().flatten()[: min(search.block_size, search.left)]
        block = space.orthonormalised(residuals[lacking.to(residuals.device)])
        if len(block) == 0:
            block = search.random_block(space, search.block_size)


def _all_copies(search: _Search, k: int, bar: tqdm) -> tuple[SearchSpace, _Found]:
    """Search for k pairs, and then for copies of multiple eigenvalues that the first blocks could not see."""
    space = search.new_space()
    found = _refine(search, space, search.random_block(space, search.block_size), k, bar)
    while search.left > 0 and space.size < space.dimension and _may_hide_copies(search, found, k):
        rest = space.dimension - space.size
        # Nothing is hidden from a space that is complete, and completing it is then the shorter way.
        near = rest <= min(space.size, search.left) and space.dimension <= space.capacity
        missed = search.random_block(space, rest) if near else _missed(search, space, found, k)
        if len(missed) == 0:
            break
        found = _refine(search, space, space.orthonormalised(missed), k, bar)
    return space, found


def _may_hide_copies(search: _Search, found: _Found, k: int) -> bool:
    """Whether as many Ritz values coincide as a block sees copies, and are more wanted than the last one found."""
    if not found.converged.all():
        return False
    values, norms, seen = found.pairs.values, found.norms, search.block_size
    order = values[:k].argsort().tolist()
    for window in (order[start : start + seen] for start in range(k - seen + 1)):
        others = torch.ones(len(values), dtype=torch.bool)
        others[window] = False
        gap = float((values[others].unsqueeze(1) - values[window]).abs().min()) if others.any() else math.inf
        # Ritz values are exact to the square of their residuals over the gap (Parlett 1998, section 11.7).
        error = 4 * float((norms[window] ** 2).sum()) / max(gap, 1e-300) + search.rounding
        if k - 1 not in window and float(values[window].max() - values[window].min()) <= error:
            return True
    return False


def _missed(search: _Search, space: SearchSpace, found: _Found, k: int) -> Float[Tensor, "missed n"]:
    """Vectors orthogonal to the pairs found, of which the operator makes more than of the last of these."""
    outside = SearchSpace(_outside_capacity(search.capacity, search.block_size), space.vectors(found.pairs, k))
    with tqdm(disable=True) as silent:
        # Where nothing is missing this is for nothing; it should not cost more than the search itself.
        pairs = _refine(
            search, outside, search.random_block(outside, search.block_size), 1, silent, limit=2 * search.products
        ).pairs
    last = found.pairs.values[k - 1]
    margin = 10 * search.criterion.tolerance**2 * last.abs() + search.rounding
    better = search.criterion.rank(pairs.values) > search.criterion.rank(last) + margin
    return outside.vectors(pairs, int(better.sum()))


def _as_eigenpairs(search: _Search, space: SearchSpace, found: _Found, k: int) -> Eigenpairs:
    values, device = found.pairs.values[:k], search.operator.device
    return Eigenpairs(
        values=values.to(device),
        vectors=space.vectors(found.pairs, k).T,
        residuals=(found.norms / values.abs().clamp(min=1e-300)).to(device),
        converged=found.converged.to(device),
        products=search.products,
    )


def _warn_unless_converged(found: Eigenpairs, tolerance: float, max_products: int) -> None:
    lacking = int((~found.converged).sum())
    if lacking:
        warnings.warn(
            f"{lacking} of {len(found.values)} eigenpairs have not reached the relative residual {tolerance:g} after "
            f"{found.products} products; the worst stands at {float(found.residuals.max()):.2g}. Raise "
            f"max_products={max_products}, or the tolerance if products are too inexact for it.",
            ConvergenceWarning,
            stacklevel=3,
        )
