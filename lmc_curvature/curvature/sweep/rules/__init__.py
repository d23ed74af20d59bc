"""The rule of each operation: how it passes on tangents, and which curvature it contributes."""

from lmc_curvature.curvature.sweep.rules.convolution import CONVOLUTION
from lmc_curvature.curvature.sweep.rules.pointwise import Rectifier
from lmc_curvature.curvature.sweep.rules.rule import Contributions, OpCall, Rule, Tangents, evaluate
from lmc_curvature.curvature.sweep.rules.table import rule_of

__all__ = ["CONVOLUTION", "Contributions", "OpCall", "Rectifier", "Rule", "Tangents", "evaluate", "rule_of"]
