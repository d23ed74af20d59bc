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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, fx

from lmc_curvature.agreement import near
from lmc_curvature.curvature.problem import BatchValues, Point, Problem
from lmc_curvature.curvature.sweep.compiled import CompiledBatch
from lmc_curvature.curvature.sweep.program import Program
from lmc_curvature.curvature.sweep.propagation import Tangents, Values, adjoints_of, contract, push, push_all
from lmc_curvature.curvature.sweep.rules import Contributions, Stack, stacked
from lmc_curvature.curvature.sweep.tiles import Tile, joined, tiles_of
from lmc_curvature.curvature.sweep.tiling import groups
from lmc_curvature.curvature.sweep.tree import BatchTree
from lmc_curvature.errors import SweepError
from lmc_curvature.objective.batches import Batch

# What the mean of rows may be off in any case, in roundings of one operation.
_ROUNDINGS = 30


def sweep_batch(
    problem: Problem, compiled: CompiledBatch, point: Point, batch: Batch, *, once: bool = False
) -> tuple[Callable[[], BatchValues], Tensor]:
    """Sweep one batch at one state; on a CUDA device the whole sweep is one graph from its second time on.

    The memory that a graph computes in stays taken, see `Replays`; while it is recorded, as much again is.

    Args:
        problem: The objective and the directions.
        compiled: The graphs for the batch's shape.
        point: The state.
        batch: The batch.
        once: There is no other batch of this shape, so nothing is recorded.

    Returns:
        A function that waits for the device and returns loss, slopes and curvature; and the graphs' result on the way,
        the network's output or the whole loss.

    Raises:
        CaptureError: An operation cannot be differentiated, or the tiles' outputs cannot be joined.
    """
    inputs = BatchTree.of((point.state, list(problem.directions), batch.data))

    def on(tensors: Sequence[Tensor]) -> tuple[list[Tensor], "_Parts"]:
        state, directions, data = inputs.rebuilt(tensors)
        # What is recorded holds nothing that was made elsewhere, such as a prelude.
        own = replace(problem, directions=directions)
        return _on_device(own, compiled, Point(state), replace(batch, data=data))

    # What autocast does is in the graph; what is computed from its values needs no rounding of its own.
    with (
        problem.objective.numerics.differentiating_operations(),
        torch.autocast(problem.objective.device.type, enabled=False),
    ):
        if problem.objective.replays.records and not once:
            (numbers, result), parts = problem.objective.replays(compiled, on, inputs.tensors)
        else:
            (numbers, result), parts = _on_device(problem, compiled, point, batch)
    return partial(_read, problem, numbers, parts), result


@dataclass(frozen=True, eq=False)
class _Parts:
    """What the numbers of a sweep are, end to end: the loss, and slopes and curvature of each group of directions.

    Attributes:
        groups: The directions of each group; every pair of directions is in one of them.
        curvature: The curvature of the prelude, along all directions, and of each group.
    """

    groups: list[list[int]]
    curvature: list[Contributions]

    @property
    def equal(self) -> list[tuple[Tensor, Tensor, Tensor, float]]:
        """Sums, after all other numbers, that were computed on two ways; see `Contributions`."""
        return [pair for contributions in self.curvature for pair in contributions.equal]


def _on_device(problem: Problem, compiled: CompiledBatch, point: Point, batch: Batch) -> tuple[list[Tensor], _Parts]:
    """All that the device computes, and does not wait for: the numbers and the result; and what the numbers are."""
    tiles = tiles_of(compiled, batch)
    preludes = _preludes(problem, compiled, point, tiles)
    values: dict[Tile, Values] = {}
    result = _result(compiled, tiles, preludes, values)
    loss, adjoint, push_loss = _loss_of(compiled.loss, result, batch)
    parts = _Parts(groups(len(problem.directions), compiled.tiling.directions), [Contributions()])
    parts.curvature.extend(Contributions() for _ in parts.groups)
    slopes = []
    found = _sweep_tiles(tiles, preludes, values, adjoint, parts)
    for group, tangents, contributions in zip(parts.groups, found, parts.curvature[1:], strict=True):
        of_loss = push_loss(tangents, contributions)
        slopes.append(torch.zeros_like(loss).expand(len(group)) if of_loss is None else of_loss.spread(group))
    flat = [tensor for contributions in parts.curvature for tensor in contributions.flat()]
    equal = [number.detach().reshape(1) for pair in parts.equal for number in pair[:3]]
    return [torch.cat([loss.reshape(1), *slopes, *flat, *equal]).double(), result], parts


