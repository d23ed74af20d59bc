"""Values that objects hold: which can be compared, and whether two are equal; of functions, what they do."""

import dataclasses
import dis
import functools
import numbers
import types
from collections import deque
from collections.abc import Iterator, Mapping
from decimal import Decimal
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lmc_curvature.objective.network import equal

FUNCTIONS = (types.FunctionType, types.MethodType)
_VALUES = (bool, numbers.Number, Decimal, str, bytes, slice, range, type(None), torch.dtype, Tensor)
_SEQUENCES = (list, tuple, deque)
# How deep functions are followed into those that they call, and how many values of a sequence are compared one by one.
_DEPTH, _MOST = 3, 1000
OTHER = object()


def is_of_torch(defined: Any) -> bool:
    """Whether a class or a function is torch's."""
    return (defined.__module__ or "").partition(".")[0] == "torch"


def members(value: Any, *, private: bool = False) -> Iterator[tuple[str, Any]]:
    """What an object holds, with its place in it; attributes whose names begin with an underscore if `private`."""
    if isinstance(value, (nn.Module, type, types.ModuleType)):
        return
    if isinstance(value, functools.partial):
        value = {"func": value.func, **dict(enumerate(value.args)), **value.keywords}
    if isinstance(value, (Mapping, *_SEQUENCES)):
        for key, member in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield f"[{key!r}]", member
    fields = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else ()
    slots = [name for cls in type(value).__mro__ for name in _as_tuple(getattr(cls, "__slots__", ()))]
    for name in dict.fromkeys((*fields, *slots, *getattr(value, "__dict__", {}))):
        if not name.startswith("__" if private else "_"):
            yield f".{name}", getattr(value, name, None)


def _as_tuple(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def object_of(value: Any) -> Any:
    """The object that a method is of, unless that is a module, which is compared itself; anything else as it is."""
    is_of_object = isinstance(value, types.MethodType) and not isinstance(value.__self__, (nn.Module, type))
    return value.__self__ if is_of_object else value


class _Function(NamedTuple):
    """A function, as far as another one can be told from it."""

    name: str
    body: tuple[Any, ...] = ()


def comparable(value: Any) -> Any:
    """What of a value can be compared; `OTHER` if it is not understood."""
    if isinstance(value, Enum):
        return str(value)
    if isinstance(value, _VALUES):
        return value
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufc":
        return torch.as_tensor(value)
    if isinstance(value, (set, frozenset)):
        return comparable(sorted(value, key=repr))
    if isinstance(value, np.ndarray):
        return comparable(value.tolist())
    if isinstance(value, _SEQUENCES):
        if len(value) > _MOST:
            is_numeric = all(isinstance(part, (bool, int, float)) for part in value)
            return torch.tensor(list(value), dtype=torch.float64) if is_numeric else OTHER
        parts = tuple(map(comparable, value))
        return OTHER if any(part is OTHER for part in parts) else parts
    if isinstance(value, functools.partial):
        keywords = tuple(sorted(value.keywords.items()))
        return comparable((value.func, value.args, keywords))
    if object_of(value) is not value:
        return OTHER
    name = getattr(value, "__name__", None)
    return _Function(name, _body(value)) if isinstance(name, str) else OTHER


def _body(function: Any, depth: int = _DEPTH) -> tuple[Any, ...]:
    """The code of a function with the values and functions that it reads from outside."""
    code = getattr(function, "__code__", None)
    # Of one name torch has several functions that are the same.
    if not isinstance(code, types.CodeType) or is_of_torch(function) or not depth:
        return ()
    written, names = _code(code)
    named = (function.__kwdefaults__ or {}).values()
    outside = (function.__globals__.get(name) for name in sorted(names))
    held = [*map(contents, function.__closure__ or ()), *(function.__defaults__ or ()), *named, *outside]
    functions = (_body(value, depth - 1) for value in held if isinstance(value, types.FunctionType))
    return (written, *(value for value in held if isinstance(value, _VALUES)), *functions)


def _code(code: types.CodeType) -> tuple[tuple[Any, ...], frozenset[str]]:
    """What code does, with that of the functions in it, and the names that it reads from its module."""
    inner = [_code(part) for part in code.co_consts if isinstance(part, types.CodeType)]
    constants = [part for part in code.co_consts if not isinstance(part, types.CodeType)]
    own = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    names = frozenset(own).union(*(names for _, names in inner))
    return (code.co_code, code.co_names, *constants, *(written for written, _ in inner)), names


def contents(cell: types.CellType) -> Any:
    """What a function closes over in a cell; None if that is empty."""
    try:
        return cell.cell_contents
    except ValueError:
        # It is filled later, or never.
        return None


def equal_values(a: Any, b: Any) -> bool:
    """Whether two values that `comparable` gave are equal, tensors up to rounding."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype):
            return False
        return torch.equal(a.cpu(), b.cpu()) or (a.is_floating_point() and equal(a, b))
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(equal_values, a, b))
    return bool(a == b) or (a != a and b != b)


def shorten(value: Any) -> str:
    """A value that `comparable` gave, in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, _Function):
        return value.name
    shown = f"({', '.join(map(shorten, value))})" if isinstance(value, tuple) else str(value)
    return f"{shown[:57]}…" if len(shown) > 58 else shown
