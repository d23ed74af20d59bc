"""Affine modules inside a network: what goes in and out of them, and second derivatives of the loss around them.

A weight W that is used once enters the loss through one output z_p = W x_p + b, at positions p (one for a plain vector,
one a token, one a pixel). Everything about W's block of the Hessian is then in x and in derivatives in z.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lmc_curvature.curvature.products.derivatives import gradients, operations
from lmc_curvature.curvature.products.vectorization import Vectorizer, one_by_one
from lmc_curvature.objective.network import State, tied_names

# Examples times positions whose derivatives are multiplied at once.
_ROWS = 1024


@dataclass(frozen=True)
class LayerShape:
    """What a layer is to the cost model.

    Attributes:
        width: Outputs of the affine map (units, or channels) at one position.
        features: Inputs of the affine map at one position (for a convolution, of one patch), and one for a bias.
        positions: At how many positions of an example the map is applied.
        others: Parameters of the layer that are not the affine map's.
    """

    width: int
    features: int
    positions: int = 1
    others: int = 0

    @property
    def affine(self) -> int:
        """Parameters of the affine map."""
        return self.width * self.features

    @property
    def parameters(self) -> int:
        """Parameters of the layer."""
        return self.affine + self.others


@dataclass(frozen=True)
class RoadCost:
    """What a dense block costs: second-order products a batch, and multiplications an example, estimated."""

    products: int
    multiplications: int


def road_costs(first: LayerShape, second: LayerShape | None = None) -> dict[str, RoadCost]:
    """Cost of the block between two layers (of one with itself when `second` is None) by either road.

    A product through an affine map costs own = positions × parameters multiplications forth and as many back, for
    each of the two layers, and what lies above them is taken to cost the same again. Then, with N parameters,

        products      min(N_first, N_second) · 2 own
        structured    width · positions · (own + outer)  +  others · 2 own

    where outer, the products with the inputs of both layers, is N_second · (positions_second + features_first), and
    N_second · positions_second more for a layer that may be fed. Of a layer with itself the structured road is thus
    the cheaper one as long as it has no more positions than features: always without positions, and for convolutions
    whose images have no more pixels than a patch has values. (Half of outer is saved there by symmetry, and lost to
    the smaller products.)

    Args:
        first: The layer that is called first.
        second: The layer that is called second.

    Returns:
        Cost of `"structured"` and `"products"`.
    """
    other = second or first
    own = first.positions * first.affine + other.positions * other.affine
    outer = other.affine * (other.positions * (1 if second is None else 2) + first.features)
    units = first.width * first.positions
    others = first.others if second is None else first.others + second.others
    plain = min(first.parameters, other.parameters)
    return {
        "structured": RoadCost(units + others, units * (own + outer) + others * 2 * own),
        "products": RoadCost(plain, plain * 2 * own),
    }


@dataclass(frozen=True)
class AffineMap:
    """An affine module, and its entries in a layer.

    Attributes:
        module: An `nn.Linear` or an ungrouped `nn.Conv2d`.
        weight: Entry name of its weight; None if that is not in the layer.
        bias: Entry name of its bias; None if there is none in the layer.
    """

    module: nn.Module
    weight: str | None
    bias: str | None

    @property
    def entries(self) -> tuple[str, ...]:
        """Names of the entries that it has in the layer."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    @property
    def width(self) -> int:
        """Number of outputs at one position."""
        weight: Any = self.module.weight
        return weight.shape[0]

    def by_position(self, output: Tensor) -> Float[Tensor, "examples positions width"]:
        """The module's output, or a derivative in it."""
        if isinstance(self.module, nn.Conv2d):
            return output.flatten(2).transpose(1, 2)
        return output.reshape(output.shape[0], -1, output.shape[-1])

    def features(self, input: Tensor, *, constant: float = 1.0) -> Float[Tensor, "examples positions features"]:
        """What the entries multiply at each position: the module's input, or the patch that a convolution sees; and 1.

        Args:
            input: The module's input, or a derivative of it.
            constant: What the bias multiplies.
        """
        input = _precise(input.detach())
        if isinstance(self.module, nn.Conv2d):
            geometry: Any = (self.module.kernel_size, self.module.dilation, self.module.padding, self.module.stride)
            found = F.unfold(input, *geometry).transpose(1, 2)
        else:
            found = input.reshape(input.shape[0], -1, input.shape[-1])
        constants = torch.full_like(found[:, :, :1], constant)
        parts = [part for entry, part in ((self.weight, found), (self.bias, constants)) if entry is not None]
        return torch.cat(parts, 2)


