"""The projection of loss, gradient and Hessian onto a few directions: all that a barrier prediction needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int

from lmc_curvature.averages import standard_error, weighted_mean
from lmc_curvature.batches import Batch
from lmc_curvature.curvature.hessian import BatchGradient, inner
from lmc_curvature.errors import DirectionError, NonFiniteError, check_choice
from lmc_curvature.losses import finite_loss
from lmc_curvature.network import State, check_finite
from lmc_curvature.objective import Objective

METHODS = ("auto", "hvp")


@dataclass(frozen=True, eq=False)
class Projection:
    """Loss, slopes and curvature at a state θ along k directions u_i, with the values of every batch.

        loss = L(θ),   slopes[i] = ⟨∇L(θ), u_i⟩,   curvature[i, j] = u_iᵀ ∇²L(θ) u_j

    Attributes:
        batch_sizes: Examples in each batch, (batches,).
        batch_losses: Mean loss of each batch, (batches,).
        batch_slopes: Slopes of each batch's loss, (batches, k).
        batch_curvatures: Curvature of each batch's loss, (batches, k, k).
    """

    batch_sizes: Int[np.ndarray, " batches"]
    batch_losses: Float[np.ndarray, " batches"]
    batch_slopes: Float[np.ndarray, "batches k"]
    batch_curvatures: Float[np.ndarray, "batches k k"]

    @property
    def examples(self) -> int:
        """Number of examples visited."""
        return int(self.batch_sizes.sum())

    @cached_property
    def loss(self) -> float:
        """Mean loss over the examples."""
        return float(weighted_mean(self.batch_losses, self.batch_sizes))

    @cached_property
    def slopes(self) -> Float[np.ndarray, " k"]:
        """Directional derivatives of the mean loss."""
        return weighted_mean(self.batch_slopes, self.batch_sizes)

    @cached_property
    def curvature(self) -> Float[np.ndarray, "k k"]:
        """UᵀHU of the mean loss, symmetric."""
        return weighted_mean(self.batch_curvatures, self.batch_sizes)

    @property
    def loss_se(self) -> float:
        """Standard error of `loss`, from the spread between batches; NaN for a single batch."""
        return float(standard_error(self.batch_losses, self.batch_sizes))

    @property
    def slopes_se(self) -> Float[np.ndarray, " k"]:
        """Standard errors of `slopes`."""
        return standard_error(self.batch_slopes, self.batch_sizes)

    @property
    def curvature_se(self) -> Float[np.ndarray, "k k"]:
        """Standard errors of `curvature`."""
        return standard_error(self.batch_curvatures, self.batch_sizes)


def project_hessian(
    objective: Objective,
    state: State,
    directions: Mapping[str, State] | Sequence[State],
    *,
    method: str = "auto",
    progress: bool = False,
) -> Projection:
    """Project an objective onto directions at a state, in one pass over the loader.

    Args:
        objective: The loss and its data.
        state: Where to differentiate.
        directions: k sparse states, by name or in order; each holds only the entries it moves.
        method: `"hvp"`: one exact Hessian-vector product a direction and batch. `"auto"` chooses the fastest.
        progress: Show a progress bar over batches.

    Returns:
        The projection, its rows in the order of `directions`.

    Raises:
        DirectionError: A direction has an unknown entry, a wrong shape, a type that cannot move or values that are
            not finite, or there is no direction.
        NonFiniteError: The loss or the curvature of a batch is not finite.
        OptionError: `method` is not a choice.
    """
    return project_hessian_at(objective, [state], directions, method=method, progress=progress)[0]


def project_hessian_at(
    objective: Objective,
    states: Sequence[State],
    directions: Mapping[str, State] | Sequence[State],
    *,
    method: str = "auto",
    progress: bool = False,
) -> list[Projection]:
    """As `project_hessian`, at several states on the same batches: still one pass over the loader."""
    check_choice("method", method, METHODS)
    placed = _place_directions(objective, directions)
    states = [{**objective.state(), **objective.place(state)} for state in states]
    for state in states:
        check_finite(state, "the state")
    sizes: list[int] = []
    values: list[list[_BatchValues]] = [[] for _ in states]
    with objective.one_pass(progress=progress, description="curvature") as batches:
        for batch in batches:
            sizes.append(batch.size)
            for number, (state, collected) in enumerate(zip(states, values, strict=True)):
                where = f" at endpoint {number + 1} of {len(states)}" if len(states) > 1 else ""
                collected.append(_project_batch_by_products(objective, state, placed, batch, where))
    return [
        Projection(
            batch_sizes=np.array(sizes),
            batch_losses=np.array([loss for loss, _, _ in collected]),
            batch_slopes=np.stack([slopes for _, slopes, _ in collected]),
            batch_curvatures=np.stack([curvature for _, _, curvature in collected]),
        )
        for collected in values
    ]


_BatchValues = tuple[float, np.ndarray, np.ndarray]


def _project_batch_by_products(
    objective: Objective, state: State, directions: Sequence[State], batch: Batch, where: str
) -> _BatchValues:
    """One Hessian-vector product a direction, on the graph of one batch."""
    moved = {name for direction in directions for name in direction}
    gradient = BatchGradient(objective, state, batch, [name for name in state if name in moved])
    if batch.index == 0:
        gradient.check_twice_differentiable()
    loss = finite_loss(gradient.loss, batch, where)
    slopes = torch.stack([gradient.slope(direction) for direction in directions])
    rows = []
    for direction in directions:
        product = gradient.product(direction)
        rows.append(torch.stack([inner(product, other) for other in directions]))
    # Copied to the host once a batch: each copy waits for the device.
    found = torch.cat([slopes.unsqueeze(0), torch.stack(rows)]).double().cpu().numpy()
    if not np.isfinite(found).all():
        raise NonFiniteError(
            f"The slopes or the curvature are not finite at batch {batch.index} ({batch.size} examples){where}. "
            "Does the network compute something without a second derivative, such as a square root at zero?"
        )
    curvature = found[1:]
    return loss, found[0], (curvature + curvature.T) / 2


def _place_directions(
    objective: Objective, directions: Mapping[str, State] | Sequence[State]
) -> list[dict[str, torch.Tensor]]:
    named = dict(directions) if isinstance(directions, Mapping) else dict(enumerate(directions))
    if not named:
        raise DirectionError("There is no direction to project onto; expected at least one.")
    return [_place_direction(objective, name, direction) for name, direction in named.items()]


def _place_direction(objective: Objective, label: str | int, direction: State) -> dict[str, torch.Tensor]:
    if not direction:
        raise DirectionError(f"Direction {label!r} moves no entry.")
    try:
        placed = objective.place(direction)
    except DirectionError as error:
        raise DirectionError(f"Direction {label!r}: {error}") from error
    fixed = [name for name in placed if name not in objective.state()]
    if fixed:
        raise DirectionError(
            f"Direction {label!r} moves {fixed[0]!r}, which is not part of the state under "
            f"batch_norm={objective.batch_norm!r}."
        )
    for name, tensor in placed.items():
        if not torch.isfinite(tensor).all():
            raise DirectionError(f"Direction {label!r} has values in {name!r} that are infinite or not a number.")
    return placed
