"""Capture of a function of tensors as a graph of ATen operations, rewritten for the sweep.

Tracing runs the function once; what it does in place becomes functional, composite operations become their parts,
normalisation is written out, and scales and shifts per channel that follow a convolution move into its weight.
"""

import contextlib
import linecache
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from lmc_curvature.curvature.decompositions import DECOMPOSITIONS
from lmc_curvature.errors import CaptureError

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Stage:
    """A part of a captured graph: operations that turn inputs into outputs.

    Attributes:
        module: The captured graph, which holds its constants.
        inputs: Nodes whose values are given: placeholders, or results of an earlier stage.
        operations: Nodes to evaluate, in order.
        outputs: Nodes whose values a later stage needs; an input may be among them.
    """

    module: fx.GraphModule
    inputs: tuple[fx.Node, ...]
    operations: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]

    def constant(self, node: fx.Node) -> Any:
        """Value of a node that reads a constant of the graph."""
        return getattr(self.module, str(node.target))


def capture(function: Callable[..., Tensor], state: Sequence[Tensor], data: Sequence[Tensor]) -> tuple[Stage, Stage]:
    """Trace `function(*state, *data)` and split it into what the state alone decides, and the rest.

    Args:
        function: Returns one tensor.
        state: Example values of the first arguments.
        data: Example values of the others; the graph holds for their shapes.

    Returns:
        The stage from the state to the operands of the network (folded weights, say), and the stage from those and
        the data to the result. Both list their inputs in the order given, the second one operands first.

    Raises:
        CaptureError: The function does something that depends on values, not only on shapes; says what and where.
    """
    module = _trace(function, [tensor.detach() for tensor in (*state, *data)])
    graph = module.graph
    _drop_what_is_unused(graph)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    given = placeholders[len(state) :]
    _refuse_what_cannot_be_replayed(graph, placeholders)
    _allow_any_layout(graph)
    fold_channel_affine(graph, given)
    _drop_what_is_unused(graph)
    return _split(module, placeholders[: len(state)], given)


