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


def drop_unused(graph: fx.Graph) -> None:
    """Take out the nodes that nobody reads; they have no effect where every operation is functional."""
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)
