"""The segment between two networks, the layers it is cut into, and the states on it."""

from lmc_curvature.segment.frozen import Frozen
from lmc_curvature.segment.partition import LayerPartition, PartitionSpec, layer_indices
from lmc_curvature.segment.points import SegmentPoints, check_points
from lmc_curvature.segment.segment import Segment

__all__ = ["Frozen", "LayerPartition", "PartitionSpec", "Segment", "SegmentPoints", "check_points", "layer_indices"]
