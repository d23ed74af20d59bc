"""Convolutions whose second derivative costs convolutions only.

torch differentiates the weight gradient of a convolution by convolving with a kernel as large as an image, group by
group; the same derivatives are plain convolutions and plain gradients of convolutions. With y = w * x,

    backward of y:               x̄ = ∂⟨ȳ, w * x⟩/∂x,    w̄ = ∂⟨ȳ, w * x⟩/∂w
    backward of (x̄, w̄) by (u, a):   of ȳ: w * u + a * x,    of x: ∂⟨ȳ, a * x⟩/∂x,    of w: ∂⟨ȳ, w * u⟩/∂w

because (x̄, w̄) is bilinear in ȳ and (w, x). The last two are one call: the gradient of the convolution a * u by ȳ.

Rectifiers go with them: torch's backward pass through a rectifier's gradient makes an image of zeros, the derivative in
where the rectifier is open, and adds it up with the rest.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lmc_curvature.objective.kernels import right_kernel

_CONVOLUTIONS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
# A rectifier in place keeps torch's own derivatives.
_RECTIFIERS = (F.relu, torch.relu, Tensor.relu)


class DifferentiableConvolutions(TorchFunctionMode):
    """Within the block, convolutions and rectifiers are recorded so that they differentiate twice at little cost.

    Attributes:
        is_linear: Whether the backward pass under way differentiates gradients in their slopes alone.
        wants_values: Whether the gradients of the backward pass under way are asked for, or their derivatives alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self._left_out: set[int] = set()
        self.is_linear, self.wants_values = False, True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CONVOLUTIONS:
            return _convolve(self, func, *args, **(kwargs or {}))
        if func in _RECTIFIERS and len(args) == 1 and not any((kwargs or {}).values()) and _is_plain(args[0]):
            return _Rectifier.apply(args[0])
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def backward(
        self, *, without: Iterable[Tensor] = (), linear: bool = False, with_values: bool = True
    ) -> Iterator[None]:
        """Within the block, backward passes leave derivatives out that they do not need.

        torch's own operations know which derivatives a pass needs; others know only which it could need.

        Args:
            without: Leaves that no derivative is taken in.
            linear: Differentiate gradients in the slope that they were given, and in nothing else. That is enough for
                the derivative of Jᵀu in the cotangent u, and as much work as a forward pass of tangents.
            with_values: Compute the gradients, and not only what differentiates them again: else those in weights of
                convolutions may be not-a-number.
        """
        self._left_out, self.is_linear, self.wants_values = {id(weight) for weight in without}, linear, with_values
        try:
            yield
        finally:
            self._left_out, self.is_linear, self.wants_values = set(), False, True

    def needs(self, weight: Tensor) -> bool:
        """Whether the backward pass under way needs a derivative in a weight."""
        return id(weight) not in self._left_out


def _convolve(
    mode: DifferentiableConvolutions,
    func: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    dimensions = _CONVOLUTIONS[func]
    input, stride = right_kernel(input, weight, stride, padding)
    fits = input.ndim == weight.ndim == dimensions + 2 and input.dtype == weight.dtype and not isinstance(padding, str)
    if not (fits and _is_plain(input)):
        return func(input, weight, bias, stride, padding, dilation, groups)
    lists = [[value] * dimensions if isinstance(value, int) else list(value) for value in (stride, padding, dilation)]
    return _Convolution.apply(input, weight, bias, (*lists, False, [0] * dimensions, groups), mode)


def _is_plain(input: Tensor) -> bool:
    return (
        type(input) is Tensor
        and input.is_floating_point()
        # These replace operations underneath, and know torch's own better than ours.
        and not torch.is_autocast_enabled(input.device.type)
        and not torch._C._are_functorch_transforms_active()
    )


# The geometry of a convolution is what `aten::convolution` takes after its bias.


def _gradients(slope: Tensor, x: Tensor, w: Tensor, geometry: tuple, in_x: bool, in_w: bool) -> tuple:
    """Derivatives of ⟨slope, w * x⟩ in x and in w; None for one that is not asked for."""
    found = torch.ops.aten.convolution_backward(slope, x, w, None, *geometry, [in_x, in_w, False])
    return found[0] if in_x else None, found[1] if in_w else None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, w: Tensor, bias: Tensor | None, geometry: tuple, mode: DifferentiableConvolutions) -> Tensor:
        return torch.ops.aten.convolution(x, w, bias, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        x, w, _, ctx.geometry, ctx.mode = inputs
        ctx.save_for_backward(x, w)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> tuple:
        (slope,) = slopes
        for_x, for_w, for_bias, *_ = ctx.needs_input_grad
        x, w = ctx.saved_tensors
        for_w = for_w and ctx.mode.needs(w)
        # What follows the gradient in another tensor than an entry may compute with it.
        with_values = ctx.mode.wants_values or not w.is_leaf
        in_x, in_w = _ConvolutionGradients.apply(slope, x, w, ctx.geometry, ctx.mode, for_x, for_w, with_values)
        in_bias = slope.sum((0, *range(2, slope.ndim))) if for_bias else None
        return in_x, in_w, in_bias, None, None


class _ConvolutionGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        slope: Tensor,
        x: Tensor,
        w: Tensor,
        geometry: tuple,
        mode: DifferentiableConvolutions,
        for_x: bool,
        for_w: bool,
        with_values: bool,
    ) -> tuple:
        in_x, in_w = _gradients(slope, x, w, geometry, for_x, for_w and with_values)
        return in_x, w.new_full((), math.nan).expand_as(w) if for_w and not with_values else in_w

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        slope, x, w, ctx.geometry, ctx.mode, *_ = inputs
        ctx.save_for_backward(slope, x, w)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple:
        u, a = cotangents
        slope, x, w = ctx.saved_tensors
        _, for_x, for_w, *_ = ctx.needs_input_grad
        in_slope, in_x, in_w = None, None, None
        if u is not None:
            in_slope = torch.ops.aten.convolution(u, w, None, *ctx.geometry)
        if a is not None:
            through_weight = torch.ops.aten.convolution(x, a, None, *ctx.geometry)
            in_slope = through_weight if in_slope is None else in_slope + through_weight
        for_x, for_w = for_x and a is not None, for_w and u is not None and ctx.mode.needs(w)
        if (for_x or for_w) and not ctx.mode.is_linear:
            in_x, in_w = _gradients(slope, x if u is None else u, w if a is None else a, ctx.geometry, for_x, for_w)
        return in_slope, in_x, in_w, None, None, None, None, None


class _Rectifier(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.ops.aten.relu(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        (output,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(slopes[0], output.detach(), 0)
