"""Several products at once on one graph, where calls to torch cost more than arithmetic.

A product of a small network is some hundred calls of a few microseconds each. `torch.func.vmap` over the product makes
the same calls for many vectors. Where tensors are large that saves nothing and costs memory, and a convolution by
several weights at once becomes a grouped one, which is slower than one after another.
"""

import warnings
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmc_curvature.agreement import near
from lmc_curvature.curvature.products.directions import Directions
from lmc_curvature.objective.network import State

# In the names of operations that are slower by many weights at once than alone, or that torch maps wrongly.
_ALONE = ("convolution", "conv_tbc", "rnn", "lstm", "gru", "cdist")

Product = Callable[[State], dict[str, Tensor]]
"""A function that computes something from a direction, by name, and that `torch.func.vmap` can map."""


class Vectorizer:
    """Makes several products at once: the first one decides how many, and the first that are made so are checked.

    Args:
        rounding: Relative rounding error of one operation.
        elements: Numbers that the products made at once may write, in all, of which few are alive at the same time; by
            default what suits the device. 0 makes all products one by one.
    """

    def __init__(self, rounding: float, *, elements: int | None = None) -> None:
        self._rounding = rounding
        self._elements = elements
        self._at_once: dict[Hashable, int] = {}
        self._checked: set[Hashable] = set()

    def map(self, compute: Product, directions: Directions, key: Hashable) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """Compute a product of each direction.

        Args:
            compute: The product, linear in the direction.
            directions: The directions.
            key: A value that differs between products of different cost.

        Yields:
            A range of the directions, in order, and what `compute` returns for each, stacked along a first axis.
        """
        start, count = 0, len(directions)
        if count > 1 and self._is_unknown(key):
            yield slice(0, 1), _stacked_alone(self._measure(compute, directions, key))
            start = 1
        while start < count:
            stop = min(start + self._at_once.get(key, 1), count)
            found = self._together(compute, directions.stacked(start, stop), stop - start, key)
            if found is None:
                stop = start + 1
                found = _stacked_alone(compute(_only(directions.stacked(start, stop))))
            yield slice(start, stop), found
            start = stop

    def at_once(self, compute: Product, directions: Directions, key: Hashable) -> int:
        """Number of products that `map` makes at once; found, where it is not known, by making the first for nothing.

        Args:
            compute: The product, as for `map`.
            directions: The directions.
            key: A value that differs between products of different cost.
        """
        if self._is_unknown(key):
            self._measure(compute, directions, key)
        return self._at_once.get(key, 1)

    def _is_unknown(self, key: Hashable) -> bool:
        return self._elements != 0 and key not in self._at_once

    def _measure(self, compute: Product, directions: Directions, key: Hashable) -> dict[str, Tensor]:
        """The first product, which decides how many are made at once."""
        first = _only(directions.stacked(0, 1))
        with _Footprint() as footprint:
            found = compute(first)
        self._at_once[key] = footprint.fitting(first, self._elements)
        return found

    def _together(self, compute: Product, directions: State, size: int, key: Hashable) -> dict[str, Tensor] | None:
        """The products of several directions; None, and fewer at once from now on, where that cannot be or is wrong."""
        if size == 1:
            return None
        try:
            found = _mapped(compute, directions)
        except torch.OutOfMemoryError:
            self._at_once[key] = size // 2
            return None
        except Exception:  # noqa: BLE001 - whatever it is, it comes again, or does not, where products are made alone
            self._at_once[key] = 1
            return None
        if key not in self._checked:
            if not self._agrees(found, compute, directions, size):
                self._at_once[key] = 1
                return None
            self._checked.add(key)
        return found

    def _agrees(self, found: State, compute: Product, directions: State, size: int) -> bool:
        """Whether a random combination of the products is the product of that combination.

        torch has an operation whose mapped form is wrong, without a word (`torch.cdist`).
        """
        signs = torch.randint(2, (size,), generator=torch.Generator().manual_seed(0)) * 2 - 1
        expected = compute({name: _combined(signs, stacked) for name, stacked in directions.items()})
        if not found:
            return True
        off = torch.stack([torch.linalg.vector_norm(_combined(signs, found[name]) - expected[name]) for name in found])
        sizes = torch.stack([torch.linalg.vector_norm(stacked) for stacked in found.values()])
        # Entry by entry: one that is wrong may be small beside others. Where a product cancels to nothing but rounding
        # of the others', it may differ; where all of them do, they are made alone.
        nothing, floor = torch.zeros_like(off), 10 * self._rounding * sizes.norm()
        return bool(near("products at once", off, nothing, rounding=self._rounding, scale=sizes, floor=floor).all())


def one_by_one(found: Iterator[tuple[slice, dict[str, Tensor]]]) -> Iterator[dict[str, Tensor]]:
    """The products that `Vectorizer.map` yields, direction by direction."""
    for _, stacked in found:
        for tensors in zip(*stacked.values(), strict=True):
            yield dict(zip(stacked, tensors, strict=True))


def _only(directions: State) -> State:
    return {name: stacked[0] for name, stacked in directions.items()}


def _stacked_alone(found: State) -> dict[str, Tensor]:
    return {name: tensor.unsqueeze(0) for name, tensor in found.items()}


def _combined(signs: Tensor, stacked: Tensor) -> Tensor:
    return torch.tensordot(signs.to(stacked), stacked, dims=1)


def _mapped(compute: Product, directions: State) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        # An operation that torch maps by a loop is exact, and no slower than our loop.
        warnings.filterwarnings("ignore", "There is a performance drop")
        return torch.func.vmap(compute)(dict(directions))


class _Footprint(TorchDispatchMode):
    """Counts the numbers that a computation writes, and notes whether it makes sense to map it."""

    def __init__(self) -> None:
        super().__init__()
        self._written = 0
        self._mappable = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self._mappable &= not any(word in func.name() for word in _ALONE)
        if not func.is_view:
            self._written += sum(leaf.numel() for leaf in tree_leaves(found) if isinstance(leaf, Tensor))
        return found

    def fitting(self, direction: State, elements: int | None) -> int:
        """Number of computations like this one, of one direction, that write no more than some elements together."""
        if not self._mappable:
            return 1
        written = self._written + sum(tensor.numel() for tensor in direction.values())
        if elements is None:
            devices = {tensor.device.type for tensor in direction.values()}
            elements = 2**24 if devices == {"cpu"} else 2**27 if devices == {"cuda"} else 0
        return max(elements // max(written, 1), 1)
