"""Dense blocks of the Hessian: of one layer, and between two layers; exact, over the whole loader."""

import functools
import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lmc_curvature.curvature.blocks.affine import (
    AffineMap,
    Call,
    LayerShape,
    examples_interact,
    find_affine,
    pair_blocks,
    recording,
    road_costs,
)
from lmc_curvature.curvature.operators.hessian import HessianOperator
from lmc_curvature.curvature.products.derivatives import all_finite
from lmc_curvature.curvature.products.gradient import BatchGradient
from lmc_curvature.curvature.products.layout import in_best_layout
from lmc_curvature.curvature.products.vectorization import UnitVectors, Vectorizer
from lmc_curvature.errors import FallbackWarning, MemoryBudgetError, NonFiniteError, OptionError, check_choice
from lmc_curvature.objective.batches import Batch
from lmc_curvature.objective.losses import finite_loss
from lmc_curvature.objective.network import State
from lmc_curvature.objective.risk import Objective
from lmc_curvature.segment.partition import PartitionSpec

BlockMethod = Literal["auto", "structured", "products"]
METHODS = ("auto", "structured", "products")


def layer_hessian(
    objective: Objective,
    state: State | None,
    layer: str,
    *,
    partition: PartitionSpec = "fused",
    method: BlockMethod = "auto",
    max_gib: float = 4.0,
    progress: bool = False,
) -> Float[Tensor, "n n"]:
    """Dense Hessian of the mean loss in one layer's entries, in one pass over the loader.

    `"structured"`: an affine map with weight W and input x_p at position p (one for a plain vector, one a token, one a
    pixel) enters the loss through its output z_p = W x_p only, so the block of one example is

        H[(o, c), (o′, c′)] = Σ_pp′ x_pc · ∂²loss / ∂z_po ∂z_p′o′ · x_p′c′

    (Botev, Ritter, Barber, "Practical Gauss-Newton Optimisation for Deep Learning", 2017). One second-order product a
    unit of z gives a column of the inner Hessian for every example at once: width × positions products, through the
    part of the network above the layer only, instead of one for every parameter. It asks for an `nn.Linear` or an
    ungrouped `nn.Conv2d` whose weight is used once, and for examples whose losses do not depend on each other above
    it; entries that the layer has beside it (a normalisation) get a product each. The first batch is compared with an
    exact product.

    `"products"`: one exact Hessian-vector product for every parameter, on one graph a batch. Any layer.

    `"auto"`: the first where the layer has that structure and `road_costs` says it is cheaper, else the second.

    Args:
        objective: The loss and its data.
        state: Where to differentiate; None for the objective's own state.
        layer: Name of the layer.
        partition: How the network is cut into layers; see `LayerPartition.of`.
        method: Which road to take.
        max_gib: Largest matrix to make, in GiB.
        progress: Show a progress bar over batches.

    Returns:
        The block, float64, on the objective's device; coordinates in the order of
        `HessianOperator(...).block(layer).rows`.

    Raises:
        PartitionError: The partition has no such layer.
        MemoryBudgetError: The block would take more than `max_gib` GiB.
        OptionError: `method` is not a choice, or is `"structured"` for a layer without that structure.
        NonFiniteError: The state, the loss of a batch or the block is not finite.
        UnsupportedModelError: An operation has no second derivative.
    """
    return cross_layer_hessian(
        objective, state, layer, layer, partition=partition, method=method, max_gib=max_gib, progress=progress
    )


