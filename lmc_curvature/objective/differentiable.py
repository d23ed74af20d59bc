"""Plain calls while differentiating: no checkpoints, nothing compiled, and functions of torch that are written out.

Those are the functions whose derivatives in torch are missing, not a number, or not those of what they compute.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def plain_calls() -> Iterator[None]:
    """Within the block, checkpoints and compiled functions are plain calls, and some functions are written out."""
    with plain_checkpoints(), _eager_calls(), _FunctionReplacer():
        yield


@contextlib.contextmanager
def _eager_calls() -> Iterator[None]:
    """Within the block, functions made by `torch.compile` are called as they were before."""
    # Who has compiled something has imported the compiler, which takes seconds.
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


class _PlainCall:
    """Stands in for torch's `CheckpointFunction`."""

    @staticmethod
    def apply(function: Callable[..., Any], _preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


def _nothing_around(*_args: Any, **_kwargs: Any) -> Iterator[None]:
    """Stands in for the generator of torch that surrounds the call of a checkpointed region."""
    yield


_CHECKPOINTS = {
    "CheckpointFunction": _PlainCall,
    "_checkpoint_without_reentrant_generator": _nothing_around,
    # Since torch 2.14.
    "_checkpoint_without_reentrant_generator_impl": _nothing_around,
}


@contextlib.contextmanager
def plain_checkpoints() -> Iterator[None]:
    """Within the block, `torch.utils.checkpoint` calls regions and keeps their values.

    Values are computed again during the backward pass otherwise, when the state at hand is no longer in the network.
    """
    module: Any = torch.utils.checkpoint
    before = {name: getattr(module, name) for name in _CHECKPOINTS if hasattr(module, name)}
    for name in before:
        setattr(module, name, _CHECKPOINTS[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


class _FunctionReplacer(TorchFunctionMode):
    """Replaces functions of torch whose derivatives are missing, not a number, or not those of the function."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        replacement = _REPLACEMENTS.get(func)
        result = NotImplemented if replacement is None else replacement(*args, **kwargs)
        return func(*args, **kwargs) if result is NotImplemented else result


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    return torch.clamp(input / 6 + 0.5, 0, 1)


def _weight_norm(weight: Tensor, length: Tensor, *axis: int) -> Tensor:
    # Wrong without a word: the second derivative of the fused operation lacks terms.
    return weight * (length / torch.norm_except_dim(weight, 2, *axis))


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    # The other options change the gradient and not the function.
    return torch.embedding(weight, input) if max_norm is None else NotImplemented


def _vector_norm(
    x: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, out: Any = None
):
    if ord != 2 or out is not None or not x.is_floating_point():
        return NotImplemented
    x = x if dtype is None else x.to(dtype)
    zero = torch.linalg.vector_norm(x.detach(), dim=dim, keepdim=True) == 0
    # The derivatives of a square root at zero are infinite, also where a mask drops them later.
    length = torch.linalg.vector_norm(torch.where(zero, 1.0, x), dim=dim, keepdim=True).masked_fill(zero, 0.0)
    if keepdim:
        return length
    axes = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    return length.squeeze(tuple(axes))


def _norm(input: Tensor, p: Any = "fro", dim: Any = None, keepdim: bool = False, out: Any = None, dtype: Any = None):
    # Without axes, and for "fro", the entries are one vector.
    return _vector_norm(input, 2 if p in ("fro", None) else p, dim, keepdim, dtype=dtype, out=out)


def _linalg_norm(
    A: Tensor, ord: Any = None, dim: Any = None, keepdim: bool = False, *, out: Any = None, dtype: Any = None
):
    is_vector = ord in (None, "fro") or (ord == 2 and (isinstance(dim, int) or (dim is None and A.ndim == 1)))
    return _vector_norm(A, 2, dim, keepdim, dtype=dtype, out=out) if is_vector else NotImplemented


def _normalize(input: Tensor, p: Any = 2.0, dim: int | Sequence[int] = 1, eps: float = 1e-12, out: Any = None) -> Any:
    length = _vector_norm(input, p, dim, True, out=out)
    return length if length is NotImplemented else input / length.clamp_min(eps)


def _cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Any:
    x1, x2 = torch.broadcast_tensors(x1, x2)
    first, second = _normalize(x1, 2.0, dim, eps), _normalize(x2, 2.0, dim, eps)
    return NotImplemented if first is NotImplemented or second is NotImplemented else (first * second).sum(dim)


_REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    F.hardsigmoid: _hardsigmoid,
    torch._weight_norm: _weight_norm,  # pyright: ignore[reportPrivateImportUsage]
    F.embedding: _embedding,
    torch.norm: _norm,
    Tensor.norm: _norm,
    torch.linalg.norm: _linalg_norm,
    torch.linalg.vector_norm: _vector_norm,
    F.normalize: _normalize,
    F.cosine_similarity: _cosine_similarity,
}
