"""A subspace that an operator is projected onto, and the eigenpairs of the projection."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RitzPairs:
    """Eigenpairs of VᵀAV, all of them, in an order that the caller chose.

    Attributes:
        values: Ritz values, (m,), float64 on the CPU.
        coefficients: Their eigenvectors as columns, (m, m), float64 on the CPU: V times a column is a Ritz vector.
    """

    values: Float64[Tensor, " m"]
    coefficients: Float64[Tensor, "m m"]

    def ordered(self, order: Tensor) -> "RitzPairs":
        """The same pairs in another order."""
        return RitzPairs(self.values[order], self.coefficients[:, order])


class SearchSpace:
    """An orthonormal basis V that grows, and its images A V, so that residuals in the space need no more products.

    Args:
        capacity: Vectors to make room for; the space takes twice that.
        excluded: Vectors that the space stays orthogonal to, as rows; none: (0, n).

    Attributes:
        size: Vectors that it holds.
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
        """Vectors that there is room for."""
        return len(self._basis)

    @property
    def dimension(self) -> int:
        """The size at which the space is everything that is orthogonal to the excluded vectors."""
        return self._basis.shape[1] - len(self._excluded)

    def append(self, block: Float[Tensor, "b n"], images: Float[Tensor, "b n"]) -> float:
        """Take in orthonormal vectors and their images, of which what lies among the excluded vectors is dropped.

        Returns:
            The norm of ⟨u, A v⟩ − ⟨v, A u⟩, for u the vectors held before and v the new ones.
        """
        old, self.size = self.size, self.size + len(block)
        images = images - (images @ self._excluded.T) @ self._excluded
        self._basis[old : self.size], self._images[old : self.size] = block, images
        columns = (self._basis[: self.size] @ images.T).double().cpu()
        mirrored = (self._images[:old] @ block.T).double().cpu()
        gram = torch.zeros(self.size, self.size, dtype=torch.float64)
        gram[:old, :old], gram[:, old:], gram[old:, :old] = self.gram, columns, columns[:old].T
        self.gram = (gram + gram.T) / 2
        return float(torch.linalg.matrix_norm(columns[:old] - mirrored))

    def ritz_pairs(self) -> RitzPairs:
        """All Ritz pairs, by increasing value."""
        return RitzPairs(*torch.linalg.eigh(self.gram))

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
        """The part of some vectors that is new to the space, as orthonormal rows; fewer where nothing is left."""
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
