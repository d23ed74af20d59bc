"""Dense blocks of the Hessian: of one layer, and between two layers; exact, over the whole loader."""

import itertools
import warnings
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from lmc_curvature.agreement import near
from lmc_curvature.curvature.blocks.affine import AffineMap, LayerCall, gradient_and_calls
from lmc_curvature.curvature.blocks.cost import road_costs
from lmc_curvature.curvature.blocks.layer import BlockLayer, BlockSum
from lmc_curvature.curvature.blocks.structured import examples_interact, pair_blocks
from lmc_curvature.curvature.operators import CurvatureOperator, HessianOperator
from lmc_curvature.curvature.products import BatchGradient, BatchProducts, Vectorizer, unit_vectors
from lmc_curvature.curvature.products.derivatives import all_finite
from lmc_curvature.errors import FallbackWarning, NonFiniteError, OptionError, check_choice, check_memory
from lmc_curvature.objective.batches import Batch
from lmc_curvature.objective.losses import finite_loss
from lmc_curvature.objective.network import State
from lmc_curvature.objective.risk import Objective
from lmc_curvature.segment.partition import PartitionSpec

BlockMethod = Literal["auto", "structured", "products"]
METHODS: tuple[BlockMethod, ...] = get_args(BlockMethod)


def layer_hessian(
    objective: Objective,
    state: State | None,
    layer: str,
    *,
    partition: PartitionSpec = "fused",
    method: BlockMethod = "auto",
    memory_gib: float = 4.0,
    progress: bool | None = None,
) -> Float[Tensor, "n n"]:
    """Dense Hessian of the mean loss in one layer's entries, in one pass over the loader.

    `"structured"`: an affine map with weight W and input x_p at position p (one for a plain vector, one a token, one a
    pixel) enters the loss through its output z_p = W x_p only, so the block of one example is

        H[(o, c), (o′, c′)] = Σ_pp′ x_pc · ∂²loss / ∂z_po ∂z_p′o′ · x_p′c′

    (Botev, Ritter, Barber, "Practical Gauss-Newton Optimisation for Deep Learning", 2017). One second-order product a
    unit of z gives a column of the inner Hessian for every example at once: width × positions products, through the
    part of the network above the layer only, instead of one for every parameter. It asks for an `nn.Linear` or an
    ungrouped `nn.Conv2d` whose weight is used once, and for examples whose losses do not depend on each other above
    it, which is looked for in every batch; entries that the layer has beside it (a normalisation) get a product each.
    The first batch with a part in the block is compared with an exact product.

    `"products"`: one exact Hessian-vector product for every parameter, on one graph a batch. Any layer.

    `"auto"`: the first where the layer has that structure and `road_costs` says it is cheaper, else the second.

    Args:
        objective: The loss and its data.
        state: Where to differentiate; None for the objective's own state.
        layer: Name of the layer.
        partition: How the network is cut into layers; see `LayerPartition.of`.
        method: The road to take.
        memory_gib: The largest matrix to make, in GiB.
        progress: Whether to show a progress bar over batches; by default on a terminal and in notebooks.

    Returns:
        The block, float64, on the objective's device; coordinates in the order of
        `HessianOperator(...).block(layer).rows`.

    Raises:
        PartitionError: The partition has no such layer.
        MemoryBudgetError: The block would take more than `memory_gib` GiB.
        OptionError: `method` is not a choice, or is `"structured"` for a layer without that structure.
        NonFiniteError: The state, the loss of a batch or the block is not finite.
        UnsupportedModelError: An operation has no second derivative.
    """
    return cross_layer_hessian(
        objective, state, layer, layer, partition=partition, method=method, memory_gib=memory_gib, progress=progress
    )


