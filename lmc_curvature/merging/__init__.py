"""The choice of layers to average, predicted and then verified by measurement, and the averaged network."""

from lmc_curvature.merging.merge import merge

__all__ = ["merge"]
