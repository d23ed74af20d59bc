"""The tangent–adjoint sweep: UᵀHU for k directions from k forward tangents and one adjoint.

Differentiating L(θ + x u_i + y u_j) twice by the chain rule and collecting the second derivative of each operation
z_n = f_n(…) against its adjoint g_n = ∂L/∂z_n gives

    u_iᵀ H u_j = Σ_n ⟨g_n, D²f_n [ż^(i), ż^(j)]⟩,

where ż^(i) are the tangents of the operation's arguments along u_i (`sweep/rules`). A direction that moves one layer
has no tangent before that layer, linear operations contribute nothing, and a bilinear one costs one contraction of g_n
for each direction that reaches its rarer side.

All tangents of a value are one stack, and an operation passes it on in one call. What a language model computes of its
logits is swept in chunks of tokens (`sweep/tail.py`).

A batch goes through three stages: the prelude, which the state alone decides (folded weights), the network, and the
loss of its output. The network is swept in tiles of examples, so that the tangents at work stay small; the other two
see whole batches, so a loss may weigh its examples as it likes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, fx

from lmc_curvature.curvature.problem import BatchValues, Point, Problem
from lmc_curvature.curvature.sweep.compiled import CompiledBatch
from lmc_curvature.curvature.sweep.program import Program
from lmc_curvature.curvature.sweep.propagation import Tangents, Values, adjoints_of, contract, push, push_all
from lmc_curvature.curvature.sweep.rules import Contributions, Stack, stacked
from lmc_curvature.curvature.sweep.tiles import Tile, joined, tiles_of
from lmc_curvature.curvature.sweep.tiling import groups
from lmc_curvature.curvature.sweep.tree import BatchTree
from lmc_curvature.objective.batches import Batch
from lmc_curvature.objective.memo import Memo


def sweep_batch(
    problem: Problem, compiled: CompiledBatch, point: Point, batch: Batch
) -> tuple[Callable[[], BatchValues], Tensor]:
    """Sweep one batch at one state; on a CUDA device the whole sweep is one graph from its second time on.

    The memory that a graph computes in stays taken, see `Replays`; while it is recorded, as much again is.

    Args:
        problem: The objective and the directions.
        compiled: The graphs for the batch's shape.
        point: The state.
        batch: The batch.

    Returns:
        A function that waits for the device and returns loss, slopes and curvature; and the graphs' result on the way,
        the network's output or the whole loss.

    Raises:
        CaptureError: An operation cannot be differentiated, or the tiles' outputs cannot be joined.
    """
    inputs = BatchTree.of((point.state, list(problem.directions), batch.data))

    def on(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Contributions]]:
        state, directions, data = inputs.rebuilt(tensors)
        # What is recorded holds nothing that was made elsewhere, such as a prelude.
        own = replace(problem, directions=directions, memo=Memo())
        return _on_device(own, compiled, Point(state), replace(batch, data=data))

    # What autocast does is in the graph; what is computed from its values needs no rounding of its own.
    with (
        problem.objective.numerics.differentiating_operations(),
        torch.autocast(problem.objective.device.type, enabled=False),
    ):
        if problem.objective.replays.records:
            (result, *found), groupwise = problem.objective.replays(compiled, on, inputs.tensors)
        else:
            (result, *found), groupwise = _on_device(problem, compiled, point, batch)
    count = len(problem.directions)
    return partial(_read, count, groups(count, compiled.tiling.directions), found, groupwise), result


def _on_device(
    problem: Problem, compiled: CompiledBatch, point: Point, batch: Batch
) -> tuple[list[Tensor], list[Contributions]]:
    """All that the device computes, and does not wait for: the result, and loss, slopes and curvature of each group."""
    tiles = tiles_of(compiled, batch)
    preludes = _preludes(problem, compiled, point, tiles)
    values: dict[Tile, Values] = {}
    result = _result(compiled, tiles, preludes, values)
    together = groups(len(problem.directions), compiled.tiling.directions)
    found = [_sweep_group(compiled, batch, tiles, preludes, values, result, group) for group in together]
    return [result, *(numbers for numbers, _ in found)], [contributions for _, contributions in found]


def _read(
    count: int, together: Sequence[list[int]], found: Sequence[Tensor], groupwise: Sequence[Contributions]
) -> BatchValues:
    """Loss, slopes and curvature along all directions: here the host waits for the device."""
    loss, slopes, curvature = math.nan, np.empty(count), np.empty((count, count))
    for group, tensor, contributions in zip(together, found, groupwise, strict=True):
        loss, *numbers = tensor.tolist()
        slopes[group] = numbers[: len(group)]
        of_group = contributions.assemble(np.array(numbers[len(group) :]), count)
        curvature[np.ix_(group, group)] = of_group[np.ix_(group, group)]
    return loss, slopes, curvature


@dataclass(frozen=True, eq=False)
class _Prelude:
    """The prelude of a program at a state: values and tangents of its nodes."""

    values: Values
    tangents: Tangents


def _preludes(
    problem: Problem, compiled: CompiledBatch, point: Point, tiles: Sequence[Tile]
) -> Mapping[Program, _Prelude]:
    """The preludes at a state; kept for one shape of batch at a time, because they are as large as the network."""

    def make() -> tuple[CompiledBatch, dict[Program, _Prelude]]:
        return compiled, {program: _prelude(problem, program, point) for program in {tile.program for tile in tiles}}

    owner, preludes = problem.memo(point, make)
    return preludes if owner is compiled else problem.memo.replace(point, make())[1]


def _prelude(problem: Problem, program: Program, point: Point) -> _Prelude:
    along = {
        node: stacked({i: direction[name] for i, direction in enumerate(problem.directions) if name in direction})
        for name, node in program.entries.items()
        if node in program.prelude.active
    }
    values = program.operands(point.state)
    return _Prelude(values, push_all(program.prelude, values, along))


def _result(
    compiled: CompiledBatch, tiles: Sequence[Tile], preludes: Mapping[Program, _Prelude], values: dict[Tile, Values]
) -> Tensor:
    """The results of all tiles, joined; adds the tiles' values to `values` where there is memory to keep them."""
    results = []
    for tile in tiles:
        with torch.set_grad_enabled(compiled.tiling.keeps_values):
            found = tile.program.evaluate(preludes[tile.program].values, tile.data)
        if compiled.tiling.keeps_values:
            values[tile] = found
        results.append(found[tile.program.result].detach())
    return joined(tiles, results)


