"""Can two neural networks be averaged? Loss barriers predicted from exact curvature, and measured."""

from lmc_curvature.barrier.measurement import BarrierMeasurement, measure_barrier
from lmc_curvature.barrier.prediction import BarrierPrediction, predict_barrier
from lmc_curvature.curvature.backends import hessian_operator
from lmc_curvature.curvature.blocks import cross_layer_hessian, layer_hessian
from lmc_curvature.curvature.operators import GGNOperator, HessianOperator
from lmc_curvature.curvature.projection import Projection, project_hessian
from lmc_curvature.curvature.spectra.density import SpectralDensity, spectral_density
from lmc_curvature.curvature.spectra.eigenpairs import Eigenpairs, top_eigenpairs
from lmc_curvature.curvature.spectra.lanczos import Lanczos, lanczos
from lmc_curvature.curvature.spectra.trace import Estimate, trace
from lmc_curvature.errors import LMCCurvatureError
from lmc_curvature.objective.losses import BatchLoss
from lmc_curvature.objective.risk import Objective
from lmc_curvature.segment.partition import LayerPartition
from lmc_curvature.segment.segment import Segment

__version__ = "0.1.0"

__all__ = [
    "BarrierMeasurement",
    "BarrierPrediction",
    "BatchLoss",
    "Eigenpairs",
    "Estimate",
    "GGNOperator",
    "HessianOperator",
    "LMCCurvatureError",
    "Lanczos",
    "LayerPartition",
    "Objective",
    "Projection",
    "Segment",
    "SpectralDensity",
    "cross_layer_hessian",
    "hessian_operator",
    "lanczos",
    "layer_hessian",
    "measure_barrier",
    "predict_barrier",
    "project_hessian",
    "spectral_density",
    "top_eigenpairs",
    "trace",
]
