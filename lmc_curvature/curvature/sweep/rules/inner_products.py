"""Inner products of tangents, whatever their layout in memory; summed in single precision at least."""

import torch
from jaxtyping import Float
from torch import Tensor


def gram(left: Tensor, right: Tensor) -> Float[Tensor, "rows columns"]:
    """Inner products of every tangent of one stack with every one of another."""
    last = _has_channels_last(right)
    return torch.mm(_as_rows(left, last), _as_rows(right, last).t())


def weighted_gram(weight: Tensor, tangents: Tensor) -> Float[Tensor, "k k"]:
    """Σ weight · u_i · u_j for every pair of tangents of a stack."""
    last = _has_channels_last(tangents)
    rows = _as_rows(tangents, last)
    return torch.mm(rows * _as_rows(weight.expand(tangents.shape[1:]).unsqueeze(0), last), rows.t())


def _has_channels_last(tangents: Tensor) -> bool:
    return tangents.ndim == 5 and tangents.stride(2) == 1 and tangents.stride(4) == tangents.shape[2]


def _as_rows(tangents: Tensor, channels_last: bool) -> Float[Tensor, "k n"]:
    """A row a tangent, its elements in the order of memory where channels are or are not last there."""
    if channels_last:
        tangents = tangents.permute(0, 1, 3, 4, 2)
    return tangents.reshape(len(tangents), -1).to(wide(tangents))


def wide(tensor: Tensor) -> torch.dtype:
    """The type that sums over a tensor are kept in: single precision at least."""
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
