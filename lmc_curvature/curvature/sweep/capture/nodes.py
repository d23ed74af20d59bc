"""Nodes of a captured graph: their values, what depends on them, and the lines that called them."""

from collections.abc import Iterable
from typing import Any

from torch import fx


def value_of(node: fx.Node) -> Any:
    """The value that a node had when it was captured, without data: its shape and type."""
    return node.meta.get("val")


def line_of(node: fx.Node) -> str:
    """The line of the network or the loss that called an operation, to end an error message with; empty if unknown."""
    return node.stack_trace or ""


def dependents(nodes: Iterable[fx.Node], sources: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes among `nodes` (in order) whose value depends on any of `sources`, those included."""
    found = set(sources)
    for node in nodes:
        if any(operand in found for operand in node.all_input_nodes):
            found.add(node)
    return found


def depends(node: fx.Node) -> bool:
    """Whether the value of a node depends on an input of its graph."""
    seen, remaining = set(), [node]
    while remaining:
        node = remaining.pop()
        if node.op == "placeholder":
            return True
        if node not in seen:
            seen.add(node)
            remaining += node.all_input_nodes
    return False


def drop_unused(graph: fx.Graph) -> None:
    """Take out the nodes that nobody reads; they have no effect where every operation is functional.

    Operations that are not torch's own stay: the shape of their result may depend on values, and have been read.
    """
    for node in reversed(list(graph.nodes)):
        is_own = getattr(node.target, "namespace", "aten") in ("aten", "prims", "prim")
        if node.op in ("call_function", "get_attr") and is_own and not node.users:
            graph.erase_node(node)
