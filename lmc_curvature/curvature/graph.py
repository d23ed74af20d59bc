"""Capture of a function of tensors as a graph of ATen operations, rewritten for the sweep.

Tracing runs the function once; what it does in place becomes functional, composite operations become their parts,
normalisation is written out, and scales and shifts per channel that follow a convolution move into its weight.
"""

import contextlib
import operator
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

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
    module = _trace(function, [*state, *data])
    graph = module.graph
    _make_functional(graph)
    _drop_what_is_unused(graph)
    _allow_any_layout(graph)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    given = placeholders[len(state) :]
    fold_channel_affine(graph, given)
    _drop_what_is_unused(graph)
    return _split(module, placeholders[: len(state)], given)


def _trace(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> fx.GraphModule:
    try:
        with torch.no_grad(), _recurrent_layers_in_parts():
            return make_fx(functionalize(function), decomposition_table=DECOMPOSITIONS)(
                *(tensor.detach() for tensor in inputs)
            )
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise CaptureError(f"The loss cannot be captured as a graph: {_reason(error)}{_culprit(error)}") from error


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
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _culprit(error: BaseException) -> str:
    """The last line outside torch and this package, which is the network's or the loss's own."""
    torch_home, own_home = Path(torch.__file__).parent, Path(__file__).parent.parent
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_file() and not path.is_relative_to(torch_home) and not path.is_relative_to(own_home):
            return f" (at {path.name}:{frame.lineno}, in {frame.name}: {frame.line})"
    return ""


def _drop_what_is_unused(graph: fx.Graph) -> None:
    # Every operation is functional here, so what nobody reads has no effect; assertions about values go, too.
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)


def _make_functional(graph: fx.Graph) -> None:
    """Replace what still changes a tensor in place, inside recurrent layers, by what returns a new one."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        schema = _schema(node)
        if schema is None or not schema.is_mutable:
            continue
        changed: Any = node.args[0]
        name, overload = schema.name.removeprefix("aten::"), schema.overload_name or "default"
        functional = getattr(getattr(aten, name.removesuffix("_"), None), overload, None)
        aliased = isinstance(changed, fx.Node) and any(
            order[user] > order[node] for source in _viewed_by(changed) for user in source.users
        )
        if functional is None or not name.endswith("_") or aliased:
            raise CaptureError(f"The loss cannot be captured as a graph: {name} changes a tensor in place.")
        node.target = functional
        changed.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: order[user] > order[node])


def _schema(node: fx.Node) -> Any:
    return getattr(node.target, "_schema", None)


def _viewed_by(node: fx.Node) -> Iterator[fx.Node]:
    """The tensors that a tensor shares its memory with by being a view of them."""
    while node.op == "call_function" and (
        node.target is operator.getitem or any(argument.alias_info is not None for argument in _schema(node).arguments)
    ):
        node = node.all_input_nodes[0]
        yield node


def _allow_any_layout(graph: fx.Graph) -> None:
    # A view depends on the strides that values had when they were traced; tangents may lie otherwise in memory.
    for node in graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
        elif node.target is aten.as_strided.default:
            raise CaptureError("The loss cannot be captured as a graph: it depends on strides (as_strided).")


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


# --- Decompositions: operations written as others whose structure the rules know


def _normalize(input: Tensor, axes: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean = input.mean(axes, keepdim=True)
    centered = input - mean
    rstd = torch.rsqrt((centered * centered).mean(axes, keepdim=True) + eps)
    return centered * rstd, mean, rstd


def _per_channel(parameter: Tensor, ndim: int) -> Tensor:
    return parameter.view(1, -1, *(1,) * (ndim - 2))


def _affine(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        input = input * weight
    return input if bias is None else input + bias


def _batch_statistics_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    axes = [axis for axis in range(input.ndim) if axis != 1]
    normalized, mean, rstd = _normalize(input, axes, eps)
    weight, bias = (None if each is None else _per_channel(each, input.ndim) for each in (weight, bias))
    return _affine(normalized, weight, bias), mean.flatten(), rstd.flatten()


def _native_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps):
    if not training:
        return NotImplemented
    return _batch_statistics_norm(input, weight, bias, eps)


def _native_batch_norm_no_stats(input, weight, bias, training, momentum, eps):
    return _batch_statistics_norm(input, weight, bias, eps)


def _cudnn_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps):
    if not training:
        return NotImplemented
    return (*_batch_statistics_norm(input, weight, bias, eps), input.new_empty(0, dtype=torch.uint8))


def _native_layer_norm(input, normalized_shape, weight, bias, eps):
    axes = list(range(input.ndim - len(normalized_shape), input.ndim))
    normalized, mean, rstd = _normalize(input, axes, eps)
    return _affine(normalized, weight, bias), mean, rstd


def _native_group_norm(input, weight, bias, examples, channels, positions, groups, eps):
    normalized, mean, rstd = _normalize(input.reshape(examples, groups, -1), [2], eps)
    weight, bias = (None if each is None else _per_channel(each, input.ndim) for each in (weight, bias))
    return _affine(normalized.reshape(input.shape), weight, bias), mean.flatten(1), rstd.flatten(1)


def _div(input, other):
    if isinstance(other, Tensor) and other.is_floating_point() and other.ndim:
        return input * torch.reciprocal(other)
    return NotImplemented


def _addcmul(input, first, second, *, value=1):
    product = first * second
    return input + (product if value == 1 else product * value)


def _mse_loss(input, target, reduction=1):
    error = input - target
    square = error * error
    return square if reduction == 0 else square.mean() if reduction == 1 else square.sum()


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.native_batch_norm.default: _native_batch_norm,
    aten._native_batch_norm_legit.default: _native_batch_norm,
    aten._native_batch_norm_legit.no_stats: _native_batch_norm_no_stats,
    aten.cudnn_batch_norm.default: _cudnn_batch_norm,
    aten.native_layer_norm.default: _native_layer_norm,
    aten.native_group_norm.default: _native_group_norm,
    aten.div.Tensor: _div,
    aten.addcmul.default: _addcmul,
    aten.mse_loss.default: _mse_loss,
}
