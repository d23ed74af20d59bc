"""What a copy of a network still holds of the network: what a closure or a reference names is not copied."""

import functools
import inspect
import types
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lmc_curvature.objective.values import contents, members

_DEPTH = 5


def reached_from_copy(copied: nn.Module, network: nn.Module) -> str | None:
    """Where a copy of a network holds a module of that network: an attribute's or a hook's name; None if nowhere.

    Looked through are containers, objects, methods, partial functions, weak references, and what functions close over.
    """
    originals = {id(module) for module in network.modules()}
    for prefix, module in copied.named_modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules") and _holds(value, originals, _DEPTH):
                return f"{prefix}.{name}".lstrip(".")
    return None


def _holds(value: Any, originals: set[int], depth: int) -> bool:
    if isinstance(value, nn.Module) or not depth:
        return id(value) in originals
    return any(_holds(part, originals, depth - 1) for part in _parts(value))


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, types.MethodType):
        yield value.__self__
    elif isinstance(value, types.FunctionType):
        yield from map(contents, value.__closure__ or ())
        yield from value.__defaults__ or ()
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, weakref.ReferenceType):
        yield value()
    elif isinstance(value, (set, frozenset)):
        yield from value
    elif isinstance(value, (Mapping, list, tuple)) or hasattr(type(value), "__dict__"):
        yield from (part for _, part in members(value, private=True))
        closed = inspect.getattr_static(type(value), "__call__", None)
        if isinstance(closed, types.FunctionType):
            yield closed
