"""The floating-point types that a network computes in, and in which of its modules."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def precisions_met(root: nn.Module, run: Callable[[], Any]) -> tuple[Any, dict[torch.dtype, str]]:
    """Call `run`, which evaluates `root`: a network may round to a lower precision on its way.

    Returns:
        What `run` returns; and for every floating-point type that was computed in, the name of the innermost module
        that was the first to do so.
    """
    inside: list[str] = []
    with contextlib.ExitStack() as stack:
        for name, module in root.named_modules():
            stack.enter_context(module.register_forward_pre_hook(lambda *_, name=name: inside.append(name)))
            stack.enter_context(module.register_forward_hook(lambda *_: _leave(inside)))
        precisions = stack.enter_context(_Precisions(inside))
        result = run()
    return result, precisions.met


def _leave(inside: list[str]) -> None:
    inside.pop()


class _Precisions(TorchDispatchMode):
    """Notes the floating-point types of results, each with the module that is at work."""

    def __init__(self, inside: list[str]) -> None:
        super().__init__()
        self.met: dict[torch.dtype, str] = {}
        self._inside = inside

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                self.met.setdefault(leaf.dtype, self._inside[-1] if self._inside else "")
        return result
