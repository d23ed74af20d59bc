"""A growing subspace that an operator is projected onto, and the eigenpairs of the projection."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RitzPairs:
    """All eigenpairs of VᵀAV, in an order that the caller chose.

    Attributes:
        values: Ritz values, (m,), float64 on the CPU.
        coefficients: Their eigenvectors as columns, (m, m), float64 on the CPU: V times a column is a Ritz vector.
    """

    values: Float64[Tensor, " m"]
    coefficients: Float64[Tensor, "m m"]


class SearchSpace:
    """An orthonormal basis V that grows, and its images A V, so that residuals in the space need no more products.

    Args:
        capacity: Vectors to make room for; the space takes twice that memory.
        excluded: Vectors that the space stays orthogonal to, as rows; (0, n) if there are none.

    Attributes:
        size: Number of vectors in the basis.
        gram: VᵀAV, (size, size), float64 on the CPU.
    """

    def __init__(self, capacity: int, excluded: Float[Tensor, "excluded n"]):
        self.size = 0
        self.gram = torch.zeros(0, 0, dtype=torch.float64)
        self._excluded = excluded
        self._basis = excluded.new_empty(capacity, excluded.shape[1])
        self._images = torch.empty_like(self._basis)

    @property
    def capacity(self) -> int:
        """Number of vectors that there is room for."""
        return len(self._basis)

    @property
    def dimension(self) -> int:
        """Dimension of the orthogonal complement of the excluded vectors: the space cannot grow beyond it."""
        return self._basis.shape[1] - len(self._excluded)

    @property
    def is_complete(self) -> bool:
        """Whether the space cannot grow any further."""
        return self.size == self.dimension

    def append(self, block: Float[Tensor, "b n"], images: Float[Tensor, "b n"]) -> float:
        """Add orthonormal vectors and their images, and drop the images' part in the span of the excluded vectors.

        Returns:
            The norm of ⟨u, A v⟩ − ⟨v, A u⟩ over the earlier vectors u (the new ones, if there are none) and the new v.
        """
        old, self.size = self.size, self.size + len(block)
        images = images - (images @ self._excluded.T) @ self._excluded
        self._basis[old : self.size], self._images[old : self.size] = block, images
        columns = (self._basis[: self.size] @ images.T).double().cpu()
        others = old or self.size
        mirrored = (self._images[:others] @ block.T).double().cpu()
        gram = torch.zeros(self.size, self.size, dtype=torch.float64)
        gram[:old, :old], gram[:, old:], gram[old:, :old] = self.gram, columns, columns[:old].T
        self.gram = (gram + gram.T) / 2
        return float(torch.linalg.matrix_norm(columns[:others] - mirrored))

    def ritz_pairs(self, rank: Callable[[Tensor], Tensor]) -> RitzPairs:
        """All Ritz pairs, by decreasing rank of their values."""
        values, coefficients = torch.linalg.eigh(self.gram)
        order = rank(values).argsort(descending=True)
        return RitzPairs(values[order], coefficients[:, order])

    def vectors(self, pairs: RitzPairs, count: int) -> Float[Tensor, "count n"]:
        """The first Ritz vectors, as rows."""
        return self._combined(self._basis, pairs, count)

    def residuals(self, pairs: RitzPairs, count: int) -> Float[Tensor, "count n"]:
        """A y − θ y of the first Ritz pairs, as rows."""
        values = pairs.values[:count].to(self._basis).unsqueeze(1)
        return self._combined(self._images, pairs, count) - values * self._combined(self._basis, pairs, count)

    def _combined(self, rows: Float[Tensor, "capacity n"], pairs: RitzPairs, count: int) -> Float[Tensor, "count n"]:
        return pairs.coefficients[:, :count].T.to(rows) @ rows[: self.size]

    def compress(self, pairs: RitzPairs, count: int) -> None:
        """Keep the span of the first Ritz vectors only."""
        for rows in (self._basis, self._images):
            rows[:count] = self._combined(rows, pairs, count)
        self.size = count
        self.gram = torch.diag(pairs.values[:count])

    def orthonormalised(self, rows: Float[Tensor, "b n"]) -> Float[Tensor, "kept n"]:
        """An orthonormal basis, as rows, of what some vectors add to the space; fewer rows if they add less."""
        rows = rows[: self.dimension - self.size]
        rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
        tiny = 100 * torch.finfo(rows.dtype).eps
        # The second time removes what rounding left in the first.
        for _ in range(2):
            for others in (self._excluded, self._basis[: self.size]):
                rows = rows - (rows @ others.T) @ others
            columns, triangle = torch.linalg.qr(rows.T)
            rows = columns.T[triangle.diagonal().abs() > tiny]
        return rows.contiguous()
