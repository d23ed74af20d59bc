from .barrier.measurement import BarrierMeasurement as BarrierMeasurement
from .barrier.measurement import measure_barrier as measure_barrier
from .barrier.predict import predict_barrier as predict_barrier
from .barrier.prediction import BarrierPrediction as BarrierPrediction
from .curvature.backends import hessian_operator as hessian_operator
from .curvature.blocks import cross_layer_hessian as cross_layer_hessian
from .curvature.blocks import layer_hessian as layer_hessian
from .curvature.operators import GGNOperator as GGNOperator
from .curvature.operators import HessianOperator as HessianOperator
from .curvature.projection import Projection as Projection
from .curvature.projection import project_hessian as project_hessian
from .curvature.spectra.density import SpectralDensity as SpectralDensity
from .curvature.spectra.density import spectral_density as spectral_density
from .curvature.spectra.eigenpairs import Eigenpairs as Eigenpairs
from .curvature.spectra.eigenpairs import top_eigenpairs as top_eigenpairs
from .curvature.spectra.lanczos import Lanczos as Lanczos
from .curvature.spectra.lanczos import lanczos as lanczos
from .curvature.spectra.trace import Estimate as Estimate
from .curvature.spectra.trace import trace as trace
from .errors import LMCCurvatureError as LMCCurvatureError
from .merging.merge import merge as merge
from .objective.losses import BatchLoss as BatchLoss
from .objective.risk import Objective as Objective
from .segment.partition import LayerPartition as LayerPartition
from .segment.segment import Segment as Segment

__version__: str
