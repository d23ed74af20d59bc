"""A stand-in for the recorder of CUDA graphs, which needs no device."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lmc_curvature import Objective
from lmc_curvature.replay import Outcome, Replays

# What asks a device for numbers.
_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "aten::equal")


class Repeater:
    """Records calls as a graph does: their operations, which then read and write the same tensors again.

    Attributes:
        recorded: Number of calls that were recorded.
        replayed: Number of times that one was repeated.
    """

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, run: Callable[[], Outcome]) -> tuple[Callable[[], Any], Outcome]:
        """Record a call.

        Raises:
            RuntimeError: It asks for numbers.
        """
        with _Tape() as tape:
            outcome = run()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return replay, outcome


class _Tape(TorchDispatchMode):
    """Notes operations with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in func.name() for word in _WAITING):
            raise RuntimeError("called a synchronizing CUDA operation")
        found = func(*args, **(kwargs or {}))
        if not func.is_view:
            # Autograd does not know what a device does with its tensors.
            known = tree_map_only(Tensor, lambda tensor: tensor.data, (args, kwargs or {}, found))
            self._calls.append((func, *known))
        return found

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, found in self._calls:
            again = func(*args, **kwargs)
            for tensor, new in zip(tree_leaves(found), tree_leaves(again), strict=True):
                if isinstance(tensor, Tensor) and new is not tensor:
                    tensor.copy_(new)


def let_replay(objective: Objective) -> Repeater:
    """Let an objective on a CPU replay what it does on a CUDA device."""
    repeater = Repeater()
    objective.replays = Replays(lambda: repeater)
    return repeater
