"""The sweep's answer compared with the network and with a Hessian-vector product, and whether a batch may be cut."""

import numpy as np
from torch import Tensor

from lmc_curvature.agreement import all_near, near
from lmc_curvature.curvature.problem import BatchValues, Point, Problem, check_values
from lmc_curvature.curvature.projection.by_products import product_of_combination
from lmc_curvature.curvature.sweep import (
    BatchTree,
    CompiledBatch,
    Evaluation,
    compile_batch,
    compile_part,
    evaluate_batch,
    mixes_examples,
    part_size,
    sweep_batch,
)
from lmc_curvature.errors import SweepError
from lmc_curvature.objective.batches import Batch
from lmc_curvature.objective.numerics import largest_values


def verify(
    problem: Problem,
    compiled: CompiledBatch,
    point: Point,
    batch: Batch,
    values: BatchValues,
    result: Tensor,
    evaluation: Evaluation,
) -> None:
    """Compare what the graphs make of a batch with what the network does, and see whether the batch may be cut.

    Derivatives are compared with a Hessian-vector product on a part of the batch. That the whole is right as well
    follows from two things that cost next to nothing: the graphs for the whole have the values of the network, and
    consist of the same operations as those for the part, only for more examples.

    Args:
        problem: The objective and the directions.
        compiled: The graphs.
        point: The state.
        batch: The batch.
        values: The answer of the graphs.
        result: The network's output, or the whole loss, on the way to it.
        evaluation: What network and loss make of the batch.

    Raises:
        SweepError: They disagree, or the network mixes the examples that were cut into tiles.
    """
    _compare_values(problem, compiled, batch, values, result, evaluation)
    if not _agrees_on_a_part(problem, compiled, point, batch, result):
        _compare_derivatives(problem, point, batch, values)
    refuse_mixing(problem, compiled, point, batch, among_few=False)


def refuse_mixing(problem: Problem, compiled: CompiledBatch, point: Point, batch: Batch, *, among_few: bool) -> None:
    """See whether the examples that were cut into tiles are mixed by the network at a state; see `mixes_examples`.

    Raises:
        SweepError: They are.
    """
    if compiled.is_tiled and mixes_examples(problem, compiled, point, batch, among_few=among_few):
        raise SweepError("The network mixes the examples of a batch.")


def _compare_values(
    problem: Problem,
    compiled: CompiledBatch,
    batch: Batch,
    values: BatchValues,
    result: Tensor,
    evaluation: Evaluation,
) -> None:
    """Compare the graphs' output and loss with those of the network.

    Raises:
        SweepError: They disagree by more than rounding.
    """
    rounding = problem.objective.rounding
    expected = evaluation.loss if compiled.loss is None else evaluation.output
    loss = evaluation.loss.item()
    # A small loss may be what is left of larger numbers that cancel, such as an output.
    floor = 4 * rounding * largest_values([result.nan_to_num(0.0, 0.0, 0.0)]).item()
    same_loss = near("captured values", values[0], loss, rounding=rounding, scale=abs(loss), floor=floor)
    if not (same_loss and all_near("captured values", result, expected, rounding=rounding)):
        raise SweepError(
            f"The captured graph does not give the network's {'output' if same_loss else 'loss'} on batch "
            f"{batch.index}: its loss is {values[0]:.6g} by the graph, and {loss:.6g} by the network."
        )


def _agrees_on_a_part(problem: Problem, compiled: CompiledBatch, point: Point, batch: Batch, result: Tensor) -> bool:
    """Whether the sweep of a part, by the operations that sweep the whole, agrees with a product.

    Not if there is no loss of the part alone, or if that consists of other operations.
    """
    size = min(part_size(batch.size), compiled.tiling.examples)
    if size == batch.size:
        return False
    whole = BatchTree.of(batch.data)
    cut = whole.rows(0, size, batch.size)
    if all(tensor is before for tensor, before in zip(cut.tensors, whole.tensors, strict=True)):
        # Its size counts something else than rows: tokens, nodes of a graph.
        return False
    part = Batch(batch.index, size, cut.structure)
    try:
        if size in compiled.networks:
            of_part = compile_part(problem, compiled, part, result[:size])
        else:
            of_part = compile_batch(problem, part, evaluate_batch(problem.objective, point, part), whole=True)
        if of_part.operations != compiled.operations:
            return False
        values = sweep_batch(problem, of_part, point, part, once=True)[0]()
        check_values(values, part, point)
        _compare_derivatives(problem, point, part, values)
    except Exception:  # noqa: BLE001 - what a loss makes of a part is nobody's concern: the whole is compared
        return False
    return True


def _compare_derivatives(problem: Problem, point: Point, batch: Batch, values: BatchValues) -> None:
    """Compare the sweep's values with all slopes and UᵀHUr for a random r.

    Raises:
        SweepError: They disagree by more than rounding.
    """
    loss, slopes, curvature = values
    precision = problem.objective.rounding
    # What cancels exactly comes out as rounding of what cancelled, which the loss gives the size of.
    rounding = 30 * precision * max(1.0, abs(loss))
    # Signs, scaled so that every direction has its say.
    size = np.sqrt(np.maximum(np.abs(curvature).max(1), rounding))
    coefficients = np.random.default_rng(0).choice([-1.0, 1.0], len(size)) / size
    slope, row = product_of_combination(problem, point, batch, coefficients)
    compared = {
        # In single precision a unit near a kink moves the slopes of all layers alike, small ones too.
        "slope": (slopes, slope, size * (np.abs(slopes) / size).sum(), rounding),
        "curvature": (
            curvature @ coefficients,
            row,
            np.abs(curvature) @ np.abs(coefficients) + size * np.sqrt(len(size)),
            rounding * np.abs(coefficients).sum(),
        ),
    }
    for name, (swept, expected, scale, floor) in compared.items():
        wrong = np.flatnonzero(~near("sweep", swept, expected, rounding=precision, scale=scale, floor=floor))
        if len(wrong):
            along = f"direction {wrong[0]}" + (" and a random combination of all" if name == "curvature" else "")
            raise SweepError(
                f"The sweep's {name} along {along} is {swept[wrong[0]]:.6g} on batch {batch.index}, and "
                f"{expected[wrong[0]]:.6g} by a Hessian-vector product. Does the network have derivatives of its "
                "own (autograd.Function, no_grad, detach)?"
            )
