"""The projection of one batch by differences of losses, from forward passes alone."""

import itertools

import numpy as np
import torch
from jaxtyping import Float

from lmc_curvature.curvature.problem import BatchValues, Point, Problem, check_values
from lmc_curvature.curvature.projection.by_differences import RATIO, best_step, steps_to_try
from lmc_curvature.objective.batches import Batch


def project_by_losses(problem: Problem, point: Point, batch: Batch) -> BatchValues:
    """Loss, slopes and curvature of one batch at one state: k² + k + 1 losses.

    With f(x) the loss at θ + Σ x_i u_i, differences of which are taken in float64, and r(v) = f(v) − 2 f(0) + f(−v),

        slopes[i]       = [f(h_i e_i) − f(−h_i e_i)] / 2h_i
        curvature[i, i] = r(h_i e_i) / h_i²
        curvature[i, j] = [r(h_i e_i + h_j e_j) − r(h_i e_i) − r(h_j e_j)] / 2 h_i h_j

    The steps h_i are chosen on the first batch; see `loss_steps`.

    Raises:
        NonFiniteError: They are not finite.
    """
    steps, _ = problem.memo(("steps", point.place), lambda: loss_steps(problem, point, batch))
    values = _differences(problem, point, batch, steps)
    check_values(values, batch, point)
    return values


def loss_steps(problem: Problem, point: Point, batch: Batch) -> tuple[Float[np.ndarray, " k"], float]:
    """The step of every direction, and how far the curvature of a batch may be off, relative to its largest entry.

    Rounding errs by ε / h², so steps are about ε^(1/4) of the length ‖θ‖ / ‖u‖. Of five, the one is taken whose second
    difference is nearest to that of the next; the error is how far all of the matrix is from that by the next steps.
    """
    loss, k = _loss_at(problem, point, batch, np.zeros(len(problem.directions))), len(problem.directions)
    steps = np.zeros(k)
    for number, unit in enumerate(np.eye(k)):
        tried = steps_to_try(problem, point, number, power=1 / 4)
        seconds = [np.array([_rise(problem, point, batch, step * unit, loss)[0] / step**2]) for step in tried]
        steps[number] = tried[best_step(seconds)[0]]
    here, there = (_differences(problem, point, batch, each)[2] for each in (steps, RATIO * steps))
    largest = float(np.abs(here).max())
    return steps, float(np.abs(here - there).max()) / largest if largest else 0.0


def _differences(problem: Problem, point: Point, batch: Batch, steps: Float[np.ndarray, " k"]) -> BatchValues:
    loss, units = _loss_at(problem, point, batch, np.zeros(len(steps))), np.diag(steps)
    rises, changes = np.array([_rise(problem, point, batch, unit, loss) for unit in units]).T
    products = np.diag(rises)
    for i, j in itertools.combinations(range(len(steps)), 2):
        both, _ = _rise(problem, point, batch, units[i] + units[j], loss)
        products[i, j] = products[j, i] = (both - rises[i] - rises[j]) / 2
    return loss, changes / (2 * steps), products / np.outer(steps, steps)


def _rise(
    problem: Problem, point: Point, batch: Batch, shift: Float[np.ndarray, " k"], loss: float
) -> tuple[float, float]:
    """f(x) − 2 f(0) + f(−x) and f(x) − f(−x) for coordinates x, where f(0) is known."""
    after, before = (_loss_at(problem, point, batch, sign * shift) for sign in (1, -1))
    return (after - loss) + (before - loss), after - before


def _loss_at(problem: Problem, point: Point, batch: Batch, shift: Float[np.ndarray, " k"]) -> float:
    """The loss of a batch at a state that is moved along the directions."""
    state = dict(point.state)
    for step, direction in zip(shift.tolist(), problem.directions, strict=True):
        if step:
            state |= {name: state[name] + step * tensor for name, tensor in direction.items()}
    with torch.no_grad(), problem.objective.numerics.exact():
        return problem.objective.batch_loss(state, batch).item()
