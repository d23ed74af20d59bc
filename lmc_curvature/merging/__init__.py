"""The choice of layers to average, predicted and then verified by measurement, and the averaged network."""

from lmc_curvature.merging.merge import merge, merge_predicted
from lmc_curvature.merging.point import BestPoint, best_point
from lmc_curvature.merging.select import Selection, select_layers
from lmc_curvature.merging.verify import Verification

__all__ = ["BestPoint", "Selection", "Verification", "best_point", "merge", "merge_predicted", "select_layers"]
