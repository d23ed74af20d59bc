"""Plain calls while differentiating: no checkpoints, nothing compiled, and functions of torch that are written out.

Those are the functions whose derivatives in torch are missing, not a number, or not those of what they compute.
"""

import contextlib
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from lmc_curvature.objective.kernels import right_kernel
from lmc_curvature.objective.likelihoods import gaussian_nll_loss
from lmc_curvature.objective.normalization import batch_norm


@contextlib.contextmanager
def plain_calls() -> Iterator[None]:
    """Within the block, checkpoints and compiled functions are plain calls, and some functions are written out."""
    with one_function(), _eager_calls(), _FunctionReplacer():
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


@dataclass(eq=False)
class _Switches:
    """Attributes of modules of torch that have other values within blocks, which may overlap between threads.

    Attributes:
        values: The module and its attributes with their values within the blocks.
    """

    values: Sequence[tuple[Any, Mapping[str, Any]]]
    _before: list[tuple[Any, str, Any]] = field(default_factory=list)
    _blocks: int = 0
    _lock: Any = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            self._blocks += 1
            if self._blocks == 1:
                pairs = [(module, name) for module, names in self.values for name in names if hasattr(module, name)]
                self._before = [(module, name, getattr(module, name)) for module, name in pairs]
                for module, names in self.values:
                    for name, value in names.items():
                        if hasattr(module, name):
                            setattr(module, name, value)
        try:
            yield
        finally:
            with self._lock:
                self._blocks -= 1
                if not self._blocks:
                    for module, name, value in self._before:
                        setattr(module, name, value)


one_function = _Switches(
    [
        (torch.utils.checkpoint, _CHECKPOINTS),
        (torch.backends.mha, {"_is_fastpath_enabled": False}),
        (torch.nn.utils.parametrize, {"_cache_enabled": 0}),
    ]
)
"""Within the block, a network is the same function with gradients and without, and of the state at hand alone.

`torch.utils.checkpoint` calls regions and keeps their values, which are computed again during the backward pass
otherwise, when the state is no longer in the network. Torch's transformer layers never take their fast path, which is
for evaluations without gradients and writes zeros where a mask pads, as the path that can be differentiated does not.
`torch.nn.utils.parametrize.cached`, which keeps weights by their module whatever the state, is off.
"""


class _FunctionReplacer(TorchFunctionMode):
    """Replaces functions of torch whose derivatives are missing, not a number, or not those of the function."""

    def __init__(self) -> None:
        super().__init__()
        self._lengths = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._lengths and func in _POWERS and (square := self._square(_POWERS[func], args, kwargs)) is not None:
            return square
        result = _apply(_REPLACEMENTS[func], args, kwargs) if func in _REPLACEMENTS else NotImplemented
        found = func(*args, **kwargs) if result is NotImplemented else result
        if func in _SQUARED_LENGTHS and isinstance(found, Tensor) and not found.is_inference():
            given = (each for each in (*args, *kwargs.values()) if isinstance(each, Tensor) and not each.is_inference())
            of = [(each, each._version) for each in given]
            self._lengths[found] = (found._version, of, lambda: _apply(_SQUARED_LENGTHS[func], args, kwargs))
        return found

    def _square(self, base_of: Callable[..., Any], args: Any, kwargs: Any) -> Tensor | None:
        """The square of a length, from what that is the length of; None for any other power or product.

        At zero a length has no derivatives, and its square has.
        """
        x = _apply(base_of, args, kwargs)
        if not isinstance(x, Tensor) or x not in self._lengths:
            return None
        version, of, make = self._lengths[x]
        if x._version != version or any(each._version != before for each, before in of):
            return None
        square = make()
        return square if isinstance(square, Tensor) and square.shape == x.shape else None


# What torch's parser takes for the names of arguments, besides them.
_SYNONYMS = {"axis": "dim", "keepdims": "keepdim", "x": "input", "a": "input", "x1": "input", "x2": "other"}
_signature = functools.lru_cache(maxsize=None)(inspect.signature)


