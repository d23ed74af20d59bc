"""UᵀHU, loss and slopes along a few directions: by the sweep, checked by products."""

from lmc_curvature.curvature.projection.project import project_hessian, project_hessian_at
from lmc_curvature.curvature.projection.projection import Projection

__all__ = ["Projection", "project_hessian", "project_hessian_at"]
