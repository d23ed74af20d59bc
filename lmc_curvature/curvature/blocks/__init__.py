"""Dense blocks of the Hessian: of one layer, and between two layers."""

from lmc_curvature.curvature.blocks.hessian import METHODS, BlockMethod, cross_layer_hessian, layer_hessian

__all__ = ["METHODS", "BlockMethod", "cross_layer_hessian", "layer_hessian"]
