"""The projection of one batch by Hessian-vector products: any network, one product a direction."""

import numpy as np
import torch
from jaxtyping import Float

from lmc_curvature.curvature.problem import BatchValues, Point, Problem, check_values
from lmc_curvature.curvature.products.gradient import BatchGradient, inner
from lmc_curvature.objective.batches import Batch


def project_by_products(problem: Problem, point: Point, batch: Batch) -> BatchValues:
    """Loss, slopes and curvature of one batch at one state.

    Raises:
        NonFiniteError: They are not finite.
        UnsupportedModelError: An operation has no second derivative.
    """
    gradient = _gradient(problem, point, batch)
    slopes = torch.stack([gradient.slope(direction) for direction in problem.directions])
    rows = []
    for direction in problem.directions:
        product = gradient.product(direction)
        rows.append(torch.stack([inner(product, other) for other in problem.directions]))
    # Copied to the host once a batch: each copy waits for the device.
    found = torch.cat([slopes.unsqueeze(0), torch.stack(rows)]).double().cpu().numpy()
    curvature = found[1:]
    values = gradient.loss.item(), found[0], (curvature + curvature.T) / 2
    check_values(values, batch, point)
    return values


def product_of_combination(
    problem: Problem, point: Point, batch: Batch, coefficients: Float[np.ndarray, " k"]
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Uᵀ∇L and UᵀHUr of one batch, for coefficients r: all the slopes, and a single product.

    Raises:
        UnsupportedModelError: An operation has no second derivative.
    """
    combined: dict[str, torch.Tensor] = {}
    for coefficient, direction in zip(coefficients.tolist(), problem.directions, strict=True):
        for name, tensor in direction.items():
            total = combined.get(name)
            combined[name] = tensor * coefficient if total is None else total.add(tensor, alpha=coefficient)
    gradient = _gradient(problem, point, batch)
    product = gradient.product(combined)
    rows = [[gradient.slope(direction), inner(product, direction)] for direction in problem.directions]
    slopes, curvature = torch.stack([torch.stack(row) for row in rows], dim=1).double().cpu().numpy()
    return slopes, curvature


def _gradient(problem: Problem, point: Point, batch: Batch) -> BatchGradient:
    moved = problem.moved
    return BatchGradient(problem.objective, point.state, batch, [n for n in problem.objective.snapshot if n in moved])