def cross_layer_hessian(
    objective: Objective,
    state: State | None,
    layer_a: str,
    layer_b: str,
    *,
    partition: PartitionSpec = "fused",
    method: BlockMethod = "auto",
    max_gib: float = 4.0,
    progress: bool = False,
) -> Float[Tensor, "n_a n_b"]:
    """Dense block of the Hessian of the mean loss between two layers, in one pass over the loader.

    As `layer_hessian`. Where layer a comes first, with output z and input x, and y, v, g are the input and output of
    layer b and the loss's derivative in that output, the structured road has for one example, summed over positions,

        H[(o, c), (o′, c′)] = x_c · (∂²loss / ∂z_o ∂v_o′ · y_c′  +  g_o′ · ∂y_c′ / ∂z_o)

    whose second term is there when layer a feeds layer b. Both derivatives come from one product a unit of z.

    Args:
        objective: The loss and its data.
        state: Where to differentiate; None for the objective's own state.
        layer_a: Name of the layer along the rows.
        layer_b: Name of the layer along the columns.
        partition: How the network is cut into layers; see `LayerPartition.of`.
        method: See `layer_hessian`.
        max_gib: Refuse a block that takes more memory.
        progress: Show a progress bar over batches.

    Returns:
        The block, float64, on the objective's device: rows of layer a, columns of layer b, each in the order of
        `HessianOperator(...).block(layer).rows`.

    Raises:
        LMCCurvatureError: As `layer_hessian`.
    """
    check_choice("method", method, METHODS)
    block = HessianOperator(objective, state, partition=partition).block(layer_a, layer_b)
    _check_size(block.shape, layer_a, layer_b, max_gib)
    point = {**objective.state(), **objective.place(state or {})}
    rows = _Layer.of(objective.network, point, block.rows)
    columns = rows if layer_a == layer_b else _Layer.of(objective.network, point, block.columns)
    if method == "structured" and (rows.affine is None or columns.affine is None):
        missing = layer_a if rows.affine is None else layer_b
        raise OptionError(
            f"method='structured': layer {missing!r} has no nn.Linear or ungrouped nn.Conv2d with a weight of its own "
            "(not tied, not parametrised). Use method='auto' or 'products'."
        )
    if rows.affine is None or columns.affine is None:
        method = "products"
    block_sum = _BlockSum(objective, point, rows, columns)
    with objective.one_pass(progress=progress, description="Hessian block") as batches:
        for batch in batches:
            method = block_sum.add(batch, method)
    total = block_sum.mean()
    if not all_finite(total):
        raise NonFiniteError(
            f"The Hessian block of {layer_a!r} and {layer_b!r} is not finite. Does the network compute something "
            "without a second derivative, such as a square root at zero?"
        )
    return total


def _check_size(shape: tuple[int, int], layer_a: str, layer_b: str, max_gib: float) -> None:
    gib = shape[0] * shape[1] * 8 / 2**30
    if gib > max_gib:
        names = repr(layer_a) if layer_a == layer_b else f"{layer_a!r}, {layer_b!r}"
        raise MemoryBudgetError(
            f"The dense {shape[0]} × {shape[1]} block of {names} takes {gib:.3g} GiB, more than max_gib={max_gib:g}. "
            f"Use products with HessianOperator(objective, state).block({names}), or raise max_gib."
        )


