"""The projection of one batch by Hessian-vector products: any network, one product a direction."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float

from lmc_curvature.curvature.problem import BatchValues
from lmc_curvature.curvature.products.gradient import BatchGradient, inner
from lmc_curvature.objective.batches import Batch
from lmc_curvature.objective.network import State
from lmc_curvature.objective.risk import Objective


class Products:
    """Projects batches at given states onto given directions.

    Args:
        objective: The loss.
        states: Complete states, on the objective's device.
        directions: Placed directions.
    """

    def __init__(self, objective: Objective, states: Sequence[State], directions: Sequence[State]):
        self.objective = objective
        self.states = states
        self.directions = directions
        moved = {name for direction in directions for name in direction}
        self._entries = [name for name in objective.state() if name in moved]

    def project(self, number: int, batch: Batch) -> BatchValues:
        """Loss, slopes and curvature of one batch at one of the states.

        Raises:
            UnsupportedModelError: An operation has no second derivative.
        """
        gradient = self._gradient(number, batch)
        slopes = torch.stack([gradient.slope(direction) for direction in self.directions])
        rows = []
        for direction in self.directions:
            product = gradient.product(direction)
            rows.append(torch.stack([inner(product, other) for other in self.directions]))
        # Copied to the host once a batch: each copy waits for the device.
        found = torch.cat([slopes.unsqueeze(0), torch.stack(rows)]).double().cpu().numpy()
        curvature = found[1:]
        return gradient.loss.item(), found[0], (curvature + curvature.T) / 2

    def combination(
        self, number: int, batch: Batch, coefficients: np.ndarray
    ) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
        """Uᵀ∇L and UᵀHUr of one batch, for coefficients r: all the slopes, and a single product.

        Raises:
            UnsupportedModelError: An operation has no second derivative.
        """
        gradient = self._gradient(number, batch)
        product = gradient.product(self._combined(coefficients))
        rows = [[gradient.slope(direction), inner(product, direction)] for direction in self.directions]
        slopes, curvature = torch.stack([torch.stack(row) for row in rows], dim=1).double().cpu().numpy()
        return slopes, curvature

    def _gradient(self, number: int, batch: Batch) -> BatchGradient:
        return BatchGradient(self.objective, self.states[number], batch, self._entries)

    def _combined(self, coefficients: np.ndarray) -> dict[str, torch.Tensor]:
        total: dict[str, torch.Tensor] = {}
        for coefficient, direction in zip(coefficients.tolist(), self.directions, strict=True):
            for name, tensor in direction.items():
                total[name] = total[name].add(tensor, alpha=coefficient) if name in total else tensor * coefficient
        return total
