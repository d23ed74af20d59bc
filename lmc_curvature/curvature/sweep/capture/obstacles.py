"""Operations that a captured graph must not hold, and errors that name the line they come from."""

import functools
import linecache
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import jaxtyping
import torch
from torch import fx

from lmc_curvature import errors
from lmc_curvature.curvature.sweep.capture.nodes import dependents, line_of, value_of
from lmc_curvature.errors import CaptureError

aten = torch.ops.aten


def refuse_effects(graph: fx.Graph) -> None:
    """Refuse operations that change a tensor, and results whose shape depends on values; they matter though unread.

    Raises:
        CaptureError: Names the operation and its line.
    """
    _refuse(graph, _effect)


def refuse_obstacles(graph: fx.Graph) -> None:
    """Refuse operations that the rules of the sweep cannot follow.

    Raises:
        CaptureError: Names the operation and its line.
    """
    _refuse(graph, _obstacle)


def _refuse(graph: fx.Graph, reason_against: Callable[[fx.Node, set[fx.Node]], str]) -> None:
    dependent = dependents(graph.nodes, [node for node in graph.nodes if node.op == "placeholder"])
    for node in graph.nodes:
        reason = reason_against(node, dependent)
        if reason:
            raise CaptureError(f"The loss cannot be captured as a graph: {node.target} {reason}{line_of(node)}.")


def is_mutable(node: fx.Node) -> bool:
    """Whether an operation changes one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _effect(node: fx.Node, dependent: set[fx.Node]) -> str:
    if is_mutable(node):
        return "changes a tensor in place"
    if node in dependent and _is_number(node):
        return "hands a number out"
    if node in dependent and _is_sparse(node):
        return "has a sparse result, whose entries are as many as values say"
    return "has a result whose shape depends on values" if _shape_depends_on_values(node, dependent) else ""


def _is_number(node: fx.Node) -> bool:
    """Whether the result of an operation is a plain number, of which a graph knows that of its capture alone."""
    return not _results(node).isdisjoint({"int", "float", "bool"})


def _is_sparse(node: fx.Node) -> bool:
    """Whether the result of an operation is a tensor whose shape was not written down."""
    return "Tensor" in _results(node) and value_of(node) is None


def _results(node: fx.Node) -> set[str]:
    """The types of an operation's results."""
    return {str(result.type) for result in getattr(getattr(node.target, "_schema", None), "returns", ())}


def _obstacle(node: fx.Node, dependent: set[fx.Node]) -> str:
    is_strided = node.target is aten.as_strided.default
    return "depends on the layout of its argument in memory" if is_strided else ""


def _shape_depends_on_values(node: fx.Node, dependent: set[fx.Node]) -> bool:
    # The sizes of such a result were read during the capture, and may be anywhere in the graph as plain numbers.
    if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
        return False
    operands = node.all_input_nodes
    if node.target is aten.index.Tensor:
        operands = [operand for operand in operands[1:] if value_of(operand).dtype in (torch.bool, torch.uint8)]
    return any(operand in dependent for operand in operands)


def capture_error(error: BaseException) -> CaptureError:
    """The error that says why a function cannot be captured, and which of its lines is at fault."""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    found = next((frame for frame in frames if _is_foreign(frame.filename)), None)
    culprit = _description(found.filename, found.lineno or 0, found.name) if found is not None else ""
    return CaptureError(f"The loss cannot be captured as a graph: {_reason(error)}{culprit}")


def _reason(error: BaseException) -> str:
    text = str(error).strip()
    if "_local_scalar_dense" in text:
        return "a number is read off a tensor, as .item() and branches on values do"
    if "custom_function_call" in text or "setup_context" in text:
        return "an autograd.Function has derivatives of its own, which its operations do not tell"
    if "requires_grad_()" in text:
        return "autograd is called inside of it; what torch.func.grad differentiates can be captured"
    return text.splitlines()[0] if text else type(error).__name__


def calling_line() -> str:
    """The innermost line under way that is the network's or the loss's own; empty if there is none."""
    frame = sys._getframe(1)
    while frame is not None and not _is_foreign(frame.f_code.co_filename):
        frame = frame.f_back
    return _description(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name) if frame is not None else ""


@functools.cache
def _is_foreign(filename: str) -> bool:
    """Whether a file is neither torch's nor this package's (with its checks of annotations): the network's own."""
    homes = [Path(str(package.__file__)).parent for package in (torch, jaxtyping, errors)]
    path = Path(filename)
    return path.is_file() and not any(path.is_relative_to(home) for home in homes)


def _description(filename: str, number: int, name: str) -> str:
    return f" (at {Path(filename).name}:{number}, in {name}: {linecache.getline(filename, number).strip()})"
