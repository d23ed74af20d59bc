"""The most memory that tensors take together while something is computed."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_of_tensors(run: Callable[[], Any]) -> int:
    """Most bytes of the storages that a call makes and that are alive at one time.

    What an operation takes for itself while it runs is not seen.
    """
    with _Alive() as alive:
        run()
    return alive.peak


class _Alive(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(storage) for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if id(storage) not in given and id(storage) not in self._known:
                self._add(storage)
        self.peak = max(self.peak, self.bytes)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def gone(_: Any) -> None:
            self.bytes -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.bytes += size


def _storages(data: Any) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_leaves(data):
        if isinstance(leaf, Tensor):
            yield leaf.untyped_storage()
