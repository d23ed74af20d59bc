"""What each operation of a captured graph is, for the sweep: linear, bilinear, pointwise, or anything else.

An operation without a rule of its own goes by `ByAutodiff`, which is right for every operation that torch can
differentiate twice; the others are there because they are faster.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from lmc_curvature.curvature.sweep.capture.recorder import value_of
from lmc_curvature.curvature.sweep.rules.autodiff import ByAutodiff, FlatByAutodiff
from lmc_curvature.curvature.sweep.rules.bilinear import DOT, MATRIX_VECTOR, PRODUCT, matrix_product
from lmc_curvature.curvature.sweep.rules.convolution import CONVOLUTION
from lmc_curvature.curvature.sweep.rules.rule import (
    Call,
    Contributions,
    Rule,
    Tangents,
    aligned,
    evaluate,
    weighted_gram,
)

aten = torch.ops.aten


class Constant(Rule):
    """An operation whose derivative is zero wherever it has one."""

    curved: ClassVar[bool] = False

    def push(self, call: Call) -> Tangents:
        """See `Rule`."""
        return {}


# --- Linear


@dataclass(frozen=True)
class Linear(Rule):
    """Linear in its first argument, the others held: the tangent goes through the operation itself."""

    curved: ClassVar[bool] = False

    def fits(self, node: fx.Node, moved: list[fx.Node]) -> bool:
        """See `Rule`."""
        return moved == [node.args[0]]

    def push(self, call: Call) -> Tangents:
        """See `Rule`."""
        first, *rest = call.node.args
        rest, options = call.resolve(tuple(rest)), call.resolve(call.node.kwargs)
        target: Any = call.node.target
        return {i: target(tangent, *rest, **options) for i, tangent in call.tangents_of(first).items()}


@dataclass(frozen=True)
class JointlyLinear(Rule):
    """Linear in some arguments together, tensors of one type, the others held.

    Attributes:
        positions: Their positions.
    """

    positions: tuple[int, ...]
    curved: ClassVar[bool] = False

    def fits(self, node: fx.Node, moved: list[fx.Node]) -> bool:
        """See `Rule`."""
        linear = [node.args[position] for position in self.positions]
        return all(isinstance(argument, fx.Node) for argument in linear) and set(moved) <= set(linear)

    def push(self, call: Call) -> Tangents:
        """See `Rule`."""
        options = call.resolve(call.node.kwargs)
        target: Any = call.node.target

        def part(i: int) -> Tensor:
            arguments = list(call.resolve(call.node.args))
            for position in self.positions:
                tangent = call.tangents_of(call.node.args[position]).get(i)
                arguments[position] = torch.zeros_like(arguments[position]) if tangent is None else tangent
            return target(*arguments, **options)

        return {i: part(i) for i in call.directions()}


@dataclass(frozen=True)
class Affine(Rule):
    """Linear in some arguments up to a constant: `part(call, tangents)` gives the linear part.

    `part` gets, in place of each argument (or list of arguments), its tangent, or None where that is zero.
    """

    part: Callable[[Call, list[Any]], Tensor]
    curved: ClassVar[bool] = False

    def push(self, call: Call) -> Tangents:
        """See `Rule`."""
        arguments = call.node.args
        return {i: self.part(call, [_tangent_of(call, each, i) for each in arguments]) for i in call.directions()}


def _tangent_of(call: Call, argument: Any, direction: int) -> Any:
    """Tangent of an argument, or of each in a list of them; None where it is zero."""
    if isinstance(argument, (list, tuple)):
        return [_tangent_of(call, each, direction) for each in argument]
    return call.tangents_of(argument).get(direction)


def _sum_part(sign: int) -> Callable[[Call, list[Any]], Tensor]:
    def part(call: Call, tangents: list[Any]) -> Tensor:
        first, second, *_ = tangents
        factor = sign * call.resolve(call.node.kwargs).get("alpha", 1)
        if second is None:
            return first.expand(call.output.shape)
        if first is None:
            return (second if factor == 1 else second * factor).expand(call.output.shape)
        return torch.add(first, second, alpha=factor)

    return part


def _reversed_difference_part(call: Call, tangents: list[Any]) -> Tensor:
    first, second, *_ = tangents
    factor = call.value(2) if len(call.node.args) > 2 else call.resolve(call.node.kwargs).get("alpha", 1)
    if first is None:
        return second.expand(call.output.shape)
    return (-factor * first if second is None else second - factor * first).expand(call.output.shape)


def _joined_part(call: Call, tangents: list[Any]) -> Tensor:
    pieces = [
        torch.zeros_like(value) if tangent is None else tangent
        for value, tangent in zip(call.value(0), tangents[0], strict=True)
    ]
    target: Any = call.node.target
    return target(pieces, *call.resolve(call.node.args[1:]))


def _where_part(call: Call, tangents: list[Any]) -> Tensor:
    chosen, other = ((call.output.new_zeros(()) if each is None else each) for each in tangents[1:3])
    return torch.where(call.value(0), chosen, other).expand(call.output.shape)


def _masked_fill_part(call: Call, tangents: list[Any]) -> Tensor:
    if len(tangents) > 2 and tangents[2] is not None:
        zero = call.output.new_zeros(()) if tangents[0] is None else tangents[0]
        return torch.where(call.value(1), tangents[2], zero).expand(call.output.shape)
    return tangents[0].masked_fill(call.value(1), 0).expand(call.output.shape)


def _pad_part(call: Call, tangents: list[Any]) -> Tensor:
    return aten.constant_pad_nd.default(tangents[0], call.value(1), 0)


def _embedding_part(call: Call, tangents: list[Any]) -> Tensor:
    chosen, padding = call.value(1), call.argument("padding_idx")
    found = aten.embedding.default(tangents[0], chosen)
    # torch takes the row for padding as a constant.
    return found if padding < 0 else found.masked_fill((chosen == padding).unsqueeze(-1), 0)


class Pick(Rule):
    """One result of several."""

    curved: ClassVar[bool] = False

    def push(self, call: Call) -> Tangents:
        """See `Rule`."""
        source, index = call.node.args
        picked = {i: tangent[index] for i, tangent in call.tangents_of(source).items()}
        return {i: tangent for i, tangent in picked.items() if tangent is not None}


# --- Pointwise


@dataclass(frozen=True)
class Pointwise(Rule):
    """A function of each element of the first argument, the others held: φ, with φ' and φ'' by autodiff."""

    def fits(self, node: fx.Node, moved: list[fx.Node]) -> bool:
        """See `Rule`."""
        # Another argument may have more axes than the first one.
        return moved == [node.args[0]] and value_of(moved[0]).shape == value_of(node).shape

    def push(self, call: Call) -> Tangents:
        """See `Rule`."""
        slope = _pointwise_derivatives(call, 1)[0]
        return {i: slope * tangent for i, tangent in call.tangents_of(call.node.args[0]).items()}

    def contract(self, call: Call, contributions: Contributions) -> None:
        """See `Rule`."""
        bend = _pointwise_derivatives(call, 2)[1]
        if bend is None:
            return
        tangents = call.tangents_of(call.node.args[0])
        contributions.add(tangents, tangents, weighted_gram(call.adjoint * bend, tangents) / 2)