def cross_layer_hessian(
    objective: Objective,
    state: State | None,
    layer_a: str,
    layer_b: str,
    *,
    partition: PartitionSpec = "fused",
    method: BlockMethod = "auto",
    memory_gib: float = 4.0,
    progress: bool | None = None,
) -> Float[Tensor, "n_a n_b"]:
    """Dense block of the Hessian of the mean loss between two layers, in one pass over the loader.

    The roads are those of `layer_hessian`. Where layer a comes first, with output z and input x, and y, v, g are the
    input and output of layer b and the loss's derivative in that output, the structured road has for one example,
    summed over positions,

        H[(o, c), (o′, c′)] = x_c · (∂²loss / ∂z_o ∂v_o′ · y_c′  +  g_o′ · ∂y_c′ / ∂z_o)

    whose second term is there when layer a feeds layer b. Both derivatives come from one product a unit of z.

    Args:
        objective: The loss and its data.
        state: Where to differentiate; None for the objective's own state.
        layer_a: Name of the layer along the rows.
        layer_b: Name of the layer along the columns.
        partition: How the network is cut into layers; see `LayerPartition.of`.
        method: The road to take, as for `layer_hessian`.
        memory_gib: The largest matrix to make, in GiB.
        progress: Whether to show a progress bar over batches; by default on a terminal and in notebooks.

    Returns:
        The block, float64, on the objective's device: rows of layer a, columns of layer b, each in the order of
        `HessianOperator(...).block(layer).rows`.

    Raises:
        LMCCurvatureError: All that `layer_hessian` raises.
    """
    check_choice("method", method, METHODS)
    block = HessianOperator(objective, state, partition=partition).block(layer_a, layer_b)
    names = repr(layer_a) if layer_a == layer_b else f"{layer_a!r}, {layer_b!r}"
    check_memory(
        block.shape[0] * block.shape[1] * 8 / 2**30,
        memory_gib,
        f"The dense {block.shape[0]} × {block.shape[1]} block of {names}",
        f"use products, HessianOperator(objective, state).block({names}), or raise memory_gib.",
    )
    rows = BlockLayer.of(objective.network, block.state, block.rows)
    columns = rows if layer_a == layer_b else BlockLayer.of(objective.network, block.state, block.columns)
    if rows.affine is None or columns.affine is None:
        if method == "structured":
            missing = layer_a if rows.affine is None else layer_b
            raise OptionError(
                f"method='structured': layer {missing!r} has no nn.Linear or ungrouped nn.Conv2d with a weight of its "
                "own (not tied, not parametrised). Use method='auto' or 'products'."
            )
        method = "products"
    # What was made in inference mode could not be added to outside, where derivatives are taken.
    with torch.inference_mode(False):
        total = BlockSum(torch.zeros(block.shape, dtype=torch.float64, device=block.device), rows, columns)
    vectorizer = Vectorizer(objective.rounding)
    weight = 0.0
    with objective.one_pass(progress=progress, description="Hessian block") as batches:
        for batch in batches:
            block.check_derivatives(batch)
            method = _add_batch(total, block, batch, method, vectorizer)
            weight += batch.weight
        weight = objective.ranks.total(weight, total.values)
    _mirror(total)
    if not all_finite(total.values):
        raise NonFiniteError(
            f"The Hessian block of {layer_a!r} and {layer_b!r} is not finite. Does the network compute something "
            "without a second derivative, such as a square root at zero?"
        )
    return total.values.div_(weight)


class _StructureError(Exception):
    """A batch cannot go the structured road; says why."""


class _MismatchError(_StructureError):
    """A batch went the structured road, and its block is not the Hessian's."""


def _add_batch(
    total: BlockSum, block: CurvatureOperator, batch: Batch, method: BlockMethod, vectorizer: Vectorizer
) -> BlockMethod:
    """Add one batch by a road, or by products where that is not open; returns the road for the batches to come."""
    objective = block.objective
    affines = [] if method == "products" else total.affines
    entries = list(total.rows.tensors | total.columns.tensors)
    gradient, calls = gradient_and_calls(objective, block.point, objective.laid_out(batch), entries, affines)
    finite_loss(gradient.loss, batch)
    products = BatchProducts(gradient, batch, vectorizer)
    if method != "products":
        try:
            _check_uses(total.affines, gradient, calls)
            _add_structured(total, block, products, calls, auto=method == "auto")
            return method
        except _StructureError as reason:
            if method == "structured":
                raise OptionError(
                    f"method='structured': at batch {batch.index}, {reason} Use method='auto' or 'products'."
                ) from None
            if isinstance(reason, _MismatchError):
                message = f"At batch {batch.index}, {reason} Falling back on one product for every parameter."
                warnings.warn(message, FallbackWarning, stacklevel=3)
                total.values.zero_()
    side = min(total, total.T, key=lambda side: len(side.values))
    _add_products(side, products, side.rows.tensors, side.columns.tensors)
    return "products"


def _add_products(side: BlockSum, products: BatchProducts, rows: Iterable[str], columns: Iterable[str]) -> None:
    """Add one exact product for each parameter in some entries along the rows: its part in some along the columns."""
    for name in rows:
        start = side.rows.places[name].start
        for done, found in products.of(unit_vectors({name: side.rows.tensors[name]}), list(columns)):
            for other, values in found.items():
                part = side.values[start + done.start : start + done.stop, side.columns.places[other]]
                part.add_(values, alpha=products.batch.weight)


