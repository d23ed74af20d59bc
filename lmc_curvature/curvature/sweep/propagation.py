"""Adjoints backwards and tangents forwards through the operations of a plan, and the curvature where they meet."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from lmc_curvature.curvature.sweep.capture import value_of
from lmc_curvature.curvature.sweep.plan import Plan, naming
from lmc_curvature.curvature.sweep.rules import Contributions, OpCall, Stack, total, union
from lmc_curvature.curvature.sweep.tail import Tail
from lmc_curvature.errors import CaptureError

Values = Mapping[fx.Node, Any]
Tangents = Mapping[fx.Node, Stack | None]


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
    inputs: Tangents,
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
    plan: Plan, tail: Tail, values: Values, tangents: Tangents, adjoints: Values, contributions: Contributions
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
    sums: list[Any] = [0 for _ in shares]
    sizes = list(sums)
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
        found = [at[node].detach().double() for node in tail.stage.outputs]
        sums = [before + each.sum() for before, each in zip(sums, found, strict=True)]
        sizes = [before + each.abs().sum() for before, each in zip(sizes, found, strict=True)]
        parts = push(plan.rows, at, along, adjoints_of(plan.rows, at, of_rows), contributions)
        for place, (part, share) in enumerate(zip(parts, shares, strict=True)):
            if part is not None:
                summed = Stack(part.directions, part.tensors.flatten(1).sum(1) * share)
                before = totals[place]
                totals[place] = summed if before is None else total([before, summed], ())
    # Losses may compute in a coarser type than the network.
    types = {value_of(node).dtype for node in tail.stage.operations if isinstance(value_of(node), Tensor)}
    rounding = max(torch.finfo(each).eps for each in types if each.is_floating_point)
    contributions.equal += [
        (each * share, values[node], size * abs(share), rounding)
        for each, size, share, node in zip(sums, sizes, shares, tail.exits, strict=True)
    ]
    return dict(zip(tail.exits, totals, strict=True))


def push_all(plan: Plan, values: Mapping[fx.Node, Any], inputs: Tangents) -> dict[fx.Node, Stack | None]:
    """Tangents of every node, to be contracted later with `contract`."""
    tangents: dict[fx.Node, Stack | None] = dict(inputs)
    with torch.no_grad():
        for node in plan.rules:
            tangents[node] = _push_through(plan, OpCall(node, values, tangents), Contributions())
    return tangents


def contract(
    plan: Plan,
    values: Mapping[fx.Node, Any],
    tangents: Tangents,
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