def _read(problem: Problem, numbers: Tensor, parts: _Parts) -> BatchValues:
    """Loss, slopes and curvature along all directions: here the host waits for the device.

    Raises:
        SweepError: Two ways to a number disagree.
    """
    count = len(problem.directions)
    remaining = numbers.cpu().numpy()

    def take(size: int) -> np.ndarray:
        nonlocal remaining
        taken, remaining = np.split(remaining, [size])
        return taken

    slopes, curvature = np.empty(count), np.empty((count, count))
    loss = float(take(1)[0])
    for group in parts.groups:
        slopes[group] = take(len(group))
    of_prelude, *groupwise = (each.assemble(take(each.count), count) for each in parts.curvature)
    for group, of_group in zip(parts.groups, groupwise, strict=True):
        curvature[np.ix_(group, group)] = of_group[np.ix_(group, group)]
    for (found, whole, size), (*_, rounding) in zip(remaining.reshape(-1, 3), parts.equal, strict=True):
        rounding = max(rounding, problem.objective.rounding)
        # Each row is rounded as the outputs are that it was made of, however small it is.
        if not near("captured values", found, whole, rounding=rounding, scale=size, floor=_ROUNDINGS * rounding):
            raise SweepError(f"What follows the widest product is {found:.6g} in chunks of its rows, not {whole:.6g}.")
    return loss, slopes, curvature + of_prelude


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

    owner, preludes = point.memo("preludes", make)
    return preludes if owner is compiled else point.memo.replace("preludes", make())[1]


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


def _loss_of(
    program: Program | None, result: Tensor, batch: Batch
) -> tuple[Tensor, Tensor, Callable[[Stack | None, Contributions], Stack | None]]:
    """The loss of the joined results, their adjoint, and a function that pushes their tangents through the loss."""
    if program is None:
        return result, torch.ones_like(result), lambda tangents, _: tangents
    argument = program.argument
    assert argument is not None
    values = program.evaluate(program.constants, BatchTree.of((result, batch.data[1])))
    loss = values[program.result].detach()
    adjoints = adjoints_of(program.body, values, [torch.ones_like(loss)])

    def push_loss(tangents: Stack | None, contributions: Contributions) -> Stack | None:
        return push(program.body, values, {argument: tangents}, adjoints, contributions)[0]

    return loss, adjoints.get(argument, torch.zeros_like(result)), push_loss


def _sweep_tiles(
    tiles: Sequence[Tile],
    preludes: Mapping[Program, _Prelude],
    values: dict[Tile, Values],
    adjoint: Tensor,
    parts: _Parts,
) -> list[Stack | None]:
    """Sweep every tile, from the adjoint of the joined results; adds the curvature of all operations.

    Takes the tiles' values out of `values`, or computes them anew.

    Returns:
        The tangents of the result along each group of directions, those of the tiles joined.
    """
    found: list[list[Stack | None]] = [[] for _ in parts.groups]
    pulled: dict[Program, dict[fx.Node, Tensor]] = {}
    of_prelude, *groupwise = parts.curvature
    for tile in tiles:
        prelude, total = preludes[tile.program], pulled.setdefault(tile.program, {})
        # An output that was not cut may have other rows than examples: tokens, crops.
        part = adjoint[tile.start : tile.stop] if len(tiles) > 1 else adjoint
        at = values.pop(tile, None) or tile.program.evaluate(prelude.values, tile.data)
        adjoints = adjoints_of(tile.program.body, at, [part])
        for group, contributions, outputs in zip(parts.groups, groupwise, found, strict=True):
            operands = {
                node: stack.among(group)
                for node in tile.program.prelude.stage.outputs
                if (stack := prelude.tangents.get(node)) is not None and not set(group).isdisjoint(stack.directions)
            }
            outputs += push(tile.program.body, at, operands, adjoints, contributions)
        for node in tile.program.body.needs_adjoint:
            if node in adjoints:
                total[node] = total[node] + adjoints[node] if node in total else adjoints[node]
        # The next tile's are as large.
        del at, adjoints
    for program, total in pulled.items():
        plan, prelude = program.prelude, preludes[program]
        outer = adjoints_of(plan, prelude.values, [total.get(node) for node in plan.stage.outputs], keeps_graph=True)
        contract(plan, prelude.values, prelude.tangents, outer, of_prelude)
    return [_joined([stack for stack in stacks if stack is not None]) for stacks in found]


def _joined(stacks: Sequence[Stack]) -> Stack | None:
    """The tangents of all tiles' results as one stack: the same directions reach them all."""
    if len(stacks) < 2:
        return stacks[0] if stacks else None
    return Stack(stacks[0].directions, torch.cat([stack.tensors for stack in stacks], 1))
