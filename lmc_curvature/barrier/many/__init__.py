"""Barriers among several networks: of all pairs, of their mean, and of the means of subsets."""

from lmc_curvature.barrier.many.measure import measure_barriers
from lmc_curvature.barrier.many.measurement import BarriersMeasurement
from lmc_curvature.barrier.many.predict import predict_barriers
from lmc_curvature.barrier.many.prediction import BarriersPrediction
from lmc_curvature.barrier.many.subsets import Subset

__all__ = ["BarriersMeasurement", "BarriersPrediction", "Subset", "measure_barriers", "predict_barriers"]
