"""The projection of one batch by differences of gradients, for losses that autograd differentiates once only."""

import itertools

import numpy as np
import torch
from jaxtyping import Float

from lmc_curvature.curvature.problem import BatchValues, Point, Problem, check_values
from lmc_curvature.curvature.products.gradient import inner
from lmc_curvature.objective.batches import Batch
from lmc_curvature.objective.explanations import naming_what_has_no_derivative
from lmc_curvature.objective.losses import check_differentiable
from lmc_curvature.objective.network import as_leaves

# Steps that are tried on the first batch, each four times the one before, about the cube root of the rounding error.
_STEPS = 4.0 ** np.arange(-2, 3)


def project_by_differences(problem: Problem, point: Point, batch: Batch) -> BatchValues:
    """Loss, slopes and curvature of one batch at one state: 2k gradients.

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
    values = loss, slopes, (curvature + curvature.T) / 2
    check_values(values, batch, point)
    return values


def difference_error(problem: Problem, point: Point) -> float:
    """How far the curvature at a state may be off, relative to its largest entry, by the first batch."""
    _, error = problem.memo(("steps", point.place), lambda: (np.zeros(0), 0.0))
    return error


def difference_steps(problem: Problem, point: Point, batch: Batch) -> tuple[Float[np.ndarray, " k"], float]:
    """The step of every direction, and how far the curvature of a batch may be off, relative to its largest entry.

    Large steps err by third derivatives, and by kinks that they reach; small ones by rounding, ε / h. Of five steps,
    about ε^(1/3) of the length ‖θ‖ / ‖u‖ (over the entries of u), each four times the one before, the one is taken
    whose row differs least from that of the next, and by so much it is taken to be off.
    """
    steps, differences, largest = [], [], 0.0
    for number, direction in enumerate(problem.directions):
        lengths = [
            float(torch.stack([torch.linalg.vector_norm(t[name], dtype=torch.float64) for name in direction]).norm())
            for t in (point.state, direction)
        ]
        scale = lengths[0] / lengths[1] if min(lengths) > 0 else 1.0
        tried = problem.objective.rounding ** (1 / 3) * scale * _STEPS
        rows = [_row(problem, point, batch, number, step) for step in tried]
        changes = [float(np.abs(first - second).max()) for first, second in itertools.pairwise(rows)]
        best = int(np.argmin(changes))
        steps.append(float(tried[best]))
        differences.append(changes[best])
        largest = max(largest, float(np.abs(rows[best]).max()))
    return np.array(steps), max(differences) / largest if largest else 0.0


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
