"""Passes over a loader that should yield the same data: compared by sums over all examples, and warned of."""

import dataclasses
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import SequenceKey, tree_flatten_with_path

from lmc_curvature.agreement import near
from lmc_curvature.objective.batches import Batch, fields_of, tensors_in

_CHUNK = 1 << 22


@dataclass
class Fingerprint:
    """Sums over all examples of a pass, which do not depend on their order nor, but for one, on their batches.

    Attributes:
        examples: Number of examples.
        weight: Sum of the batches' weights.
        counts: Of each tensor of a batch, by its place, how many numbers it has.
        moments: The sum of these numbers, and that of their squares, in float64 on their own device.
        shapes: Of each tensor, the shapes of an example.
        integers: Places of tensors of whole numbers.
        products: Of the places that have a row for each example, a matrix: with p the sum of a row's numbers by fixed
            weights, ∑ p p′ over all examples for every two places. It tells flipped images, whose sums are the same,
            and labels that are given to other examples.
        batches: Of each place, sums over batches of (∑ x)² and (∑ p)²: they depend on how the examples are cut into
            batches, and on their order neither.
    """

    examples: int = 0
    weight: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    moments: dict[str, Tensor] = field(default_factory=dict)
    shapes: dict[str, set[torch.Size]] = field(default_factory=dict)
    integers: set[str] = field(default_factory=set)
    products: dict[tuple[str, ...], Tensor] = field(default_factory=dict)
    batches: dict[str, Tensor] = field(default_factory=dict)

    def add(self, batch: Batch) -> None:
        """Add the examples of a batch."""
        self.examples += batch.size
        self.weight += batch.weight
        rows: dict[str, Tensor] = {}
        totals: dict[str, Tensor] = {}
        leading = next((len(tensor) for tensor in tensors_in(batch.data) if tensor.ndim), None)
        for path, tensor in tree_flatten_with_path(_plain(batch.data))[0]:
            if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
                continue
            of_examples = (tensor.ndim and len(tensor) == batch.size) or (tensor.ndim > 1 and len(tensor) == leading)
            if not tensor.is_floating_point() and not of_examples:
                # Indices into a batch, such as a graph's edges, depend on its order.
                continue
            # The parts of a list have no places of their own: they are as shuffled as batches are.
            place = str(path[:1]) + "".join(str(key) for key in path[1:] if not isinstance(key, SequenceKey))
            found = _moments(tensor.detach())
            self.moments[place] = self.moments[place] + found if place in self.moments else found
            self.counts[place] += tensor.numel()
            self.shapes.setdefault(place, set()).add(tensor.shape[1:])
            if not tensor.is_floating_point():
                self.integers.add(place)
            if tensor.ndim and len(tensor) == batch.size and not any(isinstance(key, SequenceKey) for key in path[1:]):
                rows[place] = _weighted_sums(tensor.detach())
            weighted = rows[place].sum() if place in rows else torch.zeros_like(found[0])
            totals[place] = totals.get(place, 0) + torch.stack([found[0], weighted])
        for place, total in totals.items():
            self.batches[place] = self.batches.get(place, 0) + total.square()
        if rows:
            sums = torch.stack(list(rows.values()))
            self.products[tuple(rows)] = self.products.get(tuple(rows), 0) + sums @ sums.T

    def on_host(self) -> "Fingerprint":
        """The same with all sums on the host, which a device is asked for as few times as possible."""
        return dataclasses.replace(
            self,
            moments={place: sums.cpu() for place, sums in self.moments.items()},
            products={places: sums.cpu() for places, sums in self.products.items()},
            batches={place: sums.cpu() for place, sums in self.batches.items()},
        )

    @classmethod
    def merged(cls, parts: "Sequence[Fingerprint]") -> "Fingerprint":
        """The fingerprint of the examples of several."""
        total, *others = parts
        for other in others:
            total.examples += other.examples
            total.weight += other.weight
            total.counts += other.counts
            total.integers |= other.integers
            for place, shapes in other.shapes.items():
                total.shapes.setdefault(place, set()).update(shapes)
            for name in ("moments", "products", "batches"):
                sums: dict[Any, Any] = getattr(total, name)
                sums.update({place: sums.get(place, 0) + found for place, found in getattr(other, name).items()})
        return total

    def agrees_with(self, other: "Fingerprint") -> bool:
        """Whether two passes have had the same examples, as far as sums tell it, up to rounding."""
        rounding = torch.finfo(torch.float64).eps
        if self.examples != other.examples or not near(
            "passes", self.weight, other.weight, rounding=rounding, scale=other.weight
        ):
            return False
        for place in self.moments.keys() & other.moments.keys():
            # Whole numbers of varying shape are padded ones: where, depends on the order.
            if place in self.integers and len(self.shapes[place] | other.shapes[place]) > 1:
                continue
            (total, squares), (expected, scale) = (found.moments[place].tolist() for found in (self, other))
            # |Σx| ≤ √(n Σx²), so that rounding is relative to that.
            sums = near("passes", total, expected, rounding=rounding, scale=(other.counts[place] * scale) ** 0.5)
            if not (sums and near("passes", squares, scale, rounding=rounding, scale=scale)):
                return False
        return all(self._has_products_of(other, places) for places in self.products.keys() & other.products.keys())

    def is_cut_like(self, other: "Fingerprint") -> bool:
        """Whether two passes have had the same batches, in any order, as far as sums tell it, up to rounding."""
        rounding = torch.finfo(torch.float64).eps
        for place in self.batches.keys() & other.batches.keys():
            found, expected = self.batches[place], other.batches[place]
            # Within batches, |Σx| ≤ √(n Σx²) and |Σp| ≤ √(rows Σx²): their rounding is relative to that.
            most = torch.tensor([other.counts[place], other.examples]) * other.moments[place][1]
            scale, floor = (expected * most).sqrt(), rounding * most
            if not near("batches of passes", found, expected, rounding=rounding, scale=scale, floor=floor).all():
                return False
        return True

    def _has_products_of(self, other: "Fingerprint", places: tuple[str, ...]) -> bool:
        # Where padding is, weights depend on the order.
        kept = [i for i, place in enumerate(places) if len(self.shapes[place] | other.shapes[place]) == 1]
        found, expected = (each.products[places][kept][:, kept] for each in (self, other))
        if not kept:
            return True
        # |Σpp′| ≤ ‖p‖‖p′‖, and p is rounded relative to the length of its row: ‖x‖ in all.
        lengths = torch.stack([other.moments[places[i]][1] for i in kept]).sqrt()
        scale = torch.outer(expected.diagonal().sqrt(), lengths)
        rounding = torch.finfo(torch.float64).eps
        return bool(near("passes", found, expected, rounding=rounding, scale=scale + scale.T).all())


