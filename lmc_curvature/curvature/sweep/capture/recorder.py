"""Tracing of a function of tensors into a graph of ATen operations without side effects."""

import contextlib
import functools
import linecache
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jaxtyping
import torch
from torch import Tensor, fx
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta, set_stack_trace
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from lmc_curvature import errors
from lmc_curvature.curvature.sweep.capture.decompositions import DECOMPOSITIONS
from lmc_curvature.errors import CaptureError

aten = torch.ops.aten


def trace(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> fx.GraphModule:
    """Run a function once, and write down the operations that it calls.

    Args:
        function: Returns one tensor.
        inputs: Example values of its arguments; the graph holds for their shapes.

    Returns:
        The graph. None of its operations changes a tensor, and what torch would differentiate as a constant
        (`torch.no_grad`) is detached.

    Raises:
        CaptureError: The function does something that depends on values, not only on shapes, or that the rules of
            the sweep cannot follow; says what and where.
    """

    def watched(*tensors: Tensor) -> Tensor:
        with _Watching(), _RefusingToLeave():
            return function(*tensors)

    try:
        with torch.enable_grad(), preserve_node_meta(), _announced(), _recurrent_layers_in_parts():
            module = _functional(watched, inputs)
            if any(_is_mutable(node) for node in module.graph.nodes):
                # Composite operations (circular padding, recurrent layers) come apart too late the first time.
                module = _traced_again(module, inputs)
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise CaptureError(f"The loss cannot be captured as a graph: {_reason(error)}{_culprit(error)}") from error
    # What has an effect, and what had its shape read, matter although nobody reads the result.
    _refuse(module.graph, _effect)
    drop_unused(module.graph)
    _refuse(module.graph, _obstacle)
    return module


def _functional(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> fx.GraphModule:
    return make_fx(functionalize(function), decomposition_table=DECOMPOSITIONS)(*inputs)


def _traced_again(module: fx.GraphModule, inputs: Sequence[Tensor]) -> fx.GraphModule:
    constants = {str(node.target): node for node in module.graph.nodes if node.op == "get_attr"}
    values = {name: getattr(module, name) for name in constants}

    def run(*tensors: Tensor) -> Tensor:
        given = dict(zip(constants, tensors[len(inputs) :], strict=True))
        return _GivenConstants(module, given).run(*tensors[: len(inputs)])

    # Constants are arguments for the time being: what is not an argument would still be changed in place.
    again = _functional(run, [*inputs, *values.values()])
    placeholders = [node for node in again.graph.nodes if node.op == "placeholder"]
    for (name, value), placeholder in zip(values.items(), placeholders[len(inputs) :], strict=True):
        again.register_buffer(f"given{name}", value.detach())
        with again.graph.inserting_before(placeholder):
            constant = again.graph.get_attr(f"given{name}")
        constant.meta = dict(placeholder.meta)
        placeholder.replace_all_uses_with(constant)
        again.graph.erase_node(placeholder)
    return again


class _GivenConstants(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, constants: dict[str, Tensor]):
        super().__init__(module)
        self._constants = constants

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Tensor:
        return self._constants[str(target)]


class _Watching(TorchDispatchMode):
    """Writes into the graph what operations alone do not tell: what has no gradient, and which line called."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        set_stack_trace([_calling_line()])
        result = func(*args, **(kwargs or {}))
        if torch.is_grad_enabled():
            return result
        return tree_map_only(Tensor, lambda value: aten.detach.default(value), result)


class _RefusingToLeave(TorchFunctionMode):
    """Refuses to hand values out of torch: what is computed from them elsewhere would become a constant."""

    _WAYS_OUT = frozenset({"numpy", "__array__", "tolist", "data_ptr", "__dlpack__"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self._WAYS_OUT:
            raise RuntimeError(f"Tensor.{name} hands values out of torch")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _announced() -> Iterator[None]:
    # What branches on values to save work (a mask without padding, say) asks torch.compiler whether it may.
    compiler: Any = torch.compiler
    before = compiler._is_compiling_flag
    compiler._is_compiling_flag = True
    try:
        yield
    finally:
        compiler._is_compiling_flag = before


@contextlib.contextmanager
def _recurrent_layers_in_parts() -> Iterator[None]:
    # oneDNN's recurrent layers are one operation each, without a second derivative.
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def drop_unused(graph: fx.Graph) -> None:
    """Take out what nobody reads; it has no effect where every operation is functional."""
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)


def dependents(nodes: Iterable[fx.Node], sources: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes among `nodes` (in order) whose value depends on any of `sources`, those included."""
    found = set(sources)
    for node in nodes:
        if any(operand in found for operand in node.all_input_nodes):
            found.add(node)
    return found


def value_of(node: fx.Node) -> Any:
    """The value that a node had when it was traced, without data: its shape and type."""
    return node.meta.get("val")


# --- What is refused


def _is_mutable(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _refuse(graph: fx.Graph, reason_against: Callable[[fx.Node, set[fx.Node]], str]) -> None:
    dependent = dependents(graph.nodes, [node for node in graph.nodes if node.op == "placeholder"])
    for node in graph.nodes:
        reason = reason_against(node, dependent)
        if reason:
            raise CaptureError(f"The loss cannot be captured as a graph: {node.target} {reason}{line_of(node)}.")


def _effect(node: fx.Node, dependent: set[fx.Node]) -> str:
    if _is_mutable(node):
        return "changes a tensor in place"
    return "has a result whose shape depends on values" if _shape_depends_on_values(node, dependent) else ""


def _obstacle(node: fx.Node, dependent: set[fx.Node]) -> str:
    if node.target is aten.as_strided.default:
        return "depends on the layout of its argument in memory"
    return "computes with complex numbers" if node in dependent and _is_complex(value_of(node)) else ""


def _is_complex(value: Any) -> bool:
    parts = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(part, Tensor) and part.is_complex() for part in parts)


def _shape_depends_on_values(node: fx.Node, dependent: set[fx.Node]) -> bool:
    # The sizes of such a result were read while tracing, and may be anywhere in the graph as plain numbers.
    if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
        return False
    operands = node.all_input_nodes
    if node.target is aten.index.Tensor:
        operands = [operand for operand in operands[1:] if value_of(operand).dtype in (torch.bool, torch.uint8)]
    return any(operand in dependent for operand in operands)


# --- Whose fault it is


def line_of(node: fx.Node) -> str:
    """Where the network or the loss called an operation, to end an error message with; empty if that is not known."""
    return node.stack_trace or ""


def _reason(error: BaseException) -> str:
    text = str(error).strip()
    if "_local_scalar_dense" in text:
        return "a number is read off a tensor, as .item() and branches on values do"
    if "custom_function_call" in text or "setup_context" in text:
        return "an autograd.Function has derivatives of its own, which its operations do not tell"
    return text.splitlines()[0] if text else type(error).__name__


def _culprit(error: BaseException) -> str:
    frames = reversed(traceback.extract_tb(error.__traceback__))
    found = next((frame for frame in frames if _is_foreign(frame.filename)), None)
    return _described(found.filename, found.lineno or 0, found.name) if found is not None else ""


def _calling_line() -> str:
    frame = sys._getframe(1)
    while frame is not None and not _is_foreign(frame.f_code.co_filename):
        frame = frame.f_back
    return _described(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name) if frame is not None else ""


@functools.cache
def _is_foreign(filename: str) -> bool:
    """Whether a file is neither torch's nor this package's (with its checks of annotations): the network's own."""
    homes = [Path(str(package.__file__)).parent for package in (torch, jaxtyping, errors)]
    path = Path(filename)
    return path.is_file() and not any(path.is_relative_to(home) for home in homes)


def _described(filename: str, number: int, name: str) -> str:
    return f" (at {Path(filename).name}:{number}, in {name}: {linecache.getline(filename, number).strip()})"
