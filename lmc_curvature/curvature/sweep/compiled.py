"""A batch's network and loss as captured graphs: compiled once for every shape of batch, and used while they hold."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lmc_curvature.curvature.problem import Point, Problem, Tiling
from lmc_curvature.curvature.sweep.program import Program
from lmc_curvature.curvature.sweep.tiling import budget_bytes, choose_tiling
from lmc_curvature.curvature.sweep.tree import BatchTree
from lmc_curvature.errors import CaptureError
from lmc_curvature.objective.batches import Batch
from lmc_curvature.objective.memo import Memo
from lmc_curvature.objective.network import State
from lmc_curvature.objective.risk import Objective

# Examples of the capture that a tile's memory is estimated from.
_PROBE = 16
# Sets of values that are no tensors, and that graphs were captured with: class names, yes; file names, no.
_MOST_FRAMES = 32


@dataclass(frozen=True, eq=False)
class CompiledBatch:
    """The captured graphs for one shape of batch.

    Attributes:
        size: Examples in the batch.
        tiling: The examples and directions that are swept together.
        networks: Number of examples in a tile to the network's program, or to that of the whole loss.
        loss: The loss as a function of the network's output, if it is one.
        alone: Examples that the network is known to take for themselves.
        memo: `memo(key, make)` keeps what is found out once about these graphs, and goes with them.
    """

    size: int
    tiling: Tiling
    networks: Mapping[int, Program]
    loss: Program | None
    alone: int
    memo: Memo = field(default_factory=Memo)

    @property
    def is_tiled(self) -> bool:
        """Whether the batch is cut into tiles."""
        return self.tiling.examples < self.size

    def data_of(self, batch: Batch) -> BatchTree:
        """The data that the network's program takes: its inputs, or all of the batch for a whole loss."""
        return BatchTree.of(batch.data[0] if self.loss is not None else batch.data)


def batch_key(problem: Problem, batch: Batch) -> tuple[Hashable, ...]:
    """Everything that a compiled batch depends on.

    Raises:
        CaptureError: The batch holds something whose value cannot be told from its looks.
    """
    device = problem.objective.device.type
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    entries = tuple(tuple(sorted(direction)) for direction in problem.directions)
    size = (batch.size, problem.memory_gib, problem.tiling)
    return ("compiled batch", *BatchTree.of(batch.data).signature, *size, entries, cast)


def compile_batch(problem: Problem, batch: Batch, *, whole: bool) -> CompiledBatch:
    """Capture the graphs for batches of one shape.

    Args:
        problem: The states and directions.
        batch: A batch of that shape.
        whole: Never cut the batch into tiles.

    Raises:
        CaptureError: Network or loss cannot be captured.
        MemoryBudgetError: As few examples as can be swept take more memory than allowed.
    """
    objective, state = problem.objective, problem.points[0].state
    _refuse_changing_frames(objective, BatchTree.of(batch.data).signature[1])
    with objective.differentiating_operations(), torch.no_grad():
        # Whole, and before anything is captured: this is also where an unfit network is refused.
        output = objective.batch_evaluation(state, batch)[1]
    loss = _loss_program(objective, output, batch) if isinstance(output, Tensor) else None
    tileable = loss is not None and not whole and output.ndim > 0 and output.shape[0] == batch.size
    inputs = BatchTree.of(batch.data[0] if loss is not None else batch.data)

    def network(size: int) -> Program:
        return _network_program(problem, inputs.rows(0, size, batch.size), size, whole_loss=loss is None)

    probe = min(_PROBE, batch.size) if tileable else batch.size
    try:
        networks = {probe: network(probe)}
        tiling = _tiling(problem, networks[probe], loss, probe=probe, size=batch.size, whole=not tileable)
        sizes = {tiling.examples, batch.size % tiling.examples or tiling.examples}
        networks = {size: networks[size] if size in networks else network(size) for size in sizes}
    except CaptureError:
        if not tileable:
            raise
        # A network may insist on its batch size.
        return compile_batch(problem, batch, whole=True)
    return CompiledBatch(batch.size, tiling, networks, loss, probe)


