"""The Hessian as an operator whose products another library computes."""

from lmc_curvature.curvature.backends.operator import BACKENDS, Backend, hessian_operator

__all__ = ["BACKENDS", "Backend", "hessian_operator"]
