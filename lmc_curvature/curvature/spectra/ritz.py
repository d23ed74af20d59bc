"""A growing subspace that a symmetric matrix is projected onto, and the eigenpairs of the projection."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


class SearchSpace:
    """An orthonormal basis V that grows, and its images A V, so that residuals in the space need no more products.

    Args:
        capacity: Vectors to make room for; the space takes twice that memory.
        excluded: Vectors that the space stays orthogonal to, as rows; (0, n) if there are none.
        rank: Turns eigenvalues into numbers that are larger the sooner their pairs are to come.

    Attributes:
        size: Number of vectors in the basis.
        gram: VᵀAV, (size, size), float64 on the CPU.
        values: Its eigenvalues, the Ritz values, by decreasing rank; (size,).
    """

    def __init__(self, capacity: int, excluded: Float[Tensor, "excluded n"], rank: Callable[[Tensor], Tensor]):
        self.size = 0
        self.gram = self._coefficients = torch.zeros(0, 0, dtype=torch.float64)
        self.values = torch.zeros(0, dtype=torch.float64)
        self._rank = rank
        self._excluded = excluded
        self._basis = excluded.new_empty(capacity, excluded.shape[1])
        self._images = torch.empty_like(self._basis)

    @property
    def capacity(self) -> int:
        """Number of vectors that there is room for."""
        return len(self._basis)

    @property
    def rest(self) -> int:
        """Dimension of what is orthogonal to the space and to the excluded vectors; 0 if the space is complete."""
        return self._basis.shape[1] - len(self._excluded) - self.size

    def append(self, block: Float[Tensor, "b n"], images: Float[Tensor, "b n"]) -> float:
        """Add orthonormal vectors and their images, and drop the images' part in the span of the excluded vectors.

        Returns:
            The norm of ⟨u, A v⟩ − ⟨v, A u⟩ over the earlier vectors u (the new ones, if there are none) and the new v.
        """
        old, self.size = self.size, self.size + len(block)
        images = images - (images @ self._excluded.T) @ self._excluded
        self._basis[old : self.size], self._images[old : self.size] = block, images
        columns = (self._basis[: self.size] @ images.T).double().cpu()
        gram = torch.zeros(self.size, self.size, dtype=torch.float64)
        gram[:old, :old], gram[:, old:], gram[old:, :old] = self.gram, columns, columns[:old].T
        self.gram = (gram + gram.T) / 2
        values, coefficients = torch.linalg.eigh(self.gram)
        order = self._rank(values).argsort(descending=True)
        self.values, self._coefficients = values[order], coefficients[:, order]
        others = old or self.size
        mirrored = (self._images[:others] @ block.T).double().cpu()
        return float(torch.linalg.matrix_norm(columns[:others] - mirrored))

    def vectors(self, count: int) -> Float[Tensor, "count n"]:
        """The first Ritz vectors, as rows."""
        return self._combined(self._basis, count)

    def residuals(self, count: int) -> Float[Tensor, "count n"]:
        """A y − θ y of the first Ritz pairs (θ, y), as rows."""
        values = self.values[:count].to(self._basis).unsqueeze(1)
        return self._combined(self._images, count) - values * self._combined(self._basis, count)

    def _combined(self, rows: Float[Tensor, "capacity n"], count: int) -> Float[Tensor, "count n"]:
        return self._coefficients[:, :count].T.to(rows) @ rows[: self.size]

    def compress(self, count: int) -> None:
        """Keep the span of the first Ritz vectors only."""
        for rows in (self._basis, self._images):
            rows[:count] = self._combined(rows, count)
        self.size, self.values = count, self.values[:count]
        self.gram, self._coefficients = torch.diag(self.values), torch.eye(count, dtype=torch.float64)

    def orthonormalised(self, rows: Float[Tensor, "b n"]) -> Float[Tensor, "kept n"]:
        """An orthonormal basis, as rows, of what some vectors add to the space; fewer rows if they add less."""
        rows = rows[: self.rest]
        rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
        tiny = 100 * torch.finfo(rows.dtype).eps
        # The second time removes what rounding left in the first.
        for _ in range(2):
            for others in (self._excluded, self._basis[: self.size]):
                rows = rows - (rows @ others.T) @ others
            columns, triangle = torch.linalg.qr(rows.T)
            rows = columns.T[triangle.diagonal().abs() > tiny]
        return rows.contiguous()
