"""Settings of a network's modules: what they hold besides entries and children, and what of it evaluation reads."""

import dis
import functools
import inspect
import itertools
import re
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from lmc_curvature.objective.values import (
    FUNCTIONS,
    OTHER,
    comparable,
    equal_values,
    is_of_torch,
    members,
    object_of,
    shorten,
)

_ITSELF = "(the network itself)"


class Difference(NamedTuple):
    """A setting in which two networks differ.

    Attributes:
        where: Its name: that of the module, and of the attribute in it.
        values: What it is in model_a and in model_b, in a few words.
        kinds: Whether the modules are of two kinds, and have no attributes that could be compared.
        tensors: Whether it is a tensor in one of them.
    """

    where: str
    values: tuple[str, str]
    kinds: bool = False
    tensors: bool = False

    def __str__(self) -> str:
        """A line that says both values."""
        a, b = self.values
        described = f"{a} in model_a, {b} in model_b" if a != b else "its values differ"
        return f"{'module ' if self.kinds else ''}{self.where}: {described}"


def setting_differences(first: nn.Module, second: nn.Module) -> list[Difference]:
    """Settings in which the modules of two networks differ, besides their entries.

    Compared are classes, public attributes that are plain values, functions or tensors, or that hold such (dicts,
    dataclasses, configurations), and what modules keep in a state dict besides tensors, such as the weights of
    quantised layers. Left out is what evaluation does not use.
    """
    modules_a, modules_b = dict(first.named_modules()), dict(second.named_modules())
    found: list[Difference] = []
    # One configuration may be held by every module.
    seen: set[tuple[int, int]] = set()
    for name in {**modules_a, **modules_b}:
        a, b = modules_a.get(name), modules_b.get(name)
        # By name: a notebook that runs a cell again has two classes of one name.
        alike = a is not None and b is not None and type(a).__qualname__ == type(b).__qualname__
        if a is not None and b is not None and (alike or type(a).forward is type(b).forward):
            prefix = f"{name}." if name else ""
            found += _attribute_differences(prefix, a, b, seen)
            found += _class_differences(prefix, type(a), type(b)) if alike else ()
        if not alike and not all(isinstance(module, (_DropoutNd, nn.Identity, type(None))) for module in (a, b)):
            kinds = ["nothing" if module is None else type(module).__qualname__ for module in (a, b)]
            found.append(Difference(name or _ITSELF, (kinds[0], kinds[1]), kinds=True))
    return found


def hidden_differences(
    first: nn.Module, second: nn.Module, loss_fn: Any = None, *, kept: bool = False
) -> list[Difference]:
    """Those differences in settings that may matter for other data, although on some data nothing is seen of them.

    They are in attributes that the code of `forward` reads and does not write, and between classes of innermost modules
    that compute otherwise.

    Args:
        first: A network.
        second: Another one.
        loss_fn: The loss; a `BatchLoss` may call other methods than `forward`.
        kept: Also tensors that `forward` reads before it writes them: it may have computed them from the entries.
    """
    found = setting_differences(first, second)
    if not found:
        return []
    reads, writes, kept_first = _names_in_evaluation([first, second], loss_fn)
    modules = dict(first.named_modules()), dict(second.named_modules())

    def matters(difference: Difference) -> bool:
        if not difference.kinds:
            attribute = re.sub(r"\[.*?\]", "", difference.where).rpartition(".")[2]
            return attribute in reads - writes or (kept and difference.tensors and attribute in kept_first)
        pair = [m.get("" if difference.where == _ITSELF else difference.where) for m in modules]
        innermost = not any(True for module in pair if module is not None for _ in module.children())
        # A class may have another name and the same function, as subclasses often have.
        kinds = [None if module is None else type(module) for module in pair]
        names = [name for name in reads if not name.startswith("__")] if innermost else ["forward"]
        methods = [[getattr(kind, name, None) for name in names] for kind in kinds]
        if innermost or None in pair:
            return innermost and any(a is not b for a, b in zip(*methods, strict=True))
        # Lists of modules are iterated over, and never called.
        is_called = all(method is not nn.Module.forward for (method,) in methods)
        return is_called and not equal_values(*map(comparable, methods))

    return [difference for difference in found if matters(difference)]


_HARMLESS = {"training", "inplace", "momentum", "name", "use_cache", "memory_efficient", "fused_attn"}
_HARMLESS |= {"use_checkpoint", "gradient_checkpointing", "grad_checkpointing"}
_OF_GRADIENTS = {"padding_idx", "scale_grad_by_freq", "sparse"}


def _is_harmless(module: nn.Module, name: str, value: Any) -> bool:
    """Whether evaluation computes the same whatever the value of an attribute."""
    if name in _HARMLESS or "attn_implementation" in name:
        return True
    if isinstance(module, nn.Embedding) and name in _OF_GRADIENTS:
        return True
    # Rates of dropout have many names: drop_prob, attention_dropout, stochastic_depth_prob, …
    kind = "dropout" if isinstance(module, _DropoutNd) else type(module).__name__.lower()
    rate = re.search("drop|stochastic", f"{kind}.{name}" if name == "p" else name)
    return rate is not None and not isinstance(value, (str, bool))


def _attribute_differences(prefix: str, a: nn.Module, b: nn.Module, seen: set[tuple[int, int]]) -> Iterator[Difference]:
    held_a, held_b = _held(a), _held(b)
    for attribute in {**held_a, **held_b}:
        pair = held_a.get(attribute), held_b.get(attribute)
        key = id(pair[0]), id(pair[1])
        if comparable(pair[0]) is OTHER and comparable(pair[1]) is OTHER:
            if key in seen:
                continue
            seen.add(key)
        settings_a, settings_b = (dict(_settings(attribute, value)) for value in pair)
        for name in {**settings_a, **settings_b}:
            values = settings_a.get(name), settings_b.get(name)
            harmless = all(_is_harmless(a, re.findall(r"\w+", name)[-1], value) for value in values)
            if not harmless and not equal_values(*values):
                tensors = any(isinstance(value, Tensor) for value in values)
                yield Difference(f"{prefix}{name}", (shorten(values[0]), shorten(values[1])), tensors=tensors)


