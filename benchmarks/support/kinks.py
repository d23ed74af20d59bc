"""Examples that are far from the kinks of a network's ReLUs.

Where rounding moves a unit across zero, second derivatives jump: two roads that compute the same in exact arithmetic
then differ by far more than rounding, and the error of either says nothing. Such examples are left out.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_CHUNK = 32


def far_from_kinks(model: nn.Module, x: Tensor, count: int) -> Tensor:
    """Indices of the examples that are furthest from a kink, in their order.

    An example's distance is the smallest, over all units, of what goes into the ReLU over what rounding does to it:
    the difference between double and single precision, the latter with contiguous and with channels-last images.

    Args:
        model: A network in evaluation mode, in single precision.
        x: Its inputs.
        count: Number of examples to choose.
    """
    exact = copy.deepcopy(model).double()
    distances = torch.cat([_distances(model, exact, part) for part in x.split(_CHUNK)])
    return distances.topk(count).indices.sort().values


def _distances(model: nn.Module, exact: nn.Module, x: Tensor) -> Tensor:
    reference = _before_relus(exact, x.double())
    variants = [x, x.contiguous(memory_format=torch.channels_last)] if x.ndim == 4 else [x]
    rounded = [_before_relus(model, variant) for variant in variants]
    distances = torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
    for unit, *others in zip(reference, *rounded, strict=True):
        rounding = torch.stack([(other - unit).abs() for other in others]).amax(0)
        ratios = torch.where(rounding > 0, unit.abs() / rounding, torch.inf)
        distances = torch.minimum(distances, ratios.flatten(1).amin(1))
    return distances


def _before_relus(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The inputs of every ReLU."""
    with torch.no_grad(), _Recorder() as recorder:
        model(x)
    return recorder.inputs


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.relu:
            # A copy: it may be overwritten.
            self.inputs.append(args[0].detach().clone())
        return func(*args, **(kwargs or {}))