def _add_structured(
    total: BlockSum, block: CurvatureOperator, products: BatchProducts, calls: Sequence[LayerCall], *, auto: bool
) -> None:
    """Add the block of both affine modules from derivatives in their outputs, and products for the entries beside them.

    Raises:
        _StructureError: The layers are not what this road needs, or it is not the cheaper one, which `auto` asks for;
            nothing is added. At the first batch with a part in the block: the sum is not the Hessian's.
    """
    # A layer may see none of the first examples, as the expert that no example is sent to.
    is_first_part = not total.values.any()
    with block.objective.numerics.differentiating_operations():
        first, second = _pair(total, calls, products.vectorizer, auto=auto)
        side = _side_of(total, first)
        for unit, part in pair_blocks(first, second, products.vectorizer):
            start = side.columns.width - part.shape[1]
            pairs = itertools.product(side.rows.features(), side.columns.features())
            for (row, of_row), (column, of_column) in pairs:
                rows = side.rows.of_units(row, unit, unit + 1)
                columns = side.columns.of_units(column, start, side.columns.width)
                side.values[rows, columns].add_(part[of_row, :, of_column].flatten(1), alpha=products.batch.weight)
    _add_products(total.T, products, total.columns.beside, total.rows.tensors)
    _add_products(total, products, total.rows.beside, total.columns.own)
    if is_first_part:
        _mirror(total)
        _check_product(total, block, products)


def _pair(
    total: BlockSum, calls: Sequence[LayerCall], vectorizer: Vectorizer, *, auto: bool
) -> tuple[LayerCall, LayerCall]:
    """The calls of both layers' modules, in the order in which they came; the same twice for one layer.

    Raises:
        _StructureError: The layers are not what the structured road needs, or it is not the cheaper one.
    """
    found = sorted((_only_call(affine, calls) for affine in total.affines), key=calls.index)
    first, second = found[0], found[-1]
    if first.examples != second.examples:
        raise _StructureError(f"one module sees {first.examples} examples and the other {second.examples}.")
    side = _side_of(total, first)
    costs = road_costs(side.rows.shape_at(first), None if first is second else side.columns.shape_at(second))
    if auto and costs["structured"] > costs["products"]:
        raise _StructureError("that road is not the cheaper one.")
    if examples_interact(first, second, vectorizer):
        raise _StructureError("examples have a part in each other's loss above the layer (batch statistics?).")
    return first, second


def _check_uses(affines: Sequence[AffineMap], gradient: BatchGradient, calls: Sequence[LayerCall]) -> None:
    """Check of every batch, because a network may go other ways for other examples.

    Raises:
        _StructureError: The entries of an affine module have a part in the loss beside its one output.
    """
    for affine in affines:
        if not _only_call(affine, calls).direct:
            raise _StructureError(f"the module of {affine.entries[0]!r} computes with something made of its entries.")
        for name, uses in gradient.uses(affine.entries).items():
            if uses != 1:
                raise _StructureError(f"{name!r} is used {uses} times, not once by its module.")


def _only_call(affine: AffineMap, calls: Sequence[LayerCall]) -> LayerCall:
    found = [call for call in calls if call.affine is affine]
    if len(found) != 1 or not found[0].batched:
        times = f"{len(found)} times" if len(found) != 1 else "without a dimension of examples"
        raise _StructureError(f"the module of {affine.entries[0]!r} is used {times}, not once on a batch.")
    return found[0]


def _side_of(total: BlockSum, call: LayerCall) -> BlockSum:
    """The sum with the layer of a call along its rows."""
    return total if call.affine is total.rows.affine else total.T


def _mirror(total: BlockSum) -> None:
    """Fill the affine module's block of a layer with itself, where only pairs of units in order may have been added."""
    layer = total.rows
    if layer is not total.columns:
        return
    for unit in range(layer.width):
        for row, column in itertools.product(layer.own, repeat=2):
            here, beyond = layer.of_units(row, unit, unit + 1), layer.of_units(column, unit + 1, layer.width)
            total.values[beyond, here] = total.values[here, beyond].T


def _check_product(total: BlockSum, block: CurvatureOperator, products: BatchProducts) -> None:
    """Compare the sum, of one batch so far, with an exact product.

    Raises:
        _MismatchError: They differ by more than rounding.
    """
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(block.shape[1], generator=generator, dtype=torch.float64)
    vector = vector.to(block.device, block.objective.dtype)
    # Where curvatures cancel (a saturated softmax) a product is nothing but rounding: it changes when the vector is
    # scaled, and cannot be compared with more than that.
    product, scaled = (
        block.flatten(products.matrix.product(block.unflatten(factor * vector), block.rows)).double() / factor
        for factor in (1.0, 1 / 3)
    )
    rounding, expected = (float(torch.linalg.norm(part)) for part in (product - scaled, product))
    error = float(torch.linalg.norm(total.values @ vector.double() / products.batch.weight - product))
    precision = block.objective.rounding
    if not near("structured block", error, 0.0, rounding=precision, scale=expected, floor=10 * rounding):
        raise _MismatchError(
            f"the structured block times a random vector is off by {error:.2g} of {expected:.2g}: an affine module's "
            "weight has a part in the loss beside its output."
        )