def _class_differences(prefix: str, a: type, b: type) -> Iterator[Difference]:
    """Methods and values in which two classes of one name differ, such as those of a cell that was edited."""
    for name in {**vars(a), **vars(b)} if a is not b else ():
        values = comparable(vars(a).get(name)), comparable(vars(b).get(name))
        if not name.startswith("__") and OTHER not in values and not equal_values(*values):
            yield Difference(f"{prefix}{name}", (shorten(values[0]), shorten(values[1])))


def _held(module: nn.Module) -> dict[str, Any]:
    """Name to value of what a module itself holds besides its entries and its children."""
    own = not is_of_torch(type(module))
    base = vars(nn.Module())
    # Private attributes of torch's modules are made of the public ones.
    found = {name: value for name, value in vars(module).items() if name not in base and (own or name[0] != "_")}
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    # What torch's own keep, as for pruning, is bookkeeping.
    if kept_hooks := [hook for hook in hooks if not is_of_torch(type(hook)) or isinstance(hook, FUNCTIONS)]:
        found[_HOOKS] = kept_hooks
    kept: dict[str, Any] = {}
    module._save_to_state_dict(kept, "", True)
    entries = {*module._parameters, *module._buffers}
    return found | {name: value for name, value in kept.items() if name not in entries}


_HOOKS = "hook"
_DEPTH, _MOST = 3, 1000


def _settings(name: str, value: Any, depth: int = _DEPTH) -> Iterator[tuple[str, Any]]:
    """Names and values of what can be compared in an attribute: itself, or what an object holds, each by its place."""
    value_itself = comparable(value)
    if value_itself is not OTHER:
        yield name, value_itself
        return
    value = object_of(value)
    if callable(value):
        yield name, type(value).__name__
    for place, member in itertools.islice(members(value, private=callable(value)), _MOST) if depth else ():
        yield from _settings(f"{name}{place}", member, depth - 1)


def _names_in_evaluation(networks: Iterable[nn.Module], loss_fn: Any) -> tuple[set[str], set[str], set[str]]:
    """Names that code reads, and attributes that it writes or first reads, as far as `forward` may call that code."""
    classes = {cls for network in networks for module in network.modules() for cls in type(module).__mro__}
    callables = [each for network in networks for module in network.modules() for each in _callables(_held(module))]
    classes |= {cls for each in callables for cls in type(object_of(each)).__mro__}
    methods: dict[str, list[Any]] = {}
    for cls in classes - {nn.Module, object, *FUNCTIONS}:
        for name, member in vars(cls).items():
            methods.setdefault(name, []).append(member)
    reads, writes, first = {"forward", _HOOKS}, set[str](), set[str]()
    functions = [getattr(each, "__func__", each) for each in (*callables, getattr(loss_fn, "fn", None))]
    pending: list[Any] = [*methods.get("forward", ()), *methods.get("__call__", ()), *functions]
    seen: set[int] = set()
    while pending:
        function = _function_of(pending.pop())
        if function is None or id(function) in seen:
            continue
        seen.add(id(function))
        read, written, read_first = _names_in(function.__code__)
        reads |= read
        writes |= written
        first |= read_first
        known = {} if is_of_torch(function) else function.__globals__
        for name in read:
            pending += [*methods.get(name, ()), known.get(name)]
            is_module = isinstance(known.get(name), types.ModuleType)
            if is_module and known[name].__name__.partition(".")[0] not in _MODULES_OF_OTHERS:
                pending += [vars(known[name]).get(other) for other in read]
    return reads, writes, first


def _callables(values: Any, depth: int = 2) -> Iterator[Any]:
    """Functions, methods and other objects that may be called or have methods, but for modules and classes."""
    if isinstance(values, (Mapping, list, tuple)):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from _callables(value, depth - 1) if depth else ()
    elif (callable(values) or hasattr(values, "__dict__")) and not isinstance(values, (nn.Module, Tensor, type)):
        yield values


def _function_of(member: Any) -> types.FunctionType | None:
    if isinstance(member, (staticmethod, classmethod)):
        member = member.__func__
    elif isinstance(member, property):
        member = member.fget
    elif isinstance(member, functools.cached_property):
        member = member.func
    return inspect.unwrap(member) if isinstance(member, types.FunctionType) else None


_MODULES_OF_OTHERS = sys.stdlib_module_names | {"torch", "numpy"}
_MUTATORS = {"append", "add", "extend", "insert", "update", "setdefault", "pop", "clear"}


def _names_in(code: types.CodeType) -> tuple[set[str], set[str], set[str]]:
    read = {*code.co_names, *(constant for constant in code.co_consts if isinstance(constant, str))}
    written, first, attribute = set[str](), set[str](), ""
    for step in dis.get_instructions(code):
        if step.opname == "STORE_ATTR":
            written.add(step.argval)
        elif step.opname == "STORE_SUBSCR" or step.argval in _MUTATORS:
            # What was written into is what was loaded before.
            written.add(attribute)
        elif step.opname == "LOAD_ATTR":
            attribute = step.argval
            first |= {attribute} - written
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = _names_in(constant)
            read, written, first = (own | others for own, others in zip((read, written, first), inner, strict=True))
    return read, written, first
