"""Barriers between networks: predicted from curvature at anchors, and measured in between."""

from lmc_curvature.barrier.expansions import EXPANSIONS, Expansion
from lmc_curvature.barrier.kinds import CurveKind, classify_curve
from lmc_curvature.barrier.many import (
    BarriersMeasurement,
    BarriersPrediction,
    Subset,
    measure_barriers,
    predict_barriers,
)
from lmc_curvature.barrier.measure import measure_barrier
from lmc_curvature.barrier.measurement import BarrierMeasurement
from lmc_curvature.barrier.predict import predict_barrier, predict_on_segment
from lmc_curvature.barrier.prediction import BarrierPrediction

__all__ = [
    "EXPANSIONS",
    "BarrierMeasurement",
    "BarrierPrediction",
    "BarriersMeasurement",
    "BarriersPrediction",
    "CurveKind",
    "Expansion",
    "Subset",
    "classify_curve",
    "measure_barrier",
    "measure_barriers",
    "predict_barrier",
    "predict_barriers",
    "predict_on_segment",
]
