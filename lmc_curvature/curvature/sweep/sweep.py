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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from lmc_curvature.curvature.problem import BatchValues, Point, Problem
from lmc_curvature.curvature.sweep.compiled import CompiledBatch
from lmc_curvature.curvature.sweep.plan import Plan, naming
from lmc_curvature.curvature.sweep.program import Program
from lmc_curvature.curvature.sweep.rules import Contributions, OpCall, Stack, stacked, total, union
from lmc_curvature.curvature.sweep.tail import Tail
from lmc_curvature.curvature.sweep.tiles import Tile, joined, tiles_of
from lmc_curvature.curvature.sweep.tiling import groups
from lmc_curvature.curvature.sweep.tree import BatchTree
from lmc_curvature.errors import CaptureError
from lmc_curvature.objective.batches import Batch
from lmc_curvature.objective.memo import Memo

_Values = Mapping[fx.Node, Any]
_Tangents = Mapping[fx.Node, Stack | None]


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
    values: dict[Tile, _Values] = {}
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

    values: _Values
    tangents: _Tangents


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
    compiled: CompiledBatch, tiles: Sequence[Tile], preludes: Mapping[Program, _Prelude], values: dict[Tile, _Values]
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
    values: dict[Tile, _Values],
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
    values: dict[Tile, _Values],
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


# --- Along the operations of a plan


def adjoints_of(
    plan: Plan, values: Mapping[fx.Node, Any], outputs: Sequence[Tensor | None], *, keeps_graph: bool = False
) -> dict[fx.Node, Any]:
    """Adjoint of every nonlinear operation, and of the inputs that were asked for, from those of the outputs."""
    sources = [
        (values[node], adjoint)
        for node, adjoint in zip(plan.stage.outputs, outputs, strict=True)
        if adjoint is not None and values[node].requires_grad
    ]
    places = [(node, k, value) for node in (*plan.nonlinear, *plan.needs_adjoint) for k, value in _parts(values[node])]
    if not sources or not places:
        return {}
    tensors, seeds = zip(*sources, strict=True)
    try:
        found = torch.autograd.grad(
            tensors, [value for _, _, value in places], seeds, retain_graph=keeps_graph, allow_unused=True
        )
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise CaptureError(f"The loss cannot be swept backwards: {str(error).strip().splitlines()[0]}") from error
    adjoints: dict[fx.Node, Any] = {}
    for (node, k, _), adjoint in zip(places, found, strict=True):
        if isinstance(values[node], Tensor):
            adjoints[node] = adjoint
        else:
            adjoints.setdefault(node, [None] * len(values[node]))[k] = adjoint
    return {node: adjoint for node, adjoint in adjoints.items() if not _is_zero(adjoint)}


def push(
    plan: Plan,
    values: Mapping[fx.Node, Any],
    inputs: _Tangents,
    adjoints: Mapping[fx.Node, Any],
    contributions: Contributions,
) -> list[Stack | None]:
    """Tangents of the outputs; adds the curvature of every operation on the way, and forgets what is done with."""
    # Those of the inputs are needed for other tiles, too.
    tangents = {node: None if stack is None else replace(stack, is_own=False) for node, stack in inputs.items()}
    tail = plan.tail
    inside, after = (tail.nodes, tail.after) if tail is not None else (frozenset(), frozenset())
    kept = {*plan.stage.outputs, *(() if tail is None else (*tail.aligned, *tail.shared))}

    def push_through(nodes: Iterable[fx.Node]) -> None:
        for node in nodes:
            call = OpCall(node, values, tangents, adjoints.get(node), is_last=True)
            tangents[node] = _push_through(plan, call, contributions)
            for operand in node.all_input_nodes:
                if plan.last_reader[operand] is node and operand not in kept:
                    tangents.pop(operand, None)

    with torch.no_grad():
        push_through(node for node in plan.rules if node not in inside and node not in after)
        if tail is not None:
            tangents |= _push_rows(plan, tail, values, tangents, adjoints, contributions)
            push_through(node for node in plan.rules if node in after)
    return [tangents.get(node) for node in plan.stage.outputs]


