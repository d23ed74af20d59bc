"""Recording of a function of tensors as a graph of ATen operations without side effects."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functionalize
from torch.fx.traceback import preserve_node_meta, set_stack_trace
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lmc_curvature.curvature.sweep.capture.decompositions import DECOMPOSITIONS
from lmc_curvature.curvature.sweep.capture.nodes import depends, drop_unused
from lmc_curvature.curvature.sweep.capture.obstacles import (
    calling_line,
    capture_error,
    is_mutable,
    refuse_effects,
    refuse_obstacles,
)
from lmc_curvature.curvature.sweep.capture.replacements import Replacements

aten = torch.ops.aten


def record(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> fx.GraphModule:
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
        with _Watching(), _RefusingToLeave(), Replacements():
            return function(*tensors)

    try:
        with torch.enable_grad(), preserve_node_meta(), _as_if_compiling(), _recurrent_layers_in_parts():
            module = _functional_graph(watched, inputs)
            if any(is_mutable(node) for node in module.graph.nodes):
                # Composite operations (circular padding, recurrent layers) come apart too late the first time.
                module = _record_again(module, inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise capture_error(error) from error
    refuse_effects(module.graph)
    drop_unused(module.graph)
    refuse_obstacles(module.graph)
    return module


def _functional_graph(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> fx.GraphModule:
    # Imported here, because it takes as long as the rest of this package.
    from torch._guards import TracingContext, tracing
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    # Shapes are written down in this mode; without it, make_fx makes one for every value, which takes a third of the
    # time, because each mode formats the stack that it is made on.
    with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
        return make_fx(functionalize(function), decomposition_table=DECOMPOSITIONS)(*inputs)


def _record_again(module: fx.GraphModule, inputs: Sequence[Tensor]) -> fx.GraphModule:
    constants = {str(node.target): node for node in module.graph.nodes if node.op == "get_attr"}
    values = {name: getattr(module, name) for name in constants}

    def run(*tensors: Tensor) -> Tensor:
        given = dict(zip(constants, tensors[len(inputs) :], strict=True))
        return _GivenConstants(module, given).run(*tensors[: len(inputs)])

    # Constants are arguments for the time being: what is not an argument would still be changed in place.
    again = _functional_graph(run, [*inputs, *values.values()])
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
    """Writes into the graph what operations alone do not tell: what has no gradient, and which line called.

    Numbers of constants may be read off: a mask may be asked whether it is causal.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.data_dependent_output in func.tags and _are_constants([*args, *kwargs.values()]):
            return _value_of_constants(func, args, kwargs)
        set_stack_trace([calling_line()])
        result = func(*args, **kwargs)
        if torch.is_grad_enabled():
            return result
        return tree_map_only(Tensor, lambda value: aten.detach.default(value), result)


def _are_constants(arguments: Any) -> bool:
    """Whether none of some arguments depends on the inputs of the function that is being recorded."""
    from torch.fx.experimental.proxy_tensor import get_innermost_proxy_mode, get_proxy_slot

    mode = get_innermost_proxy_mode()
    assert mode is not None
    places = (get_proxy_slot(each, mode.tracer, None) for each in tree_leaves(arguments) if isinstance(each, Tensor))
    return not any(depends(place.proxy.node) for place in places if place is not None)


def _value_of_constants(func: Any, args: Any, kwargs: Any) -> Any:
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    with disable_proxy_modes_tracing():
        return func(*args, **kwargs)


class _RefusingToLeave(TorchFunctionMode):
    """Refuses to hand values out of torch: what is computed from them elsewhere would become a constant."""

    _WAYS_OUT = frozenset(
        {"numpy", "__array__", "tolist", "data_ptr", "__dlpack__", "__repr__", "apply_", "map_", "map2_"}
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self._WAYS_OUT:
            raise RuntimeError(f"Tensor.{name} hands values out of torch")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _as_if_compiling() -> Iterator[None]:
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