def _plain(data: Any) -> Any:
    """The data with mappings and what has fields as dicts, in which every tensor has a path."""
    names = getattr(data, "_fields", None)
    if isinstance(data, tuple) and names is not None:
        return {name: _plain(value) for name, value in zip(names, data, strict=True)}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    parts = data if isinstance(data, Mapping) else fields_of(data)
    return {name: _plain(value) for name, value in parts.items()} if parts else data


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _weighted_sums(tensor: Tensor) -> Tensor:
    """Of each row of a tensor the sum of its numbers, weighted by their position in it, in float64."""
    rows = _real(tensor)
    # One weight a place along each axis, so that one pass over the numbers is enough.
    weights = [_unit_vector(length, rows.device) for length in rows.shape[1:]]
    sums = []
    for part in rows.split(max(1, _CHUNK // max(1, rows[:1].numel()))):
        numbers = part.double()
        for vector in reversed(weights):
            numbers = numbers @ vector
        sums.append(numbers)
    return torch.cat(sums)


@functools.lru_cache(maxsize=64)
def _unit_vector(length: int, device: torch.device) -> Tensor:
    vector = torch.randn(length, generator=torch.Generator().manual_seed(length), dtype=torch.float64)
    return (vector / torch.linalg.vector_norm(vector)).to(device)


def _moments(tensor: Tensor) -> Tensor:
    numbers = _real(tensor)
    if not numbers.is_floating_point():
        numbers = numbers.double()
    norm = torch.linalg.vector_norm(numbers, dtype=torch.float64)
    return torch.stack([numbers.sum(dtype=torch.float64), norm * norm])


class Passes:
    """The passes over one loader: each complete one is compared with the first, and one that differs is warned of."""

    def __init__(self) -> None:
        self._first: Fingerprint | None = None
        self._count = 0
        self._warned = False

    def watch(
        self,
        batches: Iterator[Batch],
        cut_matters: str = "",
        gather: Callable[[Any], list[Any]] = lambda found: [found],
    ) -> Iterator[Batch]:
        """Pass on the batches of one pass.

        Args:
            batches: The batches.
            cut_matters: Why the loss depends on how the examples are cut into batches; empty if it does not.
            gather: Brings together what all have that share the pass.
        """
        found = Fingerprint()
        for batch in batches:
            if batch.weight and not self._warned:
                found.add(batch)
            yield batch
        self._count += 1
        parts, causes = zip(*gather((found.on_host(), cut_matters)), strict=True)
        found, cut_matters = Fingerprint.merged(parts), max(causes)
        if self._warned:
            return
        if self._first is None:
            self._first = found
        elif not found.agrees_with(self._first):
            self._warn(
                f"yielded other data than pass 1 (by {found.examples} and {self._first.examples} examples, and the "
                f"sums of their numbers): {_SEVERAL} Pass a loader that yields the same examples every time, without "
                "random augmentation, sampling with replacement, or shuffling with drop_last or max_batches; "
                "list(loader) is one."
            )
        elif cut_matters and not found.is_cut_like(self._first):
            self._warn(
                f"cut the same examples into other batches than pass 1, and the loss depends on how they are cut, by "
                f"{cut_matters}: {_SEVERAL} Pass a loader that yields the same batches every time, without shuffling; "
                "list(loader) is one."
            )

    def _warn(self, said: str) -> None:
        self._warned = True
        warnings.warn(f"Pass {self._count} over the loader has {said}", stacklevel=4)


_SEVERAL = (
    "what takes several passes, such as products of an operator, their spectra or batch_norm='recalibrate', is then of "
    "no one function."
)
