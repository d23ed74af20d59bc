"""Whether a network mixes the examples of a batch, so that the batch must not be cut into tiles."""

import torch
from torch import Tensor

from lmc_curvature.curvature.problem import Point, Problem
from lmc_curvature.curvature.sweep.compiled import CompiledBatch, is_output
from lmc_curvature.curvature.sweep.tiles import Tile, tiles_of
from lmc_curvature.objective.batches import Batch
from lmc_curvature.objective.network import State

# How far along all directions another state lies, to see there what a state itself may hide.
_NEAR = 0.01


def tiles_join(problem: Problem, compiled: CompiledBatch, point: Point, batch: Batch) -> bool:
    """Whether the tiles' outputs are those of the network for the batch as a whole, near a state.

    Near it, because examples may be mixed with a weight that happens to be zero there.
    """
    near = _near(problem, point)
    outputs = [_output(problem, near, tile) for tile in tiles_of(compiled, batch)]
    return is_output(problem.objective, near, batch, torch.cat(outputs))


def copies_stay_apart(problem: Problem, compiled: CompiledBatch, point: Point, batch: Batch) -> bool:
    """Whether examples that are alike have no part in each other's outputs, near a state.

    A network may mix examples by what is in them, neighbours or members of a group, and a batch may have none: so the
    first tile's examples are repeated until they fill a batch.
    """
    near, tile = _near(problem, point), tiles_of(compiled, batch)[0]
    output = _output(problem, near, tile)
    inputs = compiled.data_of(batch).repeated(tile.stop, batch.size).structure
    expected = output[torch.arange(batch.size, device=output.device) % tile.stop]
    return is_output(problem.objective, near, Batch(batch.index, batch.size, (inputs, None)), expected)


def _near(problem: Problem, point: Point) -> State:
    near = dict(point.state)
    for direction in problem.directions:
        for name, tensor in direction.items():
            near[name] = near[name] + _NEAR * tensor
    return near


def _output(problem: Problem, state: State, tile: Tile) -> Tensor:
    """The tile's output at any state."""
    device = problem.objective.device.type
    with problem.objective.differentiating_operations(), torch.no_grad(), torch.autocast(device, enabled=False):
        return tile.program.evaluate(tile.program.operands(state), tile.data)[tile.program.result]
