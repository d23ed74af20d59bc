"""The choice of layers to average, and of the point with the least loss, predicted and then verified by measurement."""

from lmc_curvature.merging.point import BestPoint, best_point
from lmc_curvature.merging.select import Selection, select_layers
from lmc_curvature.merging.verify import Verification

__all__ = ["BestPoint", "Selection", "Verification", "best_point", "select_layers"]