def _trace(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> fx.GraphModule:
    def watched(*tensors: Tensor) -> Tensor:
        with _DetachingWhatHasNoGraph():
            return function(*tensors)

    try:
        with torch.enable_grad(), _recurrent_layers_in_parts():
            module = _functional(watched, inputs)
            if any(_is_mutable(node) for node in module.graph.nodes):
                # Parts of composite operations (circular padding, recurrent layers) escape the first time.
                with preserve_node_meta():
                    module = _functional(fx.Interpreter(module).run, inputs)
            return module
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise CaptureError(f"The loss cannot be captured as a graph: {_reason(error)}{_culprit(error)}") from error


def _functional(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> fx.GraphModule:
    traced = make_fx(functionalize(function), decomposition_table=DECOMPOSITIONS, record_stack_traces=True)
    return traced(*inputs)


class _DetachingWhatHasNoGraph(TorchDispatchMode):
    """Writes `torch.no_grad()` into the graph, which knows only operations: as `detach`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.is_grad_enabled():
            return result
        return tree_map_only(Tensor, lambda value: aten.detach.default(value), result)


@contextlib.contextmanager
def _recurrent_layers_in_parts() -> Iterator[None]:
    # oneDNN's recurrent layers are one operation each, without a second derivative.
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def _reason(error: BaseException) -> str:
    text = str(error).strip()
    if "_local_scalar_dense" in text:
        return "a number is read off a tensor, as .item() and branches on values do."
    if "custom_function_call" in text or "setup_context" in text:
        return "an autograd.Function has derivatives of its own, which its operations do not tell."
    return text.splitlines()[0] if text else type(error).__name__


def _culprit(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return _innermost_line((frame.filename, frame.lineno, frame.name) for frame in frames)


def line_of(node: fx.Node) -> str:
    """Where the network or the loss called an operation, to end an error message with; empty if that is not known."""
    found = re.findall(r'^ *File "(.+)", line (\d+), in (.+)$', node.stack_trace or "", re.MULTILINE)
    return _innermost_line((filename, int(number), name) for filename, number, name in found)


def _innermost_line(frames: Iterable[tuple[str, int | None, str]]) -> str:
    """The last line outside torch and this package, which is the network's or the loss's own."""
    torch_home, own_home = Path(torch.__file__).parent, Path(__file__).parent.parent
    for filename, number, name in reversed(list(frames)):
        path = Path(filename)
        if path.is_file() and not path.is_relative_to(torch_home) and not path.is_relative_to(own_home):
            return f" (at {path.name}:{number}, in {name}: {linecache.getline(filename, number or 0).strip()})"
    return ""


def _drop_what_is_unused(graph: fx.Graph) -> None:
    # Every operation is functional here, so what nobody reads has no effect; assertions about values go, too.
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)


def _is_mutable(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _refuse_what_cannot_be_replayed(graph: fx.Graph, inputs: Iterable[fx.Node]) -> None:
    dependent = dependents(graph.nodes, inputs)
    for node in graph.nodes:
        reason = ""
        if _is_mutable(node):
            reason = "changes a tensor in place"
        elif node.target is aten.as_strided.default:
            reason = "depends on strides, which tangents may have others of"
        elif node in dependent and _is_complex(value_of(node)):
            reason = "computes with complex numbers"
        elif _shape_depends_on_values(node, dependent):
            reason = "has a result whose shape depends on values"
        if reason:
            raise CaptureError(f"The loss cannot be captured as a graph: {node.target} {reason}{line_of(node)}.")


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


def _refuse_shapes_from_values(graph: fx.Graph) -> None:
    # The sizes seen while tracing may have become numbers in the graph, and would be wrong for another batch.
    for node in graph.nodes:
        dynamic = torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ())
        if node.target is aten.index.Tensor:
            indices = [index for index in node.args[1] if index is not None]
            dynamic = any(value_of(index).dtype in (torch.bool, torch.uint8) for index in indices)
        if dynamic:
            raise CaptureError(
                f"The loss cannot be captured as a graph: the shape of what {node.target} returns depends on values. "
                "Weigh by a mask instead of selecting with it."
            )


def _allow_any_layout(graph: fx.Graph) -> None:
    # A view depends on the strides that values had when they were traced; tangents may lie otherwise in memory.
    for node in graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default


def _split(module: fx.GraphModule, state: list[fx.Node], data: list[fx.Node]) -> tuple[Stage, Stage]:
    dependent = dependents(module.graph.nodes, data)
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    operations = [node for node in module.graph.nodes if node.op in ("call_function", "get_attr")]
    first = [node for node in operations if node not in dependent]
    second = [node for node in operations if node in dependent]
    result = output.args[0]
    assert isinstance(result, fx.Node)
    read = {operand for node in second for operand in node.all_input_nodes} | {result}
    operands = tuple(node for node in (*state, *first) if node in read)
    return (
        Stage(module, tuple(state), tuple(first), operands),
        Stage(module, (*operands, *data), tuple(second), (result,)),
    )


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


# --- Folding


def fold_channel_affine(graph: fx.Graph, data: Sequence[fx.Node]) -> None:
    """Move scales and shifts per channel that follow a convolution into its weight and bias.

        conv(x, w, b) · s + t  =  conv(x, w · s, b · s + t)

    This is what normalisation by running statistics comes to; a pass over the activations less for every tangent.
    It changes no derivative: the product w · s is an operation of the state like any other.
    """
    dependent = dependents(graph.nodes, data)
    for node in list(graph.nodes):
        if node.target is aten.mul.Tensor or (node.target is aten.add.Tensor and not node.kwargs):
            convolution, operand = _convolution_and_operand(node, dependent)
            if convolution is not None and operand is not None:
                kind = "scale" if node.target is aten.mul.Tensor else "shift"
                dependent.add(_fold(graph, node, convolution, **{kind: operand}))


def _convolution_and_operand(node: fx.Node, dependent: set[fx.Node]) -> tuple[fx.Node | None, fx.Node | None]:
    for convolution, operand in (node.args, reversed(node.args)):
        if not (isinstance(convolution, fx.Node) and isinstance(operand, fx.Node)):
            continue
        if (
            convolution.target is aten.convolution.default
            and convolution in dependent
            and len(convolution.users) == 1
            and not convolution.args[6]
            and convolution.args[1] not in dependent
            and operand not in dependent
            and _is_per_channel(operand, convolution)
        ):
            return convolution, operand
    return None, None


def _is_per_channel(operand: fx.Node, convolution: fx.Node) -> bool:
    shape, full = tuple(value_of(operand).shape), tuple(value_of(convolution).shape)
    return shape == (1, full[1]) + (1,) * (len(full) - 2)


def _fold(
    graph: fx.Graph,
    node: fx.Node,
    convolution: fx.Node,
    *,
    scale: fx.Node | None = None,
    shift: fx.Node | None = None,
) -> fx.Node:
    input, weight, bias, *settings = cast(tuple[Any, ...], convolution.args)
    channels = value_of(convolution).shape[1]
    with graph.inserting_before(node):
        if scale is not None:
            weight = _call(
                graph, aten.mul.Tensor, weight, _view(graph, scale, (-1,) + (1,) * (value_of(weight).ndim - 1))
            )
            if bias is not None:
                bias = _call(graph, aten.mul.Tensor, bias, _view(graph, scale, (channels,)))
        if shift is not None:
            shift = _view(graph, shift, (channels,))
            bias = shift if bias is None else _call(graph, aten.add.Tensor, bias, shift)
        folded = _call(graph, aten.convolution.default, input, weight, bias, *settings)
    node.replace_all_uses_with(folded)
    graph.erase_node(node)
    graph.erase_node(convolution)
    return folded


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta["val"] = target(*(_shape_alone(each) if isinstance(each, fx.Node) else each for each in args))
    return node


def _shape_alone(node: fx.Node) -> Tensor:
    value = value_of(node)
    return torch.empty(tuple(value.shape), dtype=value.dtype, device="meta")


def _view(graph: fx.Graph, node: fx.Node, shape: tuple[int, ...]) -> fx.Node:
    return _call(graph, aten.reshape.default, node, list(shape))