def _apply(function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    """What a function makes of the arguments of one of torch; NotImplemented for arguments that it does not have."""
    signature = _signature(function)
    named = {name if name in signature.parameters else _SYNONYMS.get(name, name): kwargs[name] for name in kwargs}
    try:
        bound = signature.bind(*args, **named)
    except TypeError:
        return NotImplemented
    return function(*bound.args, **bound.kwargs)


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    return input.div_(6).add_(0.5).clamp_(0, 1) if inplace else torch.clamp(input / 6 + 0.5, 0, 1)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    # Wrong without a word: the second derivative of the fused operation lacks terms.
    return v * (g / torch.norm_except_dim(v, 2, dim))


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


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    input, stride = right_kernel(input, weight, stride, padding)
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _vector_norm(
    input: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, out: Any = None
):
    if ord != 2 or out is not None or not input.is_floating_point():
        return NotImplemented
    input = input if dtype is None else input.to(dtype)
    zero = torch.linalg.vector_norm(input.detach(), dim=dim, keepdim=True) == 0
    # The derivatives of a square root at zero are infinite, also where a mask drops them later.
    length = torch.linalg.vector_norm(torch.where(zero, 1.0, input), dim=dim, keepdim=True).masked_fill(zero, 0.0)
    if keepdim:
        return length
    axes = range(input.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    return length.squeeze(tuple(axes))


def _norm(input: Tensor, p: Any = "fro", dim: Any = None, keepdim: bool = False, out: Any = None, dtype: Any = None):
    # Without axes, and for "fro", the entries are one vector.
    return _vector_norm(input, 2 if p in ("fro", None) else p, dim, keepdim, dtype=dtype, out=out)


def _linalg_norm(
    input: Tensor, ord: Any = None, dim: Any = None, keepdim: bool = False, *, out: Any = None, dtype: Any = None
):
    is_vector = ord in (None, "fro") or (ord == 2 and (isinstance(dim, int) or (dim is None and input.ndim == 1)))
    return _vector_norm(input, 2, dim, keepdim, dtype=dtype, out=out) if is_vector else NotImplemented


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
    F.conv2d: _conv2d,
    torch.norm: _norm,
    Tensor.norm: _norm,
    torch.linalg.norm: _linalg_norm,
    torch.linalg.vector_norm: _vector_norm,
    F.normalize: _normalize,
    F.cosine_similarity: _cosine_similarity,
    F.gaussian_nll_loss: gaussian_nll_loss,
    F.batch_norm: batch_norm,
}


def _base_of_square(input: Any) -> Any:
    return input


def _base_of_power(input: Any, exponent: Any) -> Any:
    return input if isinstance(exponent, (int, float)) and exponent == 2 else NotImplemented


def _base_of_product(input: Any, other: Any) -> Any:
    return input if other is input else NotImplemented


_POWERS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys([torch.square, Tensor.square], _base_of_square),
    **dict.fromkeys([torch.pow, Tensor.pow, Tensor.__pow__], _base_of_power),
    **dict.fromkeys([torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__], _base_of_product),
}
"""Powers and products, and what they square, if anything."""


def _vector_square(
    input: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, out: Any = None
) -> Any:
    if ord != 2 or out is not None:
        return None
    square = _absolute_square(input if dtype is None else input.to(dtype))
    return square.sum() if dim is None and not keepdim else square.sum(dim, keepdim=keepdim)


def _norm_square(
    input: Tensor, p: Any = "fro", dim: Any = None, keepdim: bool = False, out: Any = None, dtype: Any = None
) -> Any:
    return _vector_square(input, 2 if p in ("fro", None) else p, dim, keepdim, dtype=dtype, out=out)


def _linalg_square(
    input: Tensor, ord: Any = None, dim: Any = None, keepdim: bool = False, *, out: Any = None, dtype: Any = None
) -> Any:
    is_vector = ord in (None, "fro") or (ord == 2 and (isinstance(dim, int) or (dim is None and input.ndim == 1)))
    return _vector_square(input, 2, dim, keepdim, dtype=dtype, out=out) if is_vector else None


def _matrix_square(
    input: Tensor, ord: Any = "fro", dim: Any = (-2, -1), keepdim: bool = False, *, dtype: Any = None, out: Any = None
) -> Any:
    return _vector_square(input, 2, dim, keepdim, dtype=dtype, out=out) if ord == "fro" else None


def _absolute_square(input: Tensor, out: Any = None) -> Any:
    if out is not None:
        return None
    return input.real.square() + input.imag.square() if input.is_complex() else input.square()


_MANY_ROWS = 25


def _distance_squares(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: Any = None) -> Any:
    if p != 2:
        return None
    if max(x1.shape[-2], x2.shape[-2]) > _MANY_ROWS and compute_mode != "donot_use_mm_for_euclid_dist":
        # All differences at once might not fit into memory; torch computes so, too.
        squares = x1.square().sum(-1).unsqueeze(-1) + x2.square().sum(-1).unsqueeze(-2)
        squares = squares - 2 * (x1 @ x2.mT)
        # Rounding makes some negative, which torch lifts to zero; their derivatives are not zero.
        return squares + (squares.clamp_min(0) - squares).detach()
    return (x1.unsqueeze(-2) - x2.unsqueeze(-3)).square().sum(-1)


def _pair_squares(input: Tensor, p: float = 2.0) -> Any:
    first, second = torch.triu_indices(len(input), len(input), 1, device=input.device)
    return (input[first] - input[second]).square().sum(-1) if p == 2 else None


def _distance_square(input: Tensor, other: Tensor, p: float = 2.0) -> Any:
    return _absolute_square(input - other).sum() if p == 2 else None


_SQUARED_LENGTHS: dict[Any, Callable[..., Any]] = {
    torch.norm: _norm_square,
    Tensor.norm: _norm_square,
    torch.linalg.norm: _linalg_square,
    torch.linalg.vector_norm: _vector_square,
    torch.linalg.matrix_norm: _matrix_square,
    torch.abs: _absolute_square,
    torch.absolute: _absolute_square,
    Tensor.abs: _absolute_square,
    Tensor.__abs__: _absolute_square,
    torch.cdist: _distance_squares,
    torch.pdist: _pair_squares,
    F.pdist: _pair_squares,
    torch.dist: _distance_square,
    Tensor.dist: _distance_square,
}
"""Lengths, and what their squares are written as: the derivatives of a square at zero are lost with the length's."""