def find_affine(network: nn.Module, state: State, entries: Sequence[str]) -> AffineMap | None:
    """The affine module that holds most of a layer's parameters as its very own; None if there is none."""
    tied = set(tied_names(network).values())
    own = [entry for entry in entries if entry not in tied]
    found: list[AffineMap] = []
    for name in dict.fromkeys(entry.rpartition(".")[0] for entry in own):
        weight, bias = (f"{name}.{kind}".removeprefix(".") for kind in ("weight", "bias"))
        affine = AffineMap(
            network.get_submodule(name), weight if weight in own else None, bias if bias in own else None
        )
        if affine.entries and _is_affine(affine.module):
            found.append(affine)
    return max(found, key=lambda affine: sum(state[entry].numel() for entry in affine.entries), default=None)


def _is_affine(module: nn.Module) -> bool:
    # Not isinstance: a subclass, which parametrisations make too, may compute anything from its weight.
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return type(module) is nn.Linear


class Call:
    """One call of an affine module.

    Attributes:
        affine: The module.
        input: Its input.
        output: Its output, part of the graph.
        gradient: The loss's gradient in the output, part of the graph that differentiates it; None until it is taken.
        input_gradient: Likewise in the input, where that depends on what is differentiated.
    """

    def __init__(self, affine: AffineMap, input: Tensor, output: Tensor):
        self.affine = affine
        self.input = input
        self.output = output
        self.gradient: Tensor | None = None
        self.input_gradient: Tensor | None = None

    @property
    def examples(self) -> int:
        """Leading dimension of the output."""
        return self.output.shape[0]

    @property
    def batched(self) -> bool:
        """Whether the input has a leading dimension of examples."""
        return self.input.ndim >= (4 if isinstance(self.affine.module, nn.Conv2d) else 2)


@contextlib.contextmanager
def recording(affines: Sequence[AffineMap]) -> Iterator[list[Call]]:
    """Collect the calls of affine modules within the block, and the gradients that are taken through them there."""
    calls: list[Call] = []
    with contextlib.ExitStack() as hooks:
        for affine in affines:
            # First, so that it sees the module's own output and not what another hook makes of it.
            hook = _Recorder(affine, calls, hooks)
            hooks.callback(affine.module.register_forward_hook(hook, prepend=True, with_kwargs=True).remove)
        yield calls


class _Recorder:
    """A forward hook that keeps the calls of one module."""

    def __init__(self, affine: AffineMap, calls: list[Call], hooks: contextlib.ExitStack):
        self._affine = affine
        self._calls = calls
        self._hooks = hooks

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not output.requires_grad:
            return None
        call = Call(self._affine, args[0] if args else kwargs["input"], output)
        self._calls.append(call)
        # Removed in the end: they would see derivatives of the gradient, too, and keep its graph alive.
        self._hooks.callback(output.register_hook(functools.partial(setattr, call, "gradient")).remove)
        if call.input.requires_grad:
            self._hooks.callback(call.input.register_hook(functools.partial(setattr, call, "input_gradient")).remove)
        # A copy goes on, so that the network cannot change the recorded output in place.
        return output.clone()


def examples_interact(first: Call, second: Call, vectorizer: Vectorizer) -> bool:
    """Whether the loss's slopes in one example's output of the first call depend on another example's in the second.

    Some examples are moved at random: for the others, what does not depend on them stays exactly zero. Any two
    examples differ in a bit of their number, so a split of all examples by each bit tells them all apart; both ways,
    where the dependence is not mutual.

    Args:
        first: The call that came first.
        second: The one that came after it, or the same one.
        vectorizer: Decides how many products are made at once.
    """
    gradient = _slopes(first)
    if not gradient.requires_grad or first.examples == 1:
        return False
    bits = torch.arange((first.examples - 1).bit_length()).unsqueeze(1)
    moved = (torch.arange(first.examples) >> bits & 1).bool()
    moved = (moved if first is second else torch.cat([moved, ~moved])).to(gradient.device)
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(gradient.shape, generator=generator, dtype=torch.float64).to(gradient)

    def weights(start: int, stop: int) -> dict[str, Tensor]:
        return {"slope": moved[start:stop, :, None, None] * random}

    derivatives = _derivatives_along(weights, len(moved), first, second, vectorizer)
    split = zip(derivatives, ~moved, strict=True)
    found = [part.flatten(1).ne(0).any(1) & still for parts, still in split for part in parts.values()]
    return bool(torch.stack(found).any())


