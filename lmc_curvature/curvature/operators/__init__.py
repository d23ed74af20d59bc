"""Curvature matrices over the data, as linear operators: the Hessian, the Gauss-Newton matrix, and blocks of them."""

from lmc_curvature.curvature.operators.ggn import GGNOperator
from lmc_curvature.curvature.operators.hessian import HessianOperator
from lmc_curvature.curvature.operators.operator import Curvature, CurvatureOperator

__all__ = ["Curvature", "CurvatureOperator", "GGNOperator", "HessianOperator"]