@dataclass(frozen=True)
class _Layer:
    """A layer's entries: their shapes, their places along one axis of the block, and its largest affine module."""

    shapes: Mapping[str, torch.Size]
    places: Mapping[str, slice]
    affine: AffineMap | None

    @classmethod
    def of(cls, network: nn.Module, point: State, entries: Sequence[str]) -> "_Layer":
        places, start = {}, 0
        for name in entries:
            places[name] = slice(start, start := start + point[name].numel())
        return cls({name: point[name].shape for name in entries}, places, find_affine(network, point, entries))

    @property
    def size(self) -> int:
        return sum(shape.numel() for shape in self.shapes.values())

    @functools.cached_property
    def own(self) -> tuple[str, ...]:
        """Entries of the affine module."""
        return () if self.affine is None else self.affine.entries

    @property
    def beside(self) -> tuple[str, ...]:
        """The other entries."""
        return tuple(name for name in self.places if name not in self.own)

    @functools.cached_property
    def width(self) -> int:
        """Number of the affine module's outputs at one position."""
        return 1 if self.affine is None else self.affine.width

    def of_units(self, entry: str, start: int, stop: int) -> slice:
        """Places of what an entry of the affine module holds for a range of its outputs."""
        place, features = self.places[entry], self.shapes[entry].numel() // self.width
        return slice(place.start + start * features, place.start + stop * features)

    def parts(self) -> list[tuple[str, slice]]:
        """Entries of the affine module, and where what they multiply is among its features."""
        counts = [self.shapes[name].numel() // self.width for name in self.own]
        ends = list(itertools.accumulate(counts))
        return [(name, slice(end - count, end)) for name, count, end in zip(self.own, counts, ends, strict=True)]

    def seen(self, call: Call) -> LayerShape:
        """The layer's shape, as one call of its module shows it."""
        affine = sum(self.shapes[name].numel() for name in self.own)
        return LayerShape(self.width, affine // self.width, call.output[0].numel() // self.width, self.size - affine)


class _StructureError(Exception):
    """A batch cannot go the structured road; says why."""


class _MismatchError(_StructureError):
    """A batch went the structured road, and its block is not the Hessian's."""


@dataclass(frozen=True)
class _Side:
    """The block with the entries of one layer, the units, along its rows, and those of the other along its columns."""

    block: Float[Tensor, "units others"]
    units: _Layer
    others: _Layer


@dataclass(frozen=True)
class _Probe:
    """An exact product with a vector, and how far it changes by rounding when the vector is scaled.

    Where curvatures cancel (a saturated softmax) a product is nothing but rounding, and cannot be compared with more.
    """

    vector: Float[Tensor, " columns"]
    product: Float[Tensor, " rows"]
    rounding: float


class _BlockSum:
    """The block, summed over batches, times their numbers of examples."""

    def __init__(self, objective: Objective, point: State, rows: _Layer, columns: _Layer):
        self._objective = objective
        self._point = point
        self._entries = [name for name in point if name in rows.places or name in columns.places]
        self._affines = {id(layer.affine): layer.affine for layer in (rows, columns) if layer.affine is not None}
        # What was made in inference mode could not be added to outside, where derivatives are taken.
        with torch.inference_mode(False):
            self._total = torch.zeros(rows.size, columns.size, dtype=torch.float64, device=objective.device)
        self._forth = _Side(self._total, rows, columns)
        self._back = _Side(self._total.T, columns, rows)
        self._examples = 0
        self._half_filled = False
        self._vectorizer = Vectorizer(objective.rounding)

    def mean(self) -> Float[Tensor, "rows columns"]:
        """The block of the mean loss."""
        if self._half_filled:
            self._mirror()
        return self._total.div_(self._examples)

    def _mirror(self) -> None:
        """Fill the affine module's block of a layer with itself, of which only pairs of units in order were added."""
        layer = self._forth.units
        for unit in range(layer.width):
            for row, column in itertools.product(layer.own, repeat=2):
                here, beyond = layer.of_units(row, unit, unit + 1), layer.of_units(column, unit + 1, layer.width)
                self._total[beyond, here] = self._total[here, beyond].T
        self._half_filled = False

    def add(self, batch: Batch, method: BlockMethod) -> BlockMethod:
        """Add a batch; returns the method for the batches to come."""
        self._examples += batch.size
        with recording([] if method == "products" else list(self._affines.values())) as calls:
            gradient = self._gradient(batch, calls)
        if batch.index == 0:
            gradient.check_twice_differentiable()
        finite_loss(gradient.loss, batch)
        if method != "products" and self._adds_structured(gradient, calls, batch, method):
            return method
        side = min(self._forth, self._back, key=lambda side: side.units.size)
        self._add_products(side, side.units.places, side.others.places, gradient, batch)
        return "products"

    def _gradient(self, batch: Batch, calls: list[Call]) -> BatchGradient:
        def differentiate(batch: Batch) -> tuple[Tensor, BatchGradient]:
            # Another layout may have been tried before.
            calls.clear()
            gradient = BatchGradient(self._objective, self._point, batch, self._entries)
            return gradient.loss, gradient

        return in_best_layout(self._objective, self._point, batch, differentiate)

    def _adds_structured(
        self, gradient: BatchGradient, calls: Sequence[Call], batch: Batch, method: BlockMethod
    ) -> bool:
        """Add a batch by the structured road; whether that road was open."""
        probe = self._probe(gradient) if batch.index == 0 else None
        try:
            with self._objective.differentiating_operations():
                first, second = self._pair(calls, only_if_cheaper=method == "auto")
                self._add_structured(gradient, first, second, batch)
            if probe is not None:
                self._check_against(probe, batch.size)
        except _StructureError as reason:
            if method == "structured":
                raise OptionError(
                    f"method='structured': at batch {batch.index}, {reason} Use method='auto' or 'products'."
                ) from None
            if isinstance(reason, _MismatchError):
                message = f"At the first batch, {reason} Falling back on one product for every parameter."
                warnings.warn(message, FallbackWarning, stacklevel=4)
                self._total.zero_()
            return False
        return True

    def _pair(self, calls: Sequence[Call], *, only_if_cheaper: bool) -> tuple[Call, Call]:
        """The calls of both layers' modules, in the order in which they came.

        Raises:
            _StructureError: The layers are not what the structured road needs, or it is not the cheaper one.
        """
        found = sorted((_only_call(affine, calls) for affine in self._affines.values()), key=calls.index)
        first, second = found[0], found[-1]
        if first.examples != second.examples:
            raise _StructureError(f"one module sees {first.examples} examples and the other {second.examples}.")
        side = self._side_of(first)
        costs = road_costs(side.units.seen(first), None if first is second else side.others.seen(second))
        if only_if_cheaper and costs["structured"].multiplications > costs["products"].multiplications:
            raise _StructureError("that road is not the cheaper one.")
        if examples_interact(first, second, self._vectorizer):
            raise _StructureError("examples have a part in each other's loss above the layer (batch statistics?).")
        return first, second

    def _side_of(self, call: Call) -> _Side:
        return self._forth if call.affine is self._forth.units.affine else self._back

    def _add_structured(self, gradient: BatchGradient, first: Call, second: Call, batch: Batch) -> None:
        """Add the block of both affine modules, and by products what the layers have beside them."""
        side = self._side_of(first)
        for unit, block in pair_blocks(first, second, self._vectorizer):
            start = side.others.width - block.shape[1]
            for (row, mine), (column, theirs) in itertools.product(side.units.parts(), side.others.parts()):
                rows = side.units.of_units(row, unit, unit + 1)
                columns = side.others.of_units(column, start, side.others.width)
                side.block[rows, columns].add_(block[mine, :, theirs].flatten(1), alpha=batch.size)
        self._half_filled = first is second
        rows, columns = self._forth.units, self._forth.others
        self._add_products(self._back, columns.beside, rows.places, gradient, batch)
        self._add_products(self._forth, rows.beside, columns.own, gradient, batch)

    def _add_products(
        self, side: _Side, units: Iterable[str], others: Iterable[str], gradient: BatchGradient, batch: Batch
    ) -> None:
        """Add one exact product for each parameter in some entries: its part in some entries of the other layer."""
        others = list(others)
        for name in units:
            vectors = UnitVectors(name, self._point[name], 0, self._point[name].numel())
            start = side.units.places[name].start
            multiply = functools.partial(gradient.product, rows=others)
            key = (batch.kind, gradient.operations, name, *others)
            for products in self._vectorizer.map(multiply, vectors.stacked, len(vectors), key):
                count = len(products[others[0]])
                for other, rows in products.items():
                    part = side.block[start : start + count, side.others.places[other]]
                    part.add_(rows.reshape(count, -1), alpha=batch.size)
                start += count

    def _probe(self, gradient: BatchGradient) -> _Probe:
        """An exact product of the first batch with a random vector."""
        generator = torch.Generator().manual_seed(0)
        vector = torch.randn(self._total.shape[1], generator=generator, dtype=torch.float64)
        vector = vector.to(self._total.device, self._objective.dtype)
        product, scaled = (self._product(gradient, factor * vector) / factor for factor in (1.0, 1 / 3))
        return _Probe(vector.double(), product, float(torch.linalg.norm(product - scaled)))

    def _check_against(self, probe: _Probe, size: int) -> None:
        """Compare the block, of the first batch so far, with an exact product.

        Raises:
            _MismatchError: They differ by more than rounding.
        """
        if self._half_filled:
            self._mirror()
        expected = float(torch.linalg.norm(probe.product))
        error = float(torch.linalg.norm(self._total @ probe.vector / size - probe.product))
        if not error <= 10 * probe.rounding + self._objective.rounding**0.5 * expected:
            raise _MismatchError(
                f"the structured block times a random vector is off by {error:.2g} of {expected:.2g}: an affine "
                "module's weight has a part in the loss beside its output."
            )

    def _product(self, gradient: BatchGradient, vector: Float[Tensor, " columns"]) -> Float[Tensor, " rows"]:
        rows, columns = self._forth.units, self._forth.others
        vector = vector.to(self._objective.dtype)
        direction = {name: vector[place].view(columns.shapes[name]) for name, place in columns.places.items()}
        return torch.cat([part.flatten() for part in gradient.product(direction, list(rows.places)).values()]).double()


def _only_call(affine: AffineMap, calls: Sequence[Call]) -> Call:
    found = [call for call in calls if call.affine is affine and call.gradient is not None]
    if len(found) != 1 or not found[0].batched:
        times = f"{len(found)} times" if len(found) != 1 else "without a dimension of examples"
        raise _StructureError(f"the module of {affine.entries[0]!r} is used {times}, not once on a batch.")
    return found[0]
