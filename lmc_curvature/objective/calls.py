"""Calls of torch's classification losses within a function: what it compares, and what it divides by."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_LOSSES = {
    function: inspect.signature(function)
    for function in (
        F.cross_entropy,
        F.nll_loss,
        F.multi_margin_loss,
        F.binary_cross_entropy,
        F.binary_cross_entropy_with_logits,
    )
}
# What leaves a tensor's elements as they are, or widens their type; the number of them is looked at.
_REARRANGEMENTS = {
    torch.clone,
    torch.flatten,
    torch.reshape,
    torch.squeeze,
    torch.unsqueeze,
    torch.transpose,
    torch.permute,
    Tensor.clone,
    Tensor.contiguous,
    Tensor.detach,
    Tensor.flatten,
    Tensor.long,
    Tensor.permute,
    Tensor.reshape,
    Tensor.squeeze,
    Tensor.t,
    Tensor.to,
    Tensor.transpose,
    Tensor.unsqueeze,
    Tensor.view,
}


@dataclass(frozen=True, eq=False)
class LossCall:
    """One call of a loss of torch.

    Attributes:
        function: The function of `torch.nn.functional`.
        arguments: Its arguments by name, defaults among them.
        result: What it returned.
        root: Place, among the tensors that were followed, of the one whose elements its target holds, all of them and
            in some order; None for any other target.
    """

    function: Callable[..., Tensor]
    arguments: Mapping[str, Any]
    result: Any
    root: int | None

    @property
    def input(self) -> Tensor:
        """What it took for outputs."""
        return self.arguments["input"]

    @property
    def target(self) -> Tensor:
        """What it took for targets."""
        return self.arguments["target"]


class LossCalls(TorchFunctionMode):
    """Within the block, calls of torch's classification losses are written down.

    Attributes:
        calls: The calls, in their order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[LossCall] = []
        self._places: dict[int, tuple[int, Tensor, int]] = {}

    def follow(self, roots: Iterable[Tensor]) -> "LossCalls":
        """Follow tensors to where they are targets of a call; returns itself."""
        # With the tensors themselves, so that no other gets the place of one in memory.
        self._places = {id(root): (place, root, root._version) for place, root in enumerate(roots)}
        return self

    @property
    def only(self) -> LossCall | None:
        """The call, if there is one and no other."""
        return self.calls[0] if len(self.calls) == 1 else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        if func in _LOSSES:
            bound = _LOSSES[func].bind(*args, **kwargs)
            bound.apply_defaults()
            self.calls.append(LossCall(func, bound.arguments, found, self._place(bound.arguments["target"])))
        elif func in _REARRANGEMENTS and args and isinstance(found, Tensor):
            place = self._place(args[0])
            if place is not None and found.numel() == args[0].numel() and found.dtype in (args[0].dtype, torch.int64):
                self._places[id(found)] = (place, found, found._version)
        return found

    def _place(self, tensor: Any) -> int | None:
        if id(tensor) not in self._places:
            return None
        place, followed, version = self._places[id(tensor)]
        # Written into, itself or through a view, it no longer holds what the loader yielded.
        return place if followed._version == version else None
