"""The projection of one batch by the sweep, believed only after one of its answers was compared with a product."""

from lmc_curvature.curvature.problem import BatchValues, Point, Problem, check_values
from lmc_curvature.curvature.projection.halves import is_mean_of_halves, project_halves
from lmc_curvature.curvature.projection.verification import refuse_mixing, verify
from lmc_curvature.curvature.sweep import (
    CompiledBatch,
    Evaluation,
    batch_key,
    compile_batch,
    evaluate_batch,
    is_current,
    sweep_batch,
)
from lmc_curvature.errors import CaptureError, MemoryBudgetError, SweepError
from lmc_curvature.objective.batches import Batch


def project_by_sweep(problem: Problem, point: Point, batch: Batch) -> BatchValues:
    """Loss, slopes and curvature of one batch at one state.

    A batch that neither fits memory whole nor can be cut into tiles is swept in halves, where its loss is their mean.
    Graphs are compiled once for every shape of batch, and kept with the objective. They are compared with the network
    once in every pass, in case it has changed, and with a Hessian-vector product once.

    Raises:
        CaptureError: The loss cannot be captured.
        MemoryBudgetError: Too few examples or directions would fit the budget.
        NonFiniteError: The answer is not finite.
        SweepError: The answer is not that of a Hessian-vector product.
        UnsupportedModelError: An operation has no second derivative.
    """
    objective = problem.objective
    whole = objective.memo("whole batches", lambda: not objective.has_output or objective.batch_norm != "interpolate")
    key = (*batch_key(problem, batch), whole)

    # Only for as long as it is compared: it may be as large as all that the network puts out.
    evaluations: dict[CompiledBatch, Evaluation] = {}

    def compile_now() -> CompiledBatch:
        evaluation = evaluate_batch(objective, point, batch)
        compiled = compile_batch(problem, batch, evaluation, whole=whole)
        evaluations[compiled] = evaluation
        problem.memo(compiled, lambda: True)
        return compiled

    def verify_now() -> None:
        evaluation = evaluations.get(compiled) or evaluate_batch(objective, point, batch)
        verify(problem, compiled, point, batch, values, result, evaluation)
        problem.memo((compiled, point.place), lambda: None)

    def needs_halves() -> bool:
        """Whether all directions at once take too much memory, and the batch cannot be cut into tiles, but halved."""
        try:
            compiled = objective.memo(key, compile_now)
            fits = compiled.loss is not None or compiled.tiling.directions >= len(problem.directions)
        except MemoryBudgetError:
            fits = not whole
        return not fits and problem.tiling is None and is_mean_of_halves(problem, point, batch)

    if objective.memo(("halves", *key), needs_halves):
        return project_halves(problem, point, batch, project_by_sweep)
    compiled = objective.memo(key, compile_now)
    try:
        read, result = sweep_batch(problem, compiled, point, batch)
        # Before it is waited for: a device has much to do meanwhile.
        if not problem.memo(compiled, lambda: is_current(objective, compiled, point, batch, result)):
            compiled = objective.memo.replace(key, compile_now())
            read, result = sweep_batch(problem, compiled, point, batch)
        values = read()
        check_values(values, batch, point)
        compiled.memo("verified", verify_now)
        # A weight that mixes examples may be zero at one state, and not at another.
        problem.memo((compiled, point.place), lambda: refuse_mixing(problem, compiled, point, batch, among_few=True))
        return values
    except (CaptureError, SweepError):
        # The network may mix examples or insist on its batch size, or its inputs may not begin with the examples.
        if not compiled.is_tiled:
            raise
    objective.memo.replace("whole batches", True)
    return project_by_sweep(problem, point, batch)
