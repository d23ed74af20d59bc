"""The projection of one batch by differences of gradients, for losses that autograd differentiates once only."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float

from lmc_curvature.curvature.problem import BatchValues, Point, Problem, check_values
from lmc_curvature.curvature.products.gradient import inner
from lmc_curvature.objective.batches import Batch
from lmc_curvature.objective.explanations import naming_what_has_no_derivative
from lmc_curvature.objective.losses import check_differentiable
from lmc_curvature.objective.network import as_leaves

# Steps that are tried on the first batch, each so many times the one before.
RATIO = 4.0
_STEPS = RATIO ** np.arange(-2, 3)


def project_by_differences(problem: Problem, point: Point, batch: Batch) -> BatchValues:
    """Loss, slopes and curvature of one batch at one state: 2k + 1 gradients.

    With G(x) the slopes at θ + Σ x_i u_i, summed in float64, row i of the curvature is

        [G(h_i e_i) − G(−h_i e_i)] / 2h_i

    and the matrix is made symmetric. The steps h_i are chosen on the first batch; see `difference_steps`.

    Raises:
        NonFiniteError: They are not finite.
        UnsupportedModelError: An operation has no derivative.
    """
    loss, slopes = _slopes_at(problem, point, batch)
    steps, _ = problem.memo(("steps", point.place), lambda: difference_steps(problem, point, batch))
    curvature = np.stack([_row(problem, point, batch, number, step) for number, step in enumerate(steps)])
    problem.memo.replace(("sum", point.place), problem.memo.get(("sum", point.place), 0) + batch.weight * curvature)
    values = loss, slopes, (curvature + curvature.T) / 2
    check_values(values, batch, point)
    return values


def difference_error(problem: Problem, point: Point) -> float:
    """How far the curvature at a state may be off, relative to its largest entry.

    By the steps of the first batch, or by how far the rows of all batches are from a symmetric matrix, if that is more:
    a kink within the step of one row is hardly within those of the others.
    """
    _, error = problem.memo(("steps", point.place), lambda: (np.zeros(0), 0.0))
    found = problem.memo.get(("sum", point.place), np.zeros((1, 1)))
    largest = float(np.abs(found).max())
    return max(error, float(np.abs(found - found.T).max()) / largest if largest else 0.0)


def difference_steps(problem: Problem, point: Point, batch: Batch) -> tuple[Float[np.ndarray, " k"], float]:
    """The step of every direction, and how far the curvature of a batch may be off, relative to its largest entry.

    Large steps err by third derivatives, and by kinks that they reach; small ones by rounding, ε / h. Of five steps,
    about ε^(1/3) of the length ‖θ‖ / ‖u‖ (over the entries of u), each four times the one before, the one is taken
    whose row differs least from that of the next, and by so much it is taken to be off.
    """
    steps, differences, largest = [], [], 0.0
    for number in range(len(problem.directions)):
        tried = steps_to_try(problem, point, number, power=1 / 3)
        rows = [_row(problem, point, batch, number, step) for step in tried]
        best, difference = best_step(rows)
        steps.append(float(tried[best]))
        differences.append(difference)
        largest = max(largest, float(np.abs(rows[best]).max()))
    return np.array(steps), max(differences) / largest if largest else 0.0


def steps_to_try(problem: Problem, point: Point, number: int, *, power: float) -> Float[np.ndarray, " steps"]:
    """Steps along one of the directions, about a power of the rounding error of the length ‖θ‖ / ‖u‖."""
    direction = problem.directions[number]
    lengths = [
        float(torch.stack([torch.linalg.vector_norm(t[name], dtype=torch.float64) for name in direction]).norm())
        for t in (point.state, direction)
    ]
    scale = lengths[0] / lengths[1] if min(lengths) > 0 else 1.0
    return problem.objective.rounding**power * scale * _STEPS


def best_step(values: Sequence[Float[np.ndarray, " k"]]) -> tuple[int, float]:
    """Of what comes of several steps, the place of that which is nearest to the next, and how far that is."""
    changes = [float(np.abs(first - second).max()) for first, second in itertools.pairwise(values)]
    # A long step may lead to where there is no loss.
    best = int(np.argmin(np.nan_to_num(changes, nan=np.inf)))
    return best, changes[best]


def _row(problem: Problem, point: Point, batch: Batch, number: int, step: float) -> Float[np.ndarray, " k"]:
    after, before = (_slopes_at(problem, point, batch, number, sign * step)[1] for sign in (1, -1))
    return (after - before) / (2 * step)


def _slopes_at(
    problem: Problem, point: Point, batch: Batch, number: int = 0, step: float = 0.0
) -> tuple[float, Float[np.ndarray, " k"]]:
    """Loss and slopes of a batch at a state, moved by a step along one of the directions."""
    objective, moved = problem.objective, problem.directions[number] if step else {}
    state = {**point.state, **{name: point.state[name] + step * tensor for name, tensor in moved.items()}}
    leaves = as_leaves({name: state[name] for name in objective.snapshot if name in problem.moved})
    with objective.numerics.differentiating():
        loss = objective.batch_loss({**state, **leaves}, batch)
    check_differentiable(loss)
    with naming_what_has_no_derivative("differentiated"):
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    gradient = dict(zip(leaves, found, strict=True))
    slopes = torch.stack([inner(gradient, direction) for direction in problem.directions])
    return loss.item(), slopes.double().cpu().numpy()
