"""Can two neural networks be averaged? Loss barriers predicted from exact curvature, and measured."""

from lmc_curvature.barrier.measurement import BarrierMeasurement, measure_barrier
from lmc_curvature.barrier.prediction import BarrierPrediction, predict_barrier
from lmc_curvature.curvature.hessian import HessianOperator
from lmc_curvature.curvature.projection import Projection, project_hessian
from lmc_curvature.errors import LMCCurvatureError
from lmc_curvature.layers import LayerPartition
from lmc_curvature.losses import BatchLoss
from lmc_curvature.objective import Objective
from lmc_curvature.segment import Segment

__version__ = "0.1.0"

__all__ = [
    "BarrierMeasurement",
    "BarrierPrediction",
    "BatchLoss",
    "HessianOperator",
    "LMCCurvatureError",
    "LayerPartition",
    "Objective",
    "Projection",
    "Segment",
    "measure_barrier",
    "predict_barrier",
    "project_hessian",
]
