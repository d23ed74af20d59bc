"""The sweep's answer compared with a Hessian-vector product, and the question whether a batch may be cut into tiles."""

import numpy as np
from torch import Tensor

from lmc_curvature.curvature.problem import BatchValues, Point, Problem, check_values
from lmc_curvature.curvature.projection.by_products import product_of_combination
from lmc_curvature.curvature.sweep import (
    BatchTree,
    CompiledBatch,
    compile_tile,
    copies_stay_apart,
    sweep_batch,
    tiles_join,
)
from lmc_curvature.errors import SweepError
from lmc_curvature.objective.batches import Batch


def verify(
    problem: Problem, compiled: CompiledBatch, point: Point, batch: Batch, values: BatchValues, result: Tensor
) -> None:
    """Compare the values of graphs for a batch with a Hessian-vector product, and see whether the batch may be cut.

    Args:
        problem: The objective and the directions.
        compiled: The graphs.
        point: The state.
        batch: The batch.
        values: The answer of the graphs.
        result: The network's output, or the whole loss, on the way to it.

    Raises:
        SweepError: They disagree, or the network mixes the examples that were cut into tiles.
    """
    # A product holds the graph of all that it is of. Where memory is short, a tile has the derivatives, and the whole
    # batch needs values only.
    short = compiled.is_tiled and not compiled.tiling.keeps_values
    if not (short and tiles_join(problem, compiled, point, batch) and _agrees(problem, compiled, point, batch, result)):
        _compare(problem, point, batch, values)
    if compiled.is_tiled and not copies_stay_apart(problem, compiled, point, batch):
        raise SweepError("The network mixes the examples of a batch.")


def _agrees(problem: Problem, compiled: CompiledBatch, point: Point, batch: Batch, result: Tensor) -> bool:
    """Whether the sweep of the first tile's examples agrees with a product; not if there is no loss of these alone."""
    size = compiled.tiling.examples
    tile = Batch(batch.index, size, BatchTree.of(batch.data).rows(0, size, batch.size).structure)
    try:
        values, _ = sweep_batch(problem, compile_tile(problem, compiled, tile, result[:size]), point, tile)
        check_values(values, tile, point)
        _compare(problem, point, tile, values)
        return True
    except Exception:  # noqa: BLE001 - what a loss makes of a tile is nobody's concern: the whole is compared
        return False


def _compare(problem: Problem, point: Point, batch: Batch, values: BatchValues) -> None:
    """Compare the sweep's values with all slopes and UᵀHUr for a random r.

    Raises:
        SweepError: They disagree by more than rounding.
    """
    loss, slopes, curvature = values
    precision = problem.objective.rounding
    # Far above rounding, and what it does at the kinks of rectifiers; far below a forgotten term.
    margin = precision**0.4
    # What cancels exactly comes out as rounding of what cancelled, which the loss gives the size of.
    rounding = 30 * precision * max(1.0, abs(loss))
    # Signs, scaled so that every direction has its say.
    size = np.sqrt(np.maximum(np.abs(curvature).max(1), rounding))
    coefficients = np.random.default_rng(0).choice([-1.0, 1.0], len(size)) / size
    slope, row = product_of_combination(problem, point, batch, coefficients)
    compared = {
        # In single precision a unit near a kink moves the slopes of all layers alike, small ones too.
        "slope": (slopes, slope, size * (np.abs(slopes) / size).sum() + rounding / margin),
        "curvature": (
            curvature @ coefficients,
            row,
            np.abs(curvature) @ np.abs(coefficients)
            + size * np.sqrt(len(size))
            + rounding / margin * np.abs(coefficients).sum(),
        ),
    }
    for name, (swept, expected, scale) in compared.items():
        wrong = np.flatnonzero(~(np.abs(swept - expected) <= margin * scale))
        if len(wrong):
            along = f"direction {wrong[0]}" + (" and a random combination of all" if name == "curvature" else "")
            raise SweepError(
                f"The sweep's {name} along {along} is {swept[wrong[0]]:.6g} on batch {batch.index}, and "
                f"{expected[wrong[0]]:.6g} by a Hessian-vector product. Does the network have derivatives of its "
                "own (autograd.Function, no_grad, detach)?"
            )