def compile_tile(problem: Problem, compiled: CompiledBatch, tile: Batch, output: Tensor) -> CompiledBatch:
    """The graphs for a tile as a batch of its own: the network's as they are, and its own loss.

    Args:
        problem: The objective.
        compiled: The graphs for the batch that the tile was cut from.
        tile: The tile.
        output: The network's output for it.

    Raises:
        CaptureError: The loss of the tile cannot be captured.
    """
    loss = _loss_program(problem.objective, output, tile)
    return CompiledBatch(tile.size, compiled.tiling, {tile.size: compiled.networks[tile.size]}, loss, tile.size)


def _tiling(problem: Problem, network: Program, loss: Program | None, *, probe: int, size: int, whole: bool) -> Tiling:
    if problem.tiling is not None:
        return replace(problem.tiling, examples=size if whole else min(problem.tiling.examples, size))
    device = problem.objective.device
    budget = budget_bytes(device, problem.memory_gib)
    return choose_tiling(
        network, loss, problem.directions, probe=probe, size=size, whole=whole, budget=budget, device=device
    )


def _refuse_changing_frames(objective: Objective, frame: str) -> None:
    frames = objective.memo("values beside tensors", lambda: dict[str, None]())
    if len(frames) >= _MOST_FRAMES and frame not in frames:
        raise CaptureError(
            f"The loss was captured as a graph {_MOST_FRAMES} times, because batches hold values that are no tensors "
            f"and change: {frame[:80]} now, {next(reversed(frames))[:80]} before. Leave out what the loss does not "
            "need (names of files), and make tensors of the rest."
        )
    frames[frame] = None


def _network_program(problem: Problem, data: BatchTree, size: int, *, whole_loss: bool) -> Program:
    objective = problem.objective

    def output(state: State, inputs: Any) -> Tensor:
        return objective.output(state, Batch(1, size, (inputs, None)))

    def loss(state: State, data: Any) -> Tensor:
        return objective.batch_loss(state, Batch(1, size, data))

    with objective.differentiating():
        return Program.of(loss if whole_loss else output, problem.points[0].state, data, moved=problem.moved)


def _loss_program(objective: Objective, output: Tensor, batch: Batch) -> Program:
    def loss(_: State, data: Any) -> Tensor:
        return objective.output_loss(data[0], Batch(1, batch.size, (None, data[1])))

    with objective.differentiating():
        return Program.of(loss, {}, BatchTree.of((output, batch.data[1])), data_moves=True)


def is_current(objective: Objective, compiled: CompiledBatch, point: Point, batch: Batch, result: Tensor) -> bool:
    """Whether graphs that were captured earlier give what the network and the loss do now.

    A network or a loss may refer to something outside that has changed. A change of derivatives and of no value is not
    seen.

    Args:
        objective: The loss.
        compiled: The graphs.
        point: The state that they were evaluated at.
        batch: The batch.
        result: The graphs' result for it: the network's output, or the whole loss.
    """
    if compiled.loss is None:
        with objective.differentiating(), torch.no_grad():
            return _equal_up_to_rounding(objective, result, objective.batch_loss(point.state, batch))
    inputs = compiled.data_of(batch)

    def holds(size: int) -> bool:
        part = Batch(batch.index, size, (inputs.rows(0, size, batch.size).structure, None))
        return is_output(objective, point.state, part, result[:size] if size < batch.size else result)

    # As few examples as the network is known to take, and all of them if it should mix them.
    if not any(holds(size) for size in dict.fromkeys((compiled.alone, batch.size))):
        return False
    with objective.differentiating(), torch.no_grad():
        with torch.autocast(objective.device.type, enabled=False):
            values = compiled.loss.evaluate(compiled.loss.constants, BatchTree.of((result, batch.data[1])))
        return _equal_up_to_rounding(objective, values[compiled.loss.result], objective.output_loss(result, batch))


def is_output(objective: Objective, state: State, batch: Batch, output: Tensor) -> bool:
    """Whether an output, up to rounding, is the network's for a batch as a whole."""
    with objective.differentiating(), torch.no_grad():
        return _equal_up_to_rounding(objective, output, objective.output(state, batch))


def _equal_up_to_rounding(objective: Objective, found: Tensor, expected: Any) -> bool:
    if not isinstance(expected, Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    # Outputs may be masked with infinities.
    finite = expected[expected.isfinite()].abs()
    scale = finite.max() if finite.numel() else 0.0
    rounding = max(torch.finfo(found.dtype).eps, objective.rounding)
    near = (found - expected).abs() <= rounding**0.5 * scale
    return bool((near | (found == expected) | (found.isnan() & expected.isnan())).all())
