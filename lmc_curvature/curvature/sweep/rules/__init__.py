"""The rule of each operation: how it passes on tangents, and which curvature it contributes."""

from lmc_curvature.curvature.sweep.rules.rule import Contributions, OpCall, Rule, evaluate
from lmc_curvature.curvature.sweep.rules.stack import Stack, stacked, total, union
from lmc_curvature.curvature.sweep.rules.table import rule_of

__all__ = ["Contributions", "OpCall", "Rule", "Stack", "evaluate", "rule_of", "stacked", "total", "union"]
