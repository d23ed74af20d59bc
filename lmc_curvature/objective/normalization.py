"""What batch normalisation does between two networks.

A normalisation module that tracks running statistics is a different function under each policy:

- `"interpolate"`: it normalises by its running statistics, which are part of the state and move with their
  layer. torch's `batch_norm` has no derivative in them, so the affine map is written out here.
- `"batch"`: it normalises by the statistics of the batch at hand, without updating the running ones.
- `"recalibrate"`: as `"interpolate"`, with statistics re-estimated over the loader at every point.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from lmc_curvature.errors import LoaderError

BatchNormPolicy = Literal["interpolate", "batch", "recalibrate"]
POLICIES: tuple[str, ...] = get_args(BatchNormPolicy)

# What a normalisation module does when it is called: normalise by its running statistics, by those of the
# batch, or by those of the batch while reporting them.
Statistics = Literal["running", "batch", "record"]


def tracked_modules(model: nn.Module) -> Iterator[tuple[str, _NormBase]]:
    """Yield (name, module) for every batch or instance normalisation that tracks running statistics."""
    for name, module in model.named_modules():
        if isinstance(module, _NormBase) and module.running_mean is not None:
            yield name, module


def statistic_names(module_name: str) -> tuple[str, str]:
    """Entry names of the running mean and variance of the module called `module_name`."""
    prefix = f"{module_name}." if module_name else ""
    return f"{prefix}running_mean", f"{prefix}running_var"


class NormalizationControl:
    """Decides, for all normalisation modules of one network at once, which statistics they use.

    `statistics` may be changed between calls. While it is `"record"`, every call of a module adds the mean and
    the unbiased variance of its input channels to `recorded`, by module name.
    """

    def __init__(self, network: nn.Module):
        self.statistics: Statistics = "running"
        self.recorded: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for name, module in tracked_modules(network):
            # The instance's own forward stays in charge (subclasses add activations, say); only the
            # functional call inside it is redirected, and only there, so other modules pay nothing.
            module.forward = self._controlled(module.forward, name)

    def _controlled(self, forward: Callable[..., Any], name: str) -> Callable[..., Any]:
        def controlled_forward(*args: Any, **kwargs: Any) -> Any:
            with _RedirectedNormalization(self, name):
                return forward(*args, **kwargs)

        return controlled_forward


class _RedirectedNormalization(TorchFunctionMode):
    """Replaces torch's functional normalisation by the one that the control asks for."""

    def __init__(self, control: NormalizationControl, module_name: str):
        super().__init__()
        self.control = control
        self.module_name = module_name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return self._batch_norm(*args, **kwargs)
        if func is F.instance_norm:
            return self._instance_norm(*args, **kwargs)
        return func(*args, **kwargs)

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if self.control.statistics == "running" and running_mean is not None and running_var is not None:
            return normalize_by(input, running_mean, running_var, weight, bias, eps)
        if input.numel() == input.shape[1]:
            raise LoaderError(
                f"Module {self.module_name!r} has one value a channel (input of shape {tuple(input.shape)}), and no "
                "variance: batch statistics need batches of at least two examples. Use drop_last=True, another batch "
                "size, or batch_norm='interpolate'."
            )
        if self.control.statistics == "record":
            axes = [axis for axis in range(input.ndim) if axis != 1]
            variance, mean = torch.var_mean(input, dim=axes)
            self.control.recorded.setdefault(self.module_name, []).append((mean, variance))
        return F.batch_norm(input, None, None, weight, bias, training=True, momentum=momentum, eps=eps)

    def _instance_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        use_input_stats: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if self.control.statistics == "running" and running_mean is not None and running_var is not None:
            return normalize_by(input, running_mean, running_var, weight, bias, eps)
        if self.control.statistics == "record":
            axes = list(range(2, input.ndim))
            variance, mean = torch.var_mean(input, dim=axes)
            self.control.recorded.setdefault(self.module_name, []).append((mean.mean(0), variance.mean(0)))
        return F.instance_norm(input, None, None, weight, bias, use_input_stats=True, momentum=momentum, eps=eps)


def normalize_by(
    input: Float[Tensor, "batch channels *positions"],
    mean: Float[Tensor, " channels"],
    variance: Float[Tensor, " channels"],
    weight: Float[Tensor, " channels"] | None,
    bias: Float[Tensor, " channels"] | None,
    eps: float,
) -> Float[Tensor, "batch channels *positions"]:
    """Normalise by given statistics, differentiably in all of them (Ioffe & Szegedy 2015, Algorithm 2).

    Mean, variance, weight and bias are folded into a scale and a shift per channel first, which takes one pass over
    the input, or two where it is differentiated.
    """
    scale = torch.rsqrt(variance + eps)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias
    shape = (1, -1) + (1,) * (input.ndim - 2)
    scale, shift = scale.view(shape), shift.view(shape)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (input, scale, shift)):
        # A product and a sum, whose derivatives take fewer passes than those of both in one.
        return (input * scale).add_(shift)
    return torch.addcmul(shift, input, scale)
