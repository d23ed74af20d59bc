"""The mean loss of a network over a data set, as a function of the network's state."""

from lmc_curvature.objective.batches import Batch
from lmc_curvature.objective.losses import BatchLoss, LossFunction
from lmc_curvature.objective.network import State
from lmc_curvature.objective.normalization import BatchNormPolicy
from lmc_curvature.objective.risk import Objective

__all__ = ["Batch", "BatchLoss", "BatchNormPolicy", "LossFunction", "Objective", "State"]
