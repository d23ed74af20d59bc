"""The gradient of a mean loss, in one pass over its loader."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmc_curvature.objective.explanations import naming_what_has_no_derivative
from lmc_curvature.objective.losses import check_differentiable, finite_loss
from lmc_curvature.objective.network import State, as_leaves, check_gradient

if TYPE_CHECKING:
    from lmc_curvature.objective.risk import Objective


def mean_gradient(
    objective: "Objective", point: State, entries: Iterable[str], *, progress: bool | None = None
) -> dict[str, Tensor]:
    """The gradient of the mean loss at a state, in some of its entries; see `Objective.gradient`.

    Args:
        objective: The loss and its data.
        point: The state, on the objective's device.
        entries: Names of the entries.
        progress: Show a progress bar over batches; None shows it on a terminal and in notebooks.
    """
    leaves = as_leaves({name: point[name] for name in entries})
    total = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in leaves.items()}
    weight = 0.0
    with objective.one_pass(progress=progress, description="gradient") as batches:
        for batch in batches:
            objective.check_derivatives(point, batch, second=False)
            with objective.numerics.differentiating():
                loss = objective.batch_loss({**point, **leaves}, batch)
            finite_loss(loss, batch)
            check_differentiable(loss)
            with naming_what_has_no_derivative("differentiated"):
                found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
            for accumulated, gradient in zip(total.values(), found, strict=True):
                accumulated.add_(gradient, alpha=batch.weight)
            weight += batch.weight
        weight = objective.ranks.total(weight, *total.values())
    check_gradient(total)
    return {name: (tensor / weight).to(objective.dtype) for name, tensor in total.items()}
