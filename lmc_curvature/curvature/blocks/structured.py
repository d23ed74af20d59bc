"""Blocks between the weights of affine modules, from derivatives in their outputs, of which there are few."""

import itertools
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from lmc_curvature.curvature.blocks.affine import LayerCall
from lmc_curvature.curvature.products import StackedDirections, UnitVectors, Vectorizer, unit_vectors
from lmc_curvature.curvature.products.derivatives import gradients, operations
from lmc_curvature.curvature.products.vectorization import one_by_one
from lmc_curvature.objective.network import State
from lmc_curvature.objective.numerics import wide_dtype

# Examples times positions whose derivatives are multiplied at once.
_ROWS = 1024


def examples_interact(first: LayerCall, second: LayerCall, vectorizer: Vectorizer) -> bool:
    """Whether the loss's slopes in one example's output of the first call depend on another example's in the second.

    Some examples are moved at random: for the others, what does not depend on them stays exactly zero. Any two
    examples differ in a bit of their number, so a split of all examples by each bit tells them all apart; both ways,
    where the dependence is not mutual.

    Args:
        first: The call that came first.
        second: The one that came after it, or the same one.
        vectorizer: Makes several products at once.
    """
    slopes = first.slopes
    if not slopes.requires_grad or first.examples <= 1:
        return False
    bits = torch.arange((first.examples - 1).bit_length()).unsqueeze(1)
    moved = (torch.arange(first.examples) >> bits & 1).bool()
    moved = (moved if first is second else torch.cat([moved, ~moved])).to(slopes.device)
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(slopes.shape, generator=generator, dtype=torch.float64).to(slopes)
    derivatives = _derivatives(
        first,
        second,
        StackedDirections({"examples": moved.to(slopes)}),
        lambda direction: direction["examples"][:, None, None] * random,
        vectorizer,
    )
    split = zip(derivatives, ~moved, strict=True)
    found = [part.flatten(1).ne(0).any(1) & still for parts, still in split for part in parts.values()]
    return bool(torch.stack(found).any())


def pair_blocks(
    first: LayerCall, second: LayerCall, vectorizer: Vectorizer
) -> Iterator[tuple[int, Float[Tensor, "features units other_features"]]]:
    """The Hessian between the weights of two calls' modules, for one unit of the first at a time.

    With y an output unit of the first call at one position, x and z the input and output of the second,

        ∂²L / ∂y ∂W = Σ_p (∂²L / ∂y ∂z_p) x_pᵀ + (∂L / ∂z_p) (∂x_p / ∂y)ᵀ

    for every example at once, and what the weights of y's unit multiply at that position gives the block. One product
    a unit and position gives both derivatives: ∂x/∂y is what ∂L/∂y has as its derivative in ∂L/∂x.

    Args:
        first: The call that came first.
        second: The one that came after it, or the same one, which does not feed itself.
        vectorizer: Makes several products at once.

    Yields:
        Unit of the first call, and its block: a row for each of its features, a column for each unit and feature of
        the second call's module. Of a call with itself only units from this one on: the rest is symmetric.
    """
    if not first.slopes.requires_grad or first.examples == 0:
        return
    features, others = first.affine.features(first.input), second.affine.features(second.input)
    slopes = _wide(second.slopes.detach())
    derivatives = _unit_derivatives(first, second, vectorizer)
    _, positions, width = first.slopes.shape
    step = max(1, _ROWS // first.examples)
    for unit in range(width):
        beyond = unit if first is second else 0
        block = features.new_zeros(features.shape[2], second.affine.width - beyond, others.shape[2])
        for start in range(0, positions, step):
            here = features[:, start : start + step].transpose(0, 1)
            parts = list(itertools.islice(derivatives, len(here)))
            curvature = torch.stack([_wide(second.affine.by_position(part["output"])) for part in parts])
            mixed = _outer(curvature[..., beyond:], others)
            if "input gradient" in parts[0]:
                fed = torch.stack([second.affine.features(part["input gradient"], constant=0.0) for part in parts])
                mixed = mixed + _outer(slopes, fed)
            block.flatten(1).addmm_(here.flatten(0, 1).T, mixed.flatten(1))
        yield unit, block


def _unit_derivatives(first: LayerCall, second: LayerCall, vectorizer: Vectorizer) -> Iterator[dict[str, Tensor]]:
    """Derivatives of the slopes in each unit of the first call, and each position of it, over all examples."""
    # Unit by unit, position by position.
    units = unit_vectors({"units": first.slopes.detach()[0].T})
    return _derivatives(
        first, second, units, lambda direction: direction["units"].T.expand(first.slopes.shape), vectorizer
    )


def _derivatives(
    first: LayerCall,
    second: LayerCall,
    directions: StackedDirections | UnitVectors,
    weigh: Callable[[State], Tensor],
    vectorizer: Vectorizer,
) -> Iterator[dict[str, Tensor]]:
    """Derivatives of weighed slopes of the first call, in turn for each direction that `weigh` makes weights of.

    They are taken in the second call's output and, if the first may feed it, in its input gradient.
    """
    slopes, inputs, fed = first.slopes, {"output": second.output}, second.input_gradient
    if first is not second and fed is not None and fed.requires_grad:
        inputs["input gradient"] = fed

    def differentiate(direction: State) -> dict[str, Tensor]:
        return gradients([slopes], inputs, [weigh(direction)])

    return one_by_one(vectorizer.map(differentiate, directions, (operations([slopes]), slopes.shape)))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(wide_dtype(tensor.dtype))


def _outer(
    slopes: Float[Tensor, "*#positions examples places width"],
    features: Float[Tensor, "*#positions examples places features"],
) -> Float[Tensor, "rows width features"]:
    """Outer products summed over places, one for each position and example."""
    left = slopes.mT
    # Of a single place there is nothing to sum, and a product of elements is faster.
    found = left * features if features.shape[-2] == 1 else left @ features
    return found.flatten(0, -3)
