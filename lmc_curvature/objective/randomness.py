"""The global random number generators: left as they were, and searched for a module that draws from them."""

import contextlib
import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn


@contextlib.contextmanager
def global_rng_preserved() -> Iterator[None]:
    """Restore the global generators of torch (CPU and CUDA), NumPy and `random` when the block ends."""
    *host_states, cuda_states = _states()
    try:
        yield
    finally:
        set_host_states(host_states)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)


def drawing_module(root: nn.Module, run: Callable[[], Any]) -> str | None:
    """Call `run`, which evaluates `root`, and name the innermost module that draws random numbers, if any.

    A module draws when a global generator has another state after its forward pass than before. The generators
    are left as they were.
    """
    before: list[Any] = []
    drawing: list[str] = []

    def remember(_module: nn.Module, _args: Any) -> None:
        before.append(_fingerprint())

    def compare(name: str, _module: nn.Module, _args: Any, _output: Any) -> None:
        if before.pop() != _fingerprint():
            drawing.append(name)

    with contextlib.ExitStack() as stack:
        stack.enter_context(global_rng_preserved())
        for name, module in root.named_modules():
            stack.enter_context(module.register_forward_pre_hook(remember))
            stack.enter_context(module.register_forward_hook(functools.partial(compare, name)))
        run()
    # Hooks of inner modules run before those of the modules around them.
    return drawing[0] if drawing else None


def host_states() -> Any:
    """States of the global generators of torch on the CPU, of `random` and of NumPy."""
    return torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002


def set_host_states(states: Any) -> None:
    """Set the states of the global generators of torch on the CPU, of `random` and of NumPy."""
    torch_state, python_state, numpy_state = states
    torch.set_rng_state(torch_state)
    random.setstate(python_state)
    np.random.set_state(numpy_state)  # noqa: NPY002


def _states() -> Any:
    return *host_states(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _fingerprint() -> Any:
    torch_state, python_state, (_, keys, *rest), cuda_states = _states()
    return [python_state, keys.tobytes(), rest, *(state.tolist() for state in (torch_state, *cuda_states))]
