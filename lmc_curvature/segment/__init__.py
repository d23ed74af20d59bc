"""The segment between two networks, the layers it is cut into, and the states on it; and the hull of several."""

from lmc_curvature.segment.frozen import Frozen
from lmc_curvature.segment.hull import Hull, HullPoints
from lmc_curvature.segment.partition import LayerPartition, PartitionSpec, layer_indices
from lmc_curvature.segment.points import SegmentPoints, StatePoints, StatesOnDemand, check_points
from lmc_curvature.segment.segment import Segment

__all__ = [
    "Frozen",
    "Hull",
    "HullPoints",
    "LayerPartition",
    "PartitionSpec",
    "Segment",
    "SegmentPoints",
    "StatePoints",
    "StatesOnDemand",
    "check_points",
    "layer_indices",
]
