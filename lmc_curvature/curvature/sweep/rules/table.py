"""The rule of each operation of a captured graph: linear, bilinear, pointwise, a selection, or anything else.

An operation without a rule of its own goes by `ByAutodiff`, which is right for every operation that torch can
differentiate twice; the others are there because they are faster.
"""

import operator

from torch import Tensor, fx

from lmc_curvature.curvature.sweep.capture import value_of
from lmc_curvature.curvature.sweep.rules import autodiff, bilinear, convolution, linear, pointwise, selection, softmax
from lmc_curvature.curvature.sweep.rules.rule import Rule

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
    max_unpool3d div _fft_r2c _fft_c2r _fft_c2c view_as_real view_as_complex
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

_FIRST_ORDER = """
    maximum minimum fmax fmin amax amin aminmax max min median nanmedian copysign
""".split()  # noqa: SIM905

_CONSTANT = """
    sign sgn floor ceil round trunc floor_divide heaviside zeros_like ones_like full_like empty_like new_zeros new_ones
    new_full new_empty div.Tensor_mode div.Scalar_mode
""".split()  # noqa: SIM905

_SELECTION = """
    max.dim min.dim median.dim nanmedian.dim mode kthvalue topk sort cummax cummin
""".split()  # noqa: SIM905

_RULES: dict[str, Rule] = {
    **dict.fromkeys(_LINEAR, linear.Linear()),
    **dict.fromkeys(_POINTWISE, pointwise.Pointwise()),
    **dict.fromkeys(_PIECEWISE, pointwise.PiecewiseLinear()),
    **dict.fromkeys(_FIRST_ORDER, autodiff.FirstOrderByAutodiff()),
    **dict.fromkeys(_CONSTANT, linear.Constant()),
    **dict.fromkeys(_SELECTION, selection.Selection()),
    **dict.fromkeys(
        ["select_scatter", "slice_scatter", "diagonal_scatter", "lerp.Scalar", "complex"], linear.Linear((0, 1))
    ),
    **dict.fromkeys(["index_put", "masked_scatter"], linear.Linear((0, 2))),
    **dict.fromkeys(["scatter.src", "scatter_add", "index_add", "index_copy"], linear.Linear((0, 3))),
    "relu": pointwise.Rectifier(),
    "add": linear.SUM,
    "sub": linear.DIFFERENCE,
    "rsub": linear.REVERSED_DIFFERENCE,
    "cat": linear.CONCATENATION,
    "stack": linear.CONCATENATION,
    "where": linear.WHERE,
    "masked_fill": linear.MASKED_FILL,
    "constant_pad_nd": linear.PADDING,
    "embedding": linear.EMBEDDING,
    "mul": bilinear.PRODUCT,
    "convolution": convolution.CONVOLUTION,
    "mm": bilinear.matrix_product(0, 1),
    "bmm": bilinear.matrix_product(0, 1),
    "addmm": bilinear.matrix_product(1, 2, added=0),
    "baddbmm": bilinear.matrix_product(1, 2, added=0),
    "_softmax": softmax.Softmax(),
    "_safe_softmax": softmax.Softmax(),
    "_log_softmax": softmax.LogSoftmax(),
    "max_pool2d_with_indices": selection.MaxPooling(2),
    "max_pool3d_with_indices": selection.MaxPooling(3),
    "adaptive_max_pool2d": selection.MaxPooling(2),
    "adaptive_max_pool3d": selection.MaxPooling(3),
    "fractional_max_pool2d": selection.MaxPooling(2),
    "fractional_max_pool3d": selection.MaxPooling(3),
}
_BY_AUTODIFF = autodiff.ByAutodiff()


def rule_of(node: fx.Node, active: set[fx.Node]) -> Rule:
    """The rule of an operation, given which nodes depend on the directions."""
    if node.target is operator.getitem:
        return selection.Pick()
    name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
    overload = getattr(node.target, "_overloadname", "")
    rule = _RULES.get(f"{name}.{overload}") or _RULES.get(name, _BY_AUTODIFF)
    moved = [argument for argument in node.all_input_nodes if argument in active]
    # What is linear in complex numbers is linear in their parts, too; most other rules take numbers for real.
    holds = isinstance(rule, linear.Linear) or not any(_is_complex(each) for each in (node, *moved))
    return rule if holds and rule.fits(node, moved) else _BY_AUTODIFF


def _is_complex(node: fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, Tensor) and value.is_complex()
