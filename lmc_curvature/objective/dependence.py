"""Whether a loss depends on tensors that it was not given, or changes those that it was."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmc_curvature.errors import UnsupportedModelError
from lmc_curvature.objective.network import State, equal


class Dependence(TorchDispatchMode):
    """Within the block, what is computed from some tensors is followed, whether or not they require gradients.

    Args:
        roots: What the tensors are, in a few words, and the tensors.
        given: What may be used although it may share memory with a root, such as the data.
    """

    def __init__(self, roots: Iterable[tuple[str, Tensor]], given: Iterable[Tensor] = ()):
        super().__init__()
        # With the tensors themselves: while they live, no other gets their place in memory.
        self._followed = {_place(root): (name, root) for name, root in roots}
        for tensor in given:
            self._followed.pop(_place(tensor), None)

    def origin_of(self, tensor: Tensor) -> str | None:
        """What a tensor was computed from; None if it is none of the roots."""
        name, _ = self._followed.get(_place(tensor), (None, None))
        return name

    def refuse(self, loss: Tensor) -> None:
        """Refuse a loss that was computed from a root.

        Raises:
            UnsupportedModelError: It was; names the root.
        """
        if origin := self.origin_of(loss):
            raise UnsupportedModelError(
                f"The loss uses entry {origin} instead of the state at hand: a closure, a list of parameters outside "
                "nn.ParameterList, or loss_fn refers to it. Reach it through its module (self.layer.weight), or pass "
                "loss_fn=BatchLoss(fn) with fn(model, batch) that uses model alone; what is meant to stay, such as a "
                "teacher, is a copy.deepcopy of the network."
            )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        origin = next(filter(None, map(self.origin_of, inputs)), None)
        if origin is not None and not _is_of_form_alone(func):
            written = inputs if func._schema.is_mutable else []
            for tensor in (*written, *(leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor))):
                self._followed.setdefault(_place(tensor), (origin, tensor))
        return found


def refuse_changes(before: State, after: State) -> None:
    """Refuse a network that has changed entries while it was evaluated, with or without autograd's knowledge.

    Args:
        before: Entry name to values before.
        after: Copies that the network was evaluated with.

    Raises:
        UnsupportedModelError: They differ; names an entry.
    """
    for name, tensor in after.items():
        written = not tensor.is_inference() and tensor._version
        if written or not equal(tensor, before[name]):
            raise UnsupportedModelError(
                f"The network changes {name!r} in place while it is evaluated, so its loss depends on what was "
                "evaluated before. Switch that off (max_norm of an embedding, running averages in evaluation mode), or "
                "compute with another tensor: a constraint by weight.data = ... belongs after each step of training."
            )


def _place(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        # Sparse tensors, for one, have no storage.
        return id(tensor)


def _is_of_form_alone(func: Any) -> bool:
    """Whether an operation takes only shape, type and device of a tensor."""
    name = func._schema.name.partition("::")[2]
    return name.endswith("_like") or name.startswith("new_")