def pair_blocks(
    first: Call, second: Call, vectorizer: Vectorizer
) -> Iterator[tuple[int, Float[Tensor, "features units other_features"]]]:
    """The Hessian between the weights of two calls' modules, for one unit of the first at a time.

    With y an output unit of the first call at one position, x and z the input and output of the second,

        ∂²L / ∂y ∂W = Σ_p (∂²L / ∂y ∂z_p) x_pᵀ + (∂L / ∂z_p) (∂x_p / ∂y)ᵀ

    for every example at once, and what the weights of y's unit multiply at that position gives the block. One product
    a unit and position gives both derivatives: ∂x/∂y is what ∂L/∂y has as its derivative in ∂L/∂x.

    Args:
        first: The call that came first.
        second: The one that came after it, or the same one, which does not feed itself.
        vectorizer: Decides how many products are made at once.

    Yields:
        Unit of the first call, and its block: a row for each of its features, a column for each unit and feature of
        the second call's module. Of a call with itself only units from this one on: the rest is symmetric.
    """
    gradient = _slopes(first)
    if not gradient.requires_grad:
        return
    features, others = first.affine.features(first.input), second.affine.features(second.input)
    slopes = _precise(_slopes(second).detach())
    derivatives = _unit_derivatives(first, second, vectorizer)
    step = max(1, _ROWS // first.examples)
    for unit in range(gradient.shape[2]):
        beyond = unit if first is second else 0
        block = features.new_zeros(features.shape[2], second.affine.width - beyond, others.shape[2])
        for start in range(0, gradient.shape[1], step):
            here = features[:, start : start + step].transpose(0, 1)
            parts = list(itertools.islice(derivatives, len(here)))
            curvature = torch.stack([_precise(second.affine.by_position(part["output"])) for part in parts])
            mixed = _outer(curvature[..., beyond:], others)
            if "input gradient" in parts[0]:
                fed = torch.stack([second.affine.features(part["input gradient"], constant=0.0) for part in parts])
                mixed = mixed + _outer(slopes, fed)
            block.flatten(1).addmm_(here.flatten(0, 1).T, mixed.flatten(1))
        yield unit, block


def _unit_derivatives(first: Call, second: Call, vectorizer: Vectorizer) -> Iterator[dict[str, Tensor]]:
    """`_derivatives` for each unit, and each position of it."""
    gradient = _slopes(first)
    examples, positions, width = gradient.shape

    def weights(start: int, stop: int) -> dict[str, Tensor]:
        numbers = torch.arange(start, stop, device=gradient.device)
        stacked = gradient.new_zeros(stop - start, examples, positions, width)
        stacked[numbers - start, :, numbers % positions, numbers // positions] = 1
        return {"slope": stacked}

    return _derivatives_along(weights, positions * width, first, second, vectorizer)


def _derivatives_along(
    weights: Callable[[int, int], State], count: int, first: Call, second: Call, vectorizer: Vectorizer
) -> Iterator[dict[str, Tensor]]:
    """`_derivatives` for each of some weights of slopes, by position; see `Vectorizer.map`."""
    gradient = _slopes(first)

    def differentiate(direction: State) -> dict[str, Tensor]:
        return _derivatives(gradient, direction["slope"], first, second)

    return one_by_one(vectorizer.map(differentiate, weights, count, (operations([gradient]), gradient.shape)))


def _derivatives(values: Tensor, weights: Tensor, first: Call, second: Call) -> dict[str, Tensor]:
    """Derivatives of weighed slopes in the second call's output and, if the first may feed it, input gradient."""
    inputs = {"output": second.output}
    slope = second.input_gradient
    if first is not second and slope is not None and slope.requires_grad:
        inputs["input gradient"] = slope
    return gradients([values], inputs, [weights])


def _slopes(call: Call) -> Float[Tensor, "examples positions width"]:
    """The loss's gradient in a call's output."""
    if call.gradient is None:
        raise ValueError("The loss's gradient in a recorded output is not taken yet.")
    return call.affine.by_position(call.gradient)


def _precise(tensor: Tensor) -> Tensor:
    """Half-precision values as float32: a sum of many does not fit into half a number."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _outer(
    slopes: Float[Tensor, "*#positions examples places width"],
    features: Float[Tensor, "*#positions examples places features"],
) -> Float[Tensor, "rows width features"]:
    """Outer products summed over places, one for each position and example."""
    left = slopes.mT
    # Of a single place there is nothing to sum, and a product of elements is faster.
    found = left * features if features.shape[-2] == 1 else left @ features
    return found.flatten(0, -3)
