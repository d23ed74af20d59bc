"""A network without the modules around it, or around parts of it, that change how it is evaluated alone."""

import copy
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

from lmc_curvature.errors import UnsupportedModelError
from lmc_curvature.objective.network import acts_on_modes, copy_in_evaluation
from lmc_curvature.objective.sharding import refuse_sharded
from lmc_curvature.objective.values import is_of_torch

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
_INNER = {"OptimizedModule": "_orig_mod", "ActivationWrapper": "_checkpoint_wrapped_module"}
"""Torch's wrappers for compilation and for checkpointing, and under which name they hold a module."""


def unwrap(model: nn.Module) -> nn.Module:
    """The network itself, as it is in evaluation mode.

    Modules of torch around it or in it are left out that change how it is evaluated and not its function:
    `DataParallel`, `DistributedDataParallel`, `AveragedModel`, and what `torch.compile` and torch's wrapper for
    checkpointing make of a module or of its methods. Some modules compute with other entries in evaluation mode than in
    training mode (an update of low rank is merged into its weight, say): where there may be one, and the network is in
    training mode, the result is a copy in evaluation mode. The network given is left as it is: where a part of it is
    wrapped, the result is a copy of the modules around that part, with the same tensors.

    Raises:
        UnsupportedModelError: It has to be copied, and cannot be; hooks are registered on a wrapper; or this process
            holds a part of it only.
    """
    refuse_sharded(model)
    wrapped = any(_inner(module) is not None or _compiled_functions(module) for module in model.modules())
    network = _unwrap(model, {}) if wrapped else model
    in_training = any(module.training for module in network.modules())
    return copy_in_evaluation(network) if in_training and acts_on_modes(network) else network


def _unwrap(model: nn.Module, known: dict[int, nn.Module]) -> nn.Module:
    if id(model) in known:
        return known[id(model)]
    found = model
    while (inner := _inner(found)) is not None:
        found = inner
    children = {n: None if child is None else _unwrap(child, known) for n, child in found._modules.items()}
    functions = _compiled_functions(found)
    known[id(model)] = known[id(found)] = found
    if functions or any(children[name] is not child for name, child in found._modules.items()):
        known[id(model)] = known[id(found)] = copied = copy.copy(found)
        vars(copied).update(functions, _modules=children)
        for name, method in vars(copied).items():
            if isinstance(method, MethodType) and id(method.__self__) in known:
                owner, same = (
                    known[id(method.__self__)],
                    known[id(method.__self__)].__class__ is method.__self__.__class__,
                )
                vars(copied)[name] = MethodType(method.__func__, owner) if same else getattr(owner, method.__name__)
    return known[id(model)]


def _inner(model: nn.Module) -> nn.Module | None:
    if isinstance(model, _WRAPPERS):
        computes = type(model).forward not in {kind.forward for kind in _WRAPPERS}
        inner = None if computes else model.module
    else:
        # Modules of one's own may call a child so.
        of_torch = any(kind.__name__ in _INNER and is_of_torch(kind) for kind in type(model).__mro__)
        computes = not of_torch or not is_of_torch(type(model).forward)
        inner = None if computes else next((model._modules[n] for n in _INNER.values() if n in model._modules), None)
    if inner is not None and (model._forward_hooks or model._forward_pre_hooks):
        raise UnsupportedModelError(
            f"Hooks are registered on {type(model).__name__}, which is left out, being a wrapper: register them on the "
            "network that it wraps."
        )
    return inner


def _compiled_functions(module: nn.Module) -> dict[str, Any]:
    """Attributes of a module that `torch.compile` made of functions (`model.forward`, say), as they were before."""
    found = {name: _uncompiled(value) for name, value in vars(module).items()}
    return {name: function for name, function in found.items() if function is not vars(module)[name]}


def _uncompiled(value: Any) -> Any:
    while isinstance(value, FunctionType) and "_dynamo" in Path(value.__code__.co_filename).parts:
        value = getattr(value, "__wrapped__", None)
    return value
