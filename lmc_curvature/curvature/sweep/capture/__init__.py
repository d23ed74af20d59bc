"""The loss as a graph of ATen operations."""

from lmc_curvature.curvature.sweep.capture.graph import Stage, capture
from lmc_curvature.curvature.sweep.capture.nodes import dependents, line_of, value_of

__all__ = ["Stage", "capture", "dependents", "line_of", "value_of"]
