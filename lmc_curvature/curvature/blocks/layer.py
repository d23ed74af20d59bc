"""A layer along one axis of a dense block: the places of its entries, and of what its affine module holds."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lmc_curvature.curvature.blocks.affine import AffineMap, LayerCall, find_affine
from lmc_curvature.curvature.blocks.cost import LayerShape
from lmc_curvature.curvature.products import places_of
from lmc_curvature.objective.network import State


@dataclass(frozen=True, eq=False)
class BlockLayer:
    """A layer along one axis of a block.

    Attributes:
        tensors: Its entries, by name, in the order of the axis.
        affine: The affine module that holds most of its parameters; None if there is none.
    """

    tensors: dict[str, Tensor]
    affine: AffineMap | None

    @classmethod
    def of(cls, network: nn.Module, state: State, entries: Sequence[str]) -> "BlockLayer":
        """The layer of some entries."""
        return cls({name: state[name] for name in entries}, find_affine(network, state, entries))

    @functools.cached_property
    def places(self) -> dict[str, slice]:
        """Places of the entries along the axis."""
        return places_of(self.tensors)

    @functools.cached_property
    def own(self) -> tuple[str, ...]:
        """Entries of the affine module."""
        return () if self.affine is None else self.affine.entries

    @property
    def beside(self) -> tuple[str, ...]:
        """Entries of the layer that are not the affine module's."""
        return tuple(name for name in self.tensors if name not in self.own)

    @functools.cached_property
    def width(self) -> int:
        """Number of the affine module's outputs at one position."""
        return 1 if self.affine is None else self.affine.width

    def of_units(self, entry: str, start: int, stop: int) -> slice:
        """Places of what an entry of the affine module holds for a range of its outputs."""
        place, features = self.places[entry], self.tensors[entry].numel() // self.width
        return slice(place.start + start * features, place.start + stop * features)

    def features(self) -> list[tuple[str, slice]]:
        """Entries of the affine module, and which of its features they multiply."""
        counts = [self.tensors[name].numel() // self.width for name in self.own]
        ends = itertools.accumulate(counts)
        return [(name, slice(end - count, end)) for name, count, end in zip(self.own, counts, ends, strict=True)]

    def shape_at(self, call: LayerCall) -> LayerShape:
        """The layer's shape, as one call of its module shows it."""
        affine, others = (sum(self.tensors[name].numel() for name in part) for part in (self.own, self.beside))
        return LayerShape(self.width, affine // self.width, call.slopes.shape[1], others)


@dataclass(frozen=True)
class BlockSum:
    """A block, summed over examples in place, with a layer along its rows and one along its columns."""

    values: Tensor
    rows: BlockLayer
    columns: BlockLayer

    @property
    def affines(self) -> list[AffineMap]:
        """The affine modules of both layers; one of a layer with itself."""
        both = dict.fromkeys((self.rows.affine, self.columns.affine))
        return [affine for affine in both if affine is not None]

    @property
    def T(self) -> "BlockSum":  # noqa: N802 - as of a matrix
        """The same numbers with rows and columns exchanged."""
        return BlockSum(self.values.T, self.columns, self.rows)
