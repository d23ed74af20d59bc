"""The projection of loss, gradient and Hessian onto a few directions: all that a barrier prediction needs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int

from lmc_curvature.averages import standard_error, weighted_mean
from lmc_curvature.curvature.problem import BatchValues
from lmc_curvature.curvature.projection.by_products import Products
from lmc_curvature.curvature.projection.verification import VerifiedSweep
from lmc_curvature.curvature.sweep.sweep import Sweep
from lmc_curvature.errors import DirectionError, NonFiniteError, OptionError, check_choice
from lmc_curvature.objective.batches import Batch
from lmc_curvature.objective.losses import finite_loss
from lmc_curvature.objective.network import State, check_finite
from lmc_curvature.objective.risk import Objective

METHODS = ("auto", "sweep", "hvp")


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
    memory_gib: float | None = None,
    progress: bool = False,
) -> Projection:
    """Project an objective onto directions at a state, in one pass over the loader.

    Args:
        objective: The loss and its data.
        state: Where to differentiate.
        directions: k sparse states, by name or in order; each holds only the entries it moves.
        method: `"sweep"`: forward tangents and one adjoint (see `lmc_curvature.curvature.sweep.sweep`), compared with a
            Hessian-vector product on the first batch. `"hvp"`: one exact Hessian-vector product a direction and
            batch. `"auto"`: the sweep, and products with a `FallbackWarning` where it cannot go.
        memory_gib: What the sweep may take for values and tangents, in GiB: examples and directions are cut to fit.
            By default half of what a CUDA device has free, or 4 GiB of main memory. Beside it there are the directions,
            folded weights and their tangents (about as large as state and directions), and for the first batch of
            every shape a pass without gradients over all of it; the objective's own check of the first batch keeps a
            graph of it for a moment.
        progress: Show a progress bar over batches.

    Returns:
        The projection, its rows in the order of `directions`.

    Raises:
        DirectionError: A direction has an unknown entry, a wrong shape, a type that cannot move or values that are
            not finite, or there is no direction.
        NonFiniteError: The loss or the curvature of a batch is not finite.
        OptionError: `method` is not a choice, or `memory_gib` is not positive.
        MemoryBudgetError: One example needs more than `memory_gib`.
        CaptureError: With `method="sweep"`, the loss cannot be captured; names the operation.
        SweepError: With `method="sweep"`, its answer disagrees with a Hessian-vector product.
    """
    return project_hessian_at(objective, [state], directions, method=method, memory_gib=memory_gib, progress=progress)[
        0
    ]


def project_hessian_at(
    objective: Objective,
    states: Sequence[State],
    directions: Mapping[str, State] | Sequence[State],
    *,
    method: str = "auto",
    memory_gib: float | None = None,
    progress: bool = False,
) -> list[Projection]:
    """As `project_hessian`, at several states on the same batches: still one pass over the loader.

    Args:
        objective: The loss and its data.
        states: Where to differentiate; every batch is visited at all of them.
        directions: k sparse states, the same at every state.
        method: See `project_hessian`.
        memory_gib: See `project_hessian`.
        progress: Show a progress bar over batches.

    Returns:
        A projection for each state.

    Raises:
        LMCCurvatureError: As `project_hessian`; values that are not finite are named with their state's number.
    """
    check_choice("method", method, METHODS)
    if memory_gib is not None and not memory_gib > 0:
        raise OptionError(f"memory_gib={memory_gib!r}: expected a positive number of GiB (or None).")
    placed = _place_directions(objective, directions)
    states = [objective.complete(state) for state in states]
    for state in states:
        check_finite(state, "the state")
    project = _road(objective, states, placed, method, memory_gib)
    sizes: list[int] = []
    values: list[list[BatchValues]] = [[] for _ in states]
    with objective.one_pass(progress=progress, description="curvature") as batches:
        for batch in batches:
            sizes.append(batch.size)
            for number, collected in enumerate(values):
                found = project(number, batch)
                _check_finite(found, batch, f" at endpoint {number + 1} of {len(states)}" if len(states) > 1 else "")
                collected.append(found)
    return [
        Projection(
            batch_sizes=np.array(sizes),
            batch_losses=np.array([loss for loss, _, _ in collected]),
            batch_slopes=np.stack([slopes for _, slopes, _ in collected]),
            batch_curvatures=np.stack([curvature for _, _, curvature in collected]),
        )
        for collected in values
    ]


def _road(
    objective: Objective,
    states: Sequence[State],
    directions: Sequence[State],
    method: str,
    memory_gib: float | None,
) -> Callable[[int, Batch], BatchValues]:
    """The function that projects a batch at the state of a number."""
    products = Products(objective, states, directions)
    if method == "hvp":
        return products.project
    sweep = VerifiedSweep(Sweep(objective, states, directions, memory_gib=memory_gib), products)
    return sweep.project if method == "sweep" else sweep.project_or_fall_back


def _check_finite(values: BatchValues, batch: Batch, where: str) -> None:
    loss, slopes, curvature = values
    finite_loss(loss, batch, where)
    if not (np.isfinite(slopes).all() and np.isfinite(curvature).all()):
        raise NonFiniteError(
            f"The slopes or the curvature are not finite at batch {batch.index} ({batch.size} examples){where}. "
            "Does the network compute something without a second derivative, such as a square root at zero?"
        )


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