def _pointwise_derivatives(call: Call, order: int) -> tuple[Tensor, Tensor | None]:
    source = call.node.all_input_nodes[0]
    leaf = call.values[source].detach().requires_grad_()
    values = {node: call.values[node] for node in call.node.all_input_nodes} | {source: leaf}
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(evaluate(call.node, values).sum(), leaf, create_graph=order > 1)
        if order == 1 or not slope.requires_grad:
            return slope.detach(), None
        (bend,) = torch.autograd.grad(slope.sum(), leaf, allow_unused=True)
    return slope.detach(), bend


@dataclass(frozen=True)
class PiecewiseLinear(Pointwise):
    """A pointwise function whose second derivative is zero wherever it has one."""

    curved: ClassVar[bool] = False


class Rectifier(Rule):
    """max(x, 0), its derivative at zero taken as zero, as torch does."""

    curved: ClassVar[bool] = False

    def push(self, call: Call) -> Tangents:
        """See `Rule`."""
        output = call.output.detach()
        return {
            i: aten.threshold_backward.default(aligned(tangent, output), output, 0)
            for i, tangent in call.tangents_of(call.node.args[0]).items()
        }


class MaxPooling(Rule):
    """The largest element of each window: its tangent is the tangent at the place that was chosen."""

    curved: ClassVar[bool] = False

    def __init__(self, spatial: int):
        self.spatial = spatial

    def push(self, call: Call) -> Tangents:
        """See `Rule`."""
        chosen = call.output[1]
        flat = chosen.flatten(-self.spatial)

        def pick(tangent: Tensor) -> Tensor:
            return tangent.flatten(-self.spatial).gather(-1, flat).view(chosen.shape)

        return {i: (pick(tangent), None) for i, tangent in call.tangents_of(call.node.args[0]).items()}


