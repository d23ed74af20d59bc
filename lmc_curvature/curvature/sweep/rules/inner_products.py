"""Inner products of tangents, whatever their layout in memory; summed in single precision at least."""

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor


def as_vector(tensor: Tensor) -> Float[Tensor, " n"]:
    """All elements in the order of memory where that is possible without a copy; two alike tensors come out alike."""
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.reshape(-1)


def aligned(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` in the memory layout of `like`."""
    if like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last):
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.contiguous()


def inner_with_each(tensor: Tensor, others: Iterable[Tensor]) -> Float[Tensor, " k"]:
    """Inner products of a tensor with every other one."""
    vectors = [as_vector(aligned(other, tensor)) for other in others]
    vector = as_vector(aligned(tensor, tensor))
    dtype = wide(vector)
    return torch.stack([torch.dot(vector.to(dtype), other.to(dtype)) for other in vectors])


def weighted_gram(weight: Tensor, tangents: Mapping[int, Tensor]) -> Float[Tensor, "k k"]:
    """Σ weight · u_i · u_j for every pair of tangents."""
    if not tangents:
        return weight.new_zeros(0, 0)
    first = next(iter(tangents.values()))
    rows = torch.stack([as_vector(aligned(tensor, first)) for tensor in tangents.values()]).to(wide(first))
    return (rows * as_vector(aligned(weight.expand(first.shape), first))) @ rows.T


def gram(left: list[Tensor], right: list[Tensor]) -> Float[Tensor, "rows columns"]:
    """Inner products of every tensor on the left with every tensor on the right."""
    dtype = wide(left[0])
    rows = torch.stack([as_vector(aligned(tensor, left[0])) for tensor in left]).to(dtype)
    columns = torch.stack([as_vector(aligned(tensor, left[0])) for tensor in right]).to(dtype)
    return rows @ columns.T


def wide(tensor: Tensor) -> torch.dtype:
    """The type that sums over a tensor are kept in: single precision at least."""
    return torch.promote_types(tensor.dtype, torch.float32)