def _sweep_group(
    compiled: CompiledBatch,
    batch: Batch,
    tiles: Sequence[Tile],
    preludes: Mapping[Program, _Prelude],
    values: dict[Tile, Values],
    result: Tensor,
    group: list[int],
) -> tuple[Tensor, Contributions]:
    """Loss, slopes and contributions to the curvature for some of the directions, end to end; and the latter."""
    contributions = Contributions()
    if compiled.loss is None:
        loss = result
        slopes = _sweep_tiles(tiles, preludes, values, torch.ones_like(result), group, contributions)
    else:
        program = compiled.loss
        assert program.argument is not None
        of_loss = program.evaluate(program.constants, BatchTree.of((result, batch.data[1])))
        loss = of_loss[program.result].detach()
        adjoints = adjoints_of(program.body, of_loss, [torch.ones_like(loss)])
        adjoint = adjoints.get(program.argument, torch.zeros_like(result))
        tangents = _sweep_tiles(tiles, preludes, values, adjoint, group, contributions)
        (slopes,) = push(program.body, of_loss, {program.argument: tangents}, adjoints, contributions)
    along = torch.zeros_like(loss).expand(len(group)) if slopes is None else slopes.spread(group)
    return torch.cat([loss.reshape(1), along, *contributions.flat()]).double(), contributions


def _sweep_tiles(
    tiles: Sequence[Tile],
    preludes: Mapping[Program, _Prelude],
    values: dict[Tile, Values],
    adjoint: Tensor,
    group: list[int],
    contributions: Contributions,
) -> Stack | None:
    """Sweep every tile, from the adjoint of the joined results.

    Takes the tiles' values out of `values`, or computes them anew, and adds the curvature of all operations.

    Returns:
        The tangents of the result, those of the tiles joined.
    """
    found: list[Stack | None] = []
    pulled: dict[Program, dict[fx.Node, Tensor]] = {}
    for tile in tiles:
        prelude, total = preludes[tile.program], pulled.setdefault(tile.program, {})
        # An output that was not cut may have other rows than examples: tokens, crops.
        part = adjoint[tile.start : tile.stop] if len(tiles) > 1 else adjoint
        at = values.pop(tile, None) or tile.program.evaluate(prelude.values, tile.data)
        adjoints = adjoints_of(tile.program.body, at, [part])
        operands = {
            node: stack.among(group)
            for node in tile.program.prelude.stage.outputs
            if (stack := prelude.tangents.get(node)) is not None and not set(group).isdisjoint(stack.directions)
        }
        found += push(tile.program.body, at, operands, adjoints, contributions)
        for node in tile.program.body.needs_adjoint:
            if node in adjoints:
                total[node] = total[node] + adjoints[node] if node in total else adjoints[node]
        # The next tile's are as large.
        del at, adjoints, operands
    for program, total in pulled.items():
        plan, prelude = program.prelude, preludes[program]
        outer = adjoints_of(plan, prelude.values, [total.get(node) for node in plan.stage.outputs], keeps_graph=True)
        contract(plan, prelude.values, prelude.tangents, outer, contributions)
    stacks = [stack for stack in found if stack is not None]
    # The same directions reach the result of every tile.
    return Stack(stacks[0].directions, torch.cat([stack.tensors for stack in stacks], 1)) if stacks[1:] else found[0]
