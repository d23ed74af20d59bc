"""ATen operations written as others whose structure the rules of the sweep know."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _normalize(input: Tensor, axes: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean = input.mean(axes, keepdim=True)
    centered = input - mean
    rstd = torch.rsqrt((centered * centered).mean(axes, keepdim=True) + eps)
    return centered * rstd, mean, rstd


def _per_channel(parameter: Tensor, ndim: int) -> Tensor:
    return parameter.view(1, -1, *(1,) * (ndim - 2))


def _affine(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        input = input * weight
    return input if bias is None else input + bias


def _batch_statistics_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    axes = [axis for axis in range(input.ndim) if axis != 1]
    normalized, mean, rstd = _normalize(input, axes, eps)
    weight, bias = (None if each is None else _per_channel(each, input.ndim) for each in (weight, bias))
    return _affine(normalized, weight, bias), mean.flatten(), rstd.flatten()


def _running_statistics_norm(input, weight, bias, mean, variance, eps):
    # Detached, because torch has no derivative in them here; where there is to be one, it is written out.
    scale = torch.rsqrt(variance.detach() + eps)
    if weight is not None:
        scale = scale * weight
    shift = -mean.detach() * scale
    if bias is not None:
        shift = shift + bias
    return _affine(input, _per_channel(scale, input.ndim), _per_channel(shift, input.ndim))


def _native_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps):
    if training:
        return _batch_statistics_norm(input, weight, bias, eps)
    output = _running_statistics_norm(input, weight, bias, running_mean, running_var, eps)
    return output, input.new_empty(0), input.new_empty(0)


def _native_batch_norm_no_stats(input, weight, bias, training, momentum, eps):
    return _batch_statistics_norm(input, weight, bias, eps)


def _cudnn_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps):
    parts = _native_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)
    return (*parts, input.new_empty(0, dtype=torch.uint8))


def _native_layer_norm(input, normalized_shape, weight, bias, eps):
    axes = list(range(input.ndim - len(normalized_shape), input.ndim))
    normalized, mean, rstd = _normalize(input, axes, eps)
    return _affine(normalized, weight, bias), mean, rstd


def _native_group_norm(input, weight, bias, examples, channels, positions, groups, eps):
    normalized, mean, rstd = _normalize(input.reshape(examples, groups, -1), [2], eps)
    weight, bias = (None if each is None else _per_channel(each, input.ndim) for each in (weight, bias))
    return _affine(normalized.reshape(input.shape), weight, bias), mean.flatten(1), rstd.flatten(1)


def _div(input, other):
    if isinstance(other, Tensor) and other.is_floating_point() and other.ndim:
        return input * torch.reciprocal(other)
    return NotImplemented


def _addcmul(input, first, second, *, value=1):
    product = first * second
    return input + (product if value == 1 else product * value)


def _addcdiv(input, first, second, *, value=1):
    return _addcmul(input, first, torch.reciprocal(second), value=value)


def _copy(input, source, non_blocking=False):
    return source.to(input.dtype).expand(input.shape)


def _fill(input, value):
    return _copy(input, value) if isinstance(value, Tensor) else torch.full_like(input, value)


def _as_strided(input, size, stride, storage_offset=None):
    # Pooling restrides its result for the sake of the layout alone.
    same = tuple(size) == tuple(input.shape) and storage_offset in (None, input.storage_offset())
    strides = zip(size, stride, input.stride(), strict=True) if same else ()
    return aten.alias.default(input) if same and all(n == 1 or a == b for n, a, b in strides) else NotImplemented


def _prelu(input, weight):
    return torch.where(input > 0, input, input * weight)


def _rrelu_with_noise(input, noise, lower=0.125, upper=0.3333333333333333, training=False, generator=None):
    return NotImplemented if training else aten.leaky_relu.default(input, (lower + upper) / 2)


def _glu(input, dim=-1):
    linear, gate = input.chunk(2, dim)
    return linear * torch.sigmoid(gate)


def _var_mean(input, dim=None, *, correction=None, keepdim=False):
    if input.is_complex():
        return NotImplemented
    axes = list(dim) if dim else list(range(input.ndim))
    count = math.prod(input.shape[axis] for axis in axes)
    mean = input.mean(axes, keepdim=True)
    centered = input - mean
    total = (centered * centered).sum(axes, keepdim=keepdim)
    return total / max(count - (1 if correction is None else correction), 0), mean if keepdim else input.mean(axes)


def _mv(matrix, vector):
    return (matrix @ vector.unsqueeze(1)).squeeze(1)


def _dot(first, second):
    return (first * second).sum()


def _var(input, dim=None, *, correction=None, keepdim=False):
    if input.is_complex():
        return NotImplemented
    return _var_mean(input, dim, correction=correction, keepdim=keepdim)[0]


def _conj(input):
    # Written out, because a view that is conjugated whenever it is read has no parts.
    return torch.complex(input.real, -input.imag)


def _on_parts(scatter):
    """A change of some complex numbers as that of their parts, which autograd can follow."""

    def changed(input, source, dim=0, *places):
        if not input.is_complex():
            return NotImplemented
        parts = (torch.view_as_real(each.resolve_conj()) for each in (input, source))
        return torch.view_as_complex(scatter(*parts, dim % input.ndim, *places))

    return changed


def _mse_loss(input, target, reduction=1):
    error = input - target
    square = error * error
    return square if reduction == 0 else square.mean() if reduction == 1 else square.sum()


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.native_batch_norm.default: _native_batch_norm,
    aten._native_batch_norm_legit.default: _native_batch_norm,
    aten._native_batch_norm_legit.no_stats: _native_batch_norm_no_stats,
    aten.cudnn_batch_norm.default: _cudnn_batch_norm,
    aten.native_layer_norm.default: _native_layer_norm,
    aten.native_group_norm.default: _native_group_norm,
    aten.div.Tensor: _div,
    aten.addcmul.default: _addcmul,
    aten.addcdiv.default: _addcdiv,
    aten.copy.default: _copy,
    aten.fill.Scalar: _fill,
    aten.fill.Tensor: _fill,
    aten.zero.default: torch.zeros_like,
    aten.as_strided.default: _as_strided,
    aten._prelu_kernel.default: _prelu,
    aten.rrelu_with_noise.default: _rrelu_with_noise,
    aten.glu.default: _glu,
    aten.mv.default: _mv,
    aten.dot.default: _dot,
    aten.var.correction: _var,
    aten.var_mean.correction: _var_mean,
    aten.mse_loss.default: _mse_loss,
    aten._conj.default: _conj,
    aten._neg_view.default: torch.neg,
    aten.slice_scatter.default: _on_parts(aten.slice_scatter.default),
    aten.select_scatter.default: _on_parts(aten.select_scatter.default),
}
