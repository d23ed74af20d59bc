"""Whether a loss depends on tensors that it was not given: they are followed from operation to operation."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        origin = next(filter(None, map(self.origin_of, inputs)), None)
        if origin is not None and not _is_of_form_alone(func):
            written = inputs if func._schema.is_mutable else []
            for tensor in (*written, *(leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor))):
                self._followed.setdefault(_place(tensor), (origin, tensor))
        return found


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