def _push_rows(
    plan: Plan, tail: Tail, values: _Values, tangents: _Tangents, adjoints: _Values, contributions: Contributions
) -> dict[fx.Node, Stack | None]:
    """Tangents of a tail's exits, and the curvature on the way: chunk by chunk of its rows."""
    assert plan.rows is not None
    source, *_ = tail.aligned
    outer = dict(zip((*tail.aligned, *tail.shared), tail.stage.inputs, strict=True))
    moved = {new: stack for node, new in outer.items() if (stack := tangents.get(node)) is not None}
    aligned = {node: values[node].detach().flatten(0, axes - 1) for node, axes in tail.aligned.items()}
    shared = [values[node] for node in tail.shared]
    shares = [1 / (values[each][1] if isinstance(each, fx.Node) else each) for each in tail.exits.values()]
    seeds = [
        None if node not in adjoints else adjoints[node] * share for node, share in zip(tail.exits, shares, strict=True)
    ]
    totals: list[Stack | None] = [None for _ in shares]
    at_once = plan.rows_at_once(len(union(moved.values())))
    for start in range(0, tail.count, at_once):
        chosen = slice(start, min(start + at_once, tail.count))
        rows = chosen if tail.order is None else tail.order[chosen]
        chunk = {node: value[rows if node is source else chosen] for node, value in aligned.items()}
        with torch.enable_grad():
            at = plan.rows.run([*chunk.values(), *shared])
        of_rows = [
            None if seed is None else seed.expand(at[node].shape)
            for node, seed in zip(tail.stage.outputs, seeds, strict=True)
        ]
        along = dict(moved)
        if outer[source] in moved:
            stack = moved[outer[source]]
            along[outer[source]] = Stack(stack.directions, stack.tensors[:, rows])
        parts = push(plan.rows, at, along, adjoints_of(plan.rows, at, of_rows), contributions)
        for place, (part, share) in enumerate(zip(parts, shares, strict=True)):
            if part is not None:
                summed = Stack(part.directions, part.tensors.flatten(1).sum(1) * share)
                before = totals[place]
                totals[place] = summed if before is None else total([before, summed], ())
    return dict(zip(tail.exits, totals, strict=True))


def push_all(plan: Plan, values: Mapping[fx.Node, Any], inputs: _Tangents) -> dict[fx.Node, Stack | None]:
    """Tangents of every node, to be contracted later with `contract`."""
    tangents: dict[fx.Node, Stack | None] = dict(inputs)
    with torch.no_grad():
        for node in plan.rules:
            tangents[node] = _push_through(plan, OpCall(node, values, tangents), Contributions())
    return tangents


def contract(
    plan: Plan,
    values: Mapping[fx.Node, Any],
    tangents: _Tangents,
    adjoints: Mapping[fx.Node, Any],
    contributions: Contributions,
) -> None:
    """Add the curvature of every operation, given the tangents of `push_all`."""
    with torch.no_grad():
        for node in plan.nonlinear:
            call = OpCall(node, values, tangents, adjoints.get(node))
            if call.adjoint is not None and call.directions():
                with naming(node):
                    plan.rules[node].contract(call, contributions)


def _push_through(plan: Plan, call: OpCall, contributions: Contributions) -> Stack | None:
    """Tangents of one operation; adds its curvature where its adjoint is known."""
    if not call.directions():
        return None
    with naming(call.node):
        return plan.rules[call.node].sweep(call, contributions)


def _parts(value: Any) -> list[tuple[int, Tensor]]:
    parts = [value] if isinstance(value, Tensor) else value
    return [(k, part) for k, part in enumerate(parts) if isinstance(part, Tensor) and part.requires_grad]


def _is_zero(adjoint: Any) -> bool:
    return adjoint is None or (isinstance(adjoint, list) and all(part is None for part in adjoint))
