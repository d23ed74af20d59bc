"""Operators for SciPy: NumPy in and out."""

from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

Multiply = Callable[[Tensor], Tensor]
"""A function that multiplies a matrix by several vectors, its argument's columns."""


class ScipyOperator(LinearOperator):
    """An operator as SciPy's algorithms take one, float64.

    Args:
        shape: Numbers of rows and columns.
        multiply: The product with vectors.
        multiply_transposed: The product of the transpose with vectors.
    """

    def __init__(self, shape: tuple[int, int], multiply: Multiply, multiply_transposed: Multiply):
        super().__init__(np.dtype(np.float64), shape)
        self._multiply, self._multiply_transposed = multiply, multiply_transposed

    def _matmat(self, X: np.ndarray) -> np.ndarray:
        return self._multiply(torch.from_numpy(np.ascontiguousarray(X))).cpu().numpy()

    def _adjoint(self) -> "ScipyOperator":  # pyright: ignore[reportIncompatibleMethodOverride] - inferred too narrowly
        rows, columns = self.shape
        return ScipyOperator((columns, rows), self._multiply_transposed, self._multiply)