class Selection(Rule):
    """Elements chosen along an axis, with their places: the largest, the sorted, the middle one."""

    curved: ClassVar[bool] = False

    def fits(self, node: fx.Node, moved: list[fx.Node]) -> bool:
        """See `Rule`."""
        return value_of(moved[0]).ndim > 0

    def push(self, call: Call) -> Tangents:
        """See `Rule`."""
        axis, chosen = call.argument("dim"), call.output[1]

        def pick(tangent: Tensor) -> Tensor:
            if chosen.ndim < tangent.ndim:
                return tangent.gather(axis, chosen.unsqueeze(axis)).squeeze(axis)
            return tangent.gather(axis, chosen)

        return {i: (pick(tangent), None) for i, tangent in call.tangents_of(call.node.args[0]).items()}


# --- Softmax and its logarithm


class Softmax(Rule):
    """y = softmax(x):  Dy[u] = y (u − ū),  ⟨g, D²y[u, v]⟩ = Σ (g − ḡ) y (u − ū)(v − v̄), where x̄ = Σ y x."""

    def push(self, call: Call) -> Tangents:
        """See `Rule`."""
        y = call.output.detach()
        return {i: y * u for i, u in _centered(call, y).items()}

    def contract(self, call: Call, contributions: Contributions) -> None:
        """See `Rule`."""
        y, g = call.output.detach(), call.adjoint
        weight = (g - (y * g).sum(_axis(call), keepdim=True)) * y
        tangents = _centered(call, y)
        contributions.add(tangents, tangents, weighted_gram(weight, tangents) / 2)


class LogSoftmax(Rule):
    """y = log softmax(x), p = softmax(x):  Dy[u] = u − ū,  ⟨g, D²y[u, v]⟩ = −(Σ g) Σ p (u − ū)(v − v̄)."""

    def push(self, call: Call) -> Tangents:
        """See `Rule`."""
        return _centered(call, call.output.detach().exp())

    def contract(self, call: Call, contributions: Contributions) -> None:
        """See `Rule`."""
        p = call.output.detach().exp()
        weight = -call.adjoint.sum(_axis(call), keepdim=True) * p
        tangents = _centered(call, p)
        contributions.add(tangents, tangents, weighted_gram(weight, tangents) / 2)


def _axis(call: Call) -> int:
    return call.value(1)


def _centered(call: Call, weights: Tensor) -> dict[int, Tensor]:
    tangents = call.tangents_of(call.node.args[0])
    return {i: u - (weights * u).sum(_axis(call), keepdim=True) for i, u in tangents.items()}


# --- The table

_LINEAR = """
    view reshape _unsafe_view _reshape_alias permute transpose t expand slice select squeeze unsqueeze clone alias
    neg sum mean cumsum flip roll repeat diagonal diag_embed trace take tril triu unfold split split_with_sizes
    unsafe_split unsafe_split_with_sizes unsafe_chunk unbind narrow movedim index index_select gather nll_loss_forward
    nll_loss2d_forward _to_copy lift_fresh_copy view_as avg_pool2d avg_pool3d _adaptive_avg_pool2d
    _adaptive_avg_pool3d reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
    replication_pad3d im2col col2im pixel_shuffle pixel_unshuffle channel_shuffle upsample_nearest1d
    upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d
    _upsample_bilinear2d_aa _upsample_bicubic2d_aa adaptive_avg_pool1d avg_pool1d max_unpool2d
    max_unpool3d div
""".split()  # noqa: SIM905

