"""A batch's network and loss as captured graphs: compiled once for every shape of batch, and used while they hold."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lmc_curvature.agreement import all_near
from lmc_curvature.curvature.problem import Point, Problem, Tiling
from lmc_curvature.curvature.sweep.plan import is_large
from lmc_curvature.curvature.sweep.program import Program
from lmc_curvature.curvature.sweep.tiling import budget_bytes, choose_tiling, needs_of
from lmc_curvature.curvature.sweep.tree import BatchTree
from lmc_curvature.errors import CaptureError
from lmc_curvature.objective.batches import Batch
from lmc_curvature.objective.memo import Memo
from lmc_curvature.objective.network import State
from lmc_curvature.objective.risk import Objective

# Examples of a part: products with more cost more, and find no more.
_MOST_OF_A_PART = 8
# Batches that are compared whole, because an eighth of them would be too few examples.
_SMALL = 16
# Sets of values that are no tensors, and that graphs were captured with: class names, yes; file names, no.
_MOST_FRAMES = 32


@dataclass(frozen=True, eq=False)
class CompiledBatch:
    """The captured graphs for one shape of batch.

    Attributes:
        size: Examples in the batch.
        tiling: The examples and directions that are swept together.
        networks: Number of examples to the network's program, or to that of the whole loss: for tiles, and for the
            part, which is captured first.
        loss: The loss as a function of the network's output, if it is one.
        part: Examples, the first of the batch, that the network is known to take for themselves.
        memo: `memo(key, make)` keeps what is found out once about these graphs, and goes with them.
    """

    size: int
    tiling: Tiling
    networks: Mapping[int, Program]
    loss: Program | None
    part: int
    memo: Memo = field(default_factory=Memo)

    @property
    def is_tiled(self) -> bool:
        """Whether the batch is cut into tiles."""
        return self.tiling.examples < self.size

    @property
    def operations(self) -> set[tuple[tuple[Any, type], ...]]:
        """The operations of all programs, those of programs that differ in nothing else but shapes once."""
        programs = [*self.networks.values(), *([] if self.loss is None else [self.loss])]
        return {tuple(program.operations) for program in programs}

    def data_of(self, batch: Batch) -> BatchTree:
        """The data that the network's program takes: its inputs, or all of the batch for a whole loss."""
        return BatchTree.of(batch.data[0] if self.loss is not None else batch.data)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What the network and its loss make of a batch: `output` is anything, and None for a loss that has no network."""

    loss: Tensor
    output: Any


def evaluate_batch(objective: Objective, point: Point, batch: Batch) -> Evaluation:
    """Evaluate a batch as a whole; this is also where an unfit network is refused."""
    with objective.numerics.differentiating_operations(), torch.no_grad():
        return Evaluation(*objective.batch_evaluation(point.state, batch)[:2])


def part_size(size: int) -> int:
    """Examples of a batch that stand for it in comparisons: an eighth at most, all of a small batch."""
    return size if size < _SMALL else min(size // 8, _MOST_OF_A_PART)


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


def compile_batch(problem: Problem, batch: Batch, evaluation: Evaluation, *, whole: bool) -> CompiledBatch:
    """Capture the graphs for batches of one shape.

    Args:
        problem: The states and directions.
        batch: A batch of that shape.
        evaluation: What network and loss make of it.
        whole: Never cut the batch into tiles.

    Raises:
        CaptureError: Network or loss cannot be captured.
        MemoryBudgetError: As few examples as can be swept take more memory than allowed.
    """
    objective = problem.objective
    _refuse_changing_frames(objective, BatchTree.of(batch.data).signature[1])
    output: Any = None if _ends_wide(problem, batch, evaluation.output) else evaluation.output
    loss = _loss_program(objective, output, batch) if isinstance(output, Tensor) else None
    tileable = loss is not None and not whole and output.ndim > 0 and output.shape[0] == batch.size
    inputs = BatchTree.of(batch.data[0] if loss is not None else batch.data)

    def network(size: int) -> Program:
        return _network_program(problem, inputs.rows(0, size, batch.size), size, whole_loss=loss is None)

    part = part_size(batch.size) if tileable else batch.size
    try:
        networks = {part: network(part)}
        tiling = _tiling(problem, networks[part], loss, probe=part, size=batch.size, whole=not tileable)
        for size in {tiling.examples, batch.size % tiling.examples or tiling.examples} - {part}:
            networks[size] = network(size)
    except CaptureError:
        if not tileable:
            raise
        # A network may insist on its batch size.
        return compile_batch(problem, batch, evaluation, whole=True)
    return CompiledBatch(batch.size, tiling, networks, loss, part)


def compile_part(problem: Problem, compiled: CompiledBatch, part: Batch, output: Tensor) -> CompiledBatch:
    """The graphs for a part as a batch of its own: the network's as they are, and its own loss.

    Args:
        problem: The objective.
        compiled: The graphs for the batch that the part was cut from, which hold its size.
        part: The first examples of the batch.
        output: The network's output for them.

    Raises:
        CaptureError: The loss of the part cannot be captured.
    """
    loss = _loss_program(problem.objective, output, part)
    tiling = replace(compiled.tiling, examples=part.size)
    return CompiledBatch(part.size, tiling, {part.size: compiled.networks[part.size]}, loss, part.size)


def _tiling(problem: Problem, network: Program, loss: Program | None, *, probe: int, size: int, whole: bool) -> Tiling:
    if problem.tiling is not None:
        return replace(problem.tiling, examples=size if whole else min(problem.tiling.examples, size))
    objective, device = problem.objective, problem.objective.device
    # That of the first batch, also where its halves are swept.
    gradient = objective.memo("gradient bytes", lambda: network.body.value_bytes / probe * size)
    budget = budget_bytes(device, problem.memory_gib, gradient)
    return choose_tiling(
        network, loss, problem.directions, probe=probe, size=size, whole=whole, budget=budget, device=device
    )


def expected_bytes(problem: Problem, compiled: CompiledBatch) -> float:
    """Bytes that the sweep of a batch is expected to take at its peak, by which its tiles were chosen; see `Needs`.

    Beside them there are states, directions and folded weights.
    """
    size, directions = compiled.tiling.examples, problem.directions
    needs = needs_of(
        compiled.networks[size],
        compiled.loss,
        directions,
        probe=size,
        together=min(len(directions), compiled.tiling.directions),
        device=problem.objective.device,
    )
    return needs.total(compiled.tiling, compiled.size)


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

    with objective.numerics.differentiating():
        return Program.of(loss if whole_loss else output, problem.points[0].state, data, moved=problem.moved)


def _ends_wide(problem: Problem, batch: Batch, output: Any) -> bool:
    """Whether the tangents of a whole output are too many, and what follows it can be swept in chunks of its rows."""
    if not isinstance(output, Tensor) or not is_large(output.nbytes * len(problem.directions)):
        return False
    whole = _network_program(problem, BatchTree.of(batch.data), batch.size, whole_loss=True)
    return whole.body.tail is not None


def _loss_program(objective: Objective, output: Tensor, batch: Batch) -> Program:
    def loss(_: State, data: Any) -> Tensor:
        return objective.output_loss(data[0], Batch(1, batch.size, (None, data[1])))

    with objective.numerics.differentiating():
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
        with objective.numerics.differentiating(), torch.no_grad():
            loss = objective.batch_loss(point.state, batch)
        return all_near("captured graphs", result, loss, rounding=objective.rounding)
    inputs = compiled.data_of(batch)

    def holds(size: int) -> bool:
        part = Batch(batch.index, size, (inputs.rows(0, size, batch.size).structure, None))
        found = result[:size] if size < batch.size else result
        output = network_output(objective, point.state, part)
        return all_near("captured graphs", found, output, rounding=objective.rounding)

    # All that is compared is asked for before any of it is waited for.
    with objective.numerics.differentiating(), torch.no_grad():
        with torch.autocast(objective.device.type, enabled=False):
            values = compiled.loss.evaluate(compiled.loss.constants, BatchTree.of((result, batch.data[1])))
        found, loss = values[compiled.loss.result], objective.output_loss(result, batch)
    # As few examples as the network is known to take, and all of them if it should mix them.
    return any(holds(size) for size in dict.fromkeys((compiled.part, batch.size))) and all_near(
        "captured graphs", found, loss, rounding=objective.rounding
    )


def network_output(objective: Objective, state: State, batch: Batch) -> Any:
    """The network's own output for a batch as a whole."""
    with objective.numerics.differentiating(), torch.no_grad():
        return objective.output(state, batch)
