"""The curvature matrix of one batch, and its products with directions, many at once where that pays."""

from lmc_curvature.curvature.products.directions import StackedDirections, UnitVectors, places_of, unit_vectors
from lmc_curvature.curvature.products.gauss_newton import BatchGaussNewton
from lmc_curvature.curvature.products.gradient import BatchGradient, inner
from lmc_curvature.curvature.products.matrix import BatchMatrix, BatchProducts, BlockDiagonal
from lmc_curvature.curvature.products.replays import ReplayedMatrix, replayed_matrix
from lmc_curvature.curvature.products.vectorization import Vectorizer

__all__ = [
    "BatchGaussNewton",
    "BatchGradient",
    "BatchMatrix",
    "BatchProducts",
    "BlockDiagonal",
    "ReplayedMatrix",
    "StackedDirections",
    "UnitVectors",
    "Vectorizer",
    "inner",
    "places_of",
    "replayed_matrix",
    "unit_vectors",
]