_POINTWISE = """
    gelu silu sigmoid tanh exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal pow square sin cos tan asin
    acos atan sinh cosh asinh acosh atanh erf erfc softplus elu celu mish hardswish logit sinc
    erfinv lgamma digamma
""".split()  # noqa: SIM905

_PIECEWISE = """
    leaky_relu hardtanh hardsigmoid abs clamp clamp_min clamp_max threshold hardshrink softshrink
    nan_to_num frac fmod remainder
""".split()  # noqa: SIM905

_FLAT = """
    maximum minimum fmax fmin amax amin aminmax max min median nanmedian copysign
""".split()  # noqa: SIM905

_CONSTANT = """
    sign sgn floor ceil round trunc floor_divide heaviside zeros_like ones_like full_like empty_like new_zeros new_ones
    new_full new_empty div.Tensor_mode div.Scalar_mode
""".split()  # noqa: SIM905

_SELECTION = """
    max.dim min.dim median.dim nanmedian.dim mode kthvalue topk sort cummax cummin
""".split()  # noqa: SIM905

_SUM = Affine(_sum_part(1))
_RULES: dict[str, Rule] = {
    **dict.fromkeys(_LINEAR, Linear()),
    **dict.fromkeys(_POINTWISE, Pointwise()),
    **dict.fromkeys(_PIECEWISE, PiecewiseLinear()),
    **dict.fromkeys(_FLAT, FlatByAutodiff()),
    **dict.fromkeys(_CONSTANT, Constant()),
    **dict.fromkeys(_SELECTION, Selection()),
    **dict.fromkeys(["select_scatter", "slice_scatter", "diagonal_scatter", "lerp.Scalar"], JointlyLinear((0, 1))),
    **dict.fromkeys(["index_put", "masked_scatter"], JointlyLinear((0, 2))),
    **dict.fromkeys(["scatter.src", "scatter_add", "index_add", "index_copy"], JointlyLinear((0, 3))),
    "relu": Rectifier(),
    "add": _SUM,
    "sub": Affine(_sum_part(-1)),
    "rsub": Affine(_reversed_difference_part),
    "cat": Affine(_joined_part),
    "stack": Affine(_joined_part),
    "where": Affine(_where_part),
    "masked_fill": Affine(_masked_fill_part),
    "constant_pad_nd": Affine(_pad_part),
    "embedding": Affine(_embedding_part),
    "mul": PRODUCT,
    "convolution": CONVOLUTION,
    "mv": MATRIX_VECTOR,
    "dot": DOT,
    "mm": matrix_product(0, 1),
    "bmm": matrix_product(0, 1),
    "addmm": matrix_product(1, 2, added=0),
    "baddbmm": matrix_product(1, 2, added=0),
    "_softmax": Softmax(),
    "_safe_softmax": Softmax(),
    "_log_softmax": LogSoftmax(),
    "max_pool2d_with_indices": MaxPooling(2),
    "max_pool3d_with_indices": MaxPooling(3),
    "adaptive_max_pool2d": MaxPooling(2),
    "adaptive_max_pool3d": MaxPooling(3),
    "fractional_max_pool2d": MaxPooling(2),
    "fractional_max_pool3d": MaxPooling(3),
}
_BY_AUTODIFF = ByAutodiff()


def rule_of(node: fx.Node, moving: set[fx.Node]) -> Rule:
    """The rule of an operation, given which nodes depend on the directions."""
    if node.target is operator.getitem:
        return Pick()
    name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
    overload = getattr(node.target, "_overloadname", "")
    rule = _RULES.get(f"{name}.{overload}") or _RULES.get(name, _BY_AUTODIFF)
    moved = [argument for argument in node.all_input_nodes if argument in moving]
    return rule if rule.fits(node, moved) else _BY_AUTODIFF
