"""Inner products of tangents, whatever their layout in memory; summed in single precision at least."""

import torch
from jaxtyping import Float
from torch import Tensor

# Numbers of a stack that are multiplied at a time on a CPU.
_PART = 2**18


def gram(left: Tensor, right: Tensor) -> Float[Tensor, "rows columns"]:
    """Inner products of every tangent of one stack with every one of another."""
    last = _has_channels_last(right)
    return torch.mm(_as_rows(left, last), _as_rows(right, last).t())


def weighted_gram(weight: Tensor, tangents: Tensor) -> Float[Tensor, "k k"]:
    """Σ weight · u_i · u_j for every pair of tangents of a stack."""
    last = _has_channels_last(tangents)
    rows, weights = _as_rows(tangents, last), _as_rows(weight.expand(tangents.shape[1:]).unsqueeze(0), last)
    # On a CPU, part by part, so that the products stay in its cache.
    width = max(1, _PART // len(rows)) if rows.device.type == "cpu" else rows.shape[1]
    parts = zip(rows.split(width, 1), weights.split(width, 1), strict=True)
    total = rows.new_zeros(len(rows), len(rows))
    for part, weight_of_part in parts:
        total.addmm_(part * weight_of_part, part.t())
    return total


def _has_channels_last(tangents: Tensor) -> bool:
    return tangents.ndim == 5 and tangents.stride(2) == 1 and tangents.stride(4) == tangents.shape[2]


def _as_rows(tangents: Tensor, channels_last: bool) -> Float[Tensor, "k n"]:
    """A row a tangent, its elements in the order of memory where channels are or are not last there."""
    if channels_last:
        tangents = tangents.permute(0, 1, 3, 4, 2)
    if tangents.is_complex():
        # The inner product of complex numbers is that of their parts.
        tangents = torch.view_as_real(tangents.resolve_conj())
    return tangents.reshape(len(tangents), -1).to(wide(tangents))


def wide(tensor: Tensor) -> torch.dtype:
    """The type that sums over a tensor are kept in: single precision at least."""
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
