"""Affine modules inside a network, and their calls: what goes in and out, and the loss's gradient there.

A weight W that is used once enters the loss through one output z_p = W x_p + b, at positions p (one for a plain vector,
one a token, one a pixel). Everything about W's block of the Hessian is then in x and in derivatives in z.
"""

import contextlib
import functools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lmc_curvature.curvature.products import BatchGradient
from lmc_curvature.objective.batches import Batch
from lmc_curvature.objective.network import State, tied_names
from lmc_curvature.objective.numerics import wide_dtype
from lmc_curvature.objective.risk import Objective


@dataclass(frozen=True)
class AffineMap:
    """An affine module, and its entries in a layer.

    Attributes:
        module: An `nn.Linear` or an ungrouped `nn.Conv2d`.
        weight: Entry name of its weight; None if that is not in the layer.
        bias: Entry name of its bias; None if there is none in the layer.
    """

    module: nn.Module
    weight: str | None
    bias: str | None

    @property
    def entries(self) -> tuple[str, ...]:
        """Names of the entries that it has in the layer."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    @property
    def width(self) -> int:
        """Number of outputs at one position."""
        weight: Any = self.module.weight
        return weight.shape[0]

    def by_position(self, output: Tensor) -> Float[Tensor, "examples positions width"]:
        """The module's output, or a derivative in it."""
        if isinstance(self.module, nn.Conv2d):
            return output.flatten(2).transpose(1, 2)
        # Not -1 for the positions: there are calls without examples.
        return output.reshape(output.shape[0], math.prod(output.shape[1:-1]), output.shape[-1])

    def features(self, input: Tensor, *, constant: float = 1.0) -> Float[Tensor, "examples positions features"]:
        """The factors of the entries at each position: the module's input, or the patch that a convolution sees; and 1.

        Args:
            input: The module's input, or a derivative of it.
            constant: The factor of the bias.
        """
        input = input.detach().to(wide_dtype(input.dtype))
        if isinstance(self.module, nn.Conv2d):
            geometry: Any = (self.module.kernel_size, self.module.dilation, self.module.padding, self.module.stride)
            found = F.unfold(input, *geometry).transpose(1, 2)
        else:
            found = input.reshape(input.shape[0], -1, input.shape[-1])
        constants = torch.full_like(found[:, :, :1], constant)
        parts = [part for entry, part in ((self.weight, found), (self.bias, constants)) if entry is not None]
        return torch.cat(parts, 2)


def find_affine(network: nn.Module, state: State, entries: Sequence[str]) -> AffineMap | None:
    """The affine module that holds most of a layer's parameters, tied ones left out; None if there is none."""
    tied = set(tied_names(network).values())
    own = [entry for entry in entries if entry not in tied]
    found: list[AffineMap] = []
    for name in dict.fromkeys(entry.rpartition(".")[0] for entry in own):
        weight, bias = (f"{name}.{kind}".removeprefix(".") for kind in ("weight", "bias"))
        affine = AffineMap(
            network.get_submodule(name), weight if weight in own else None, bias if bias in own else None
        )
        if affine.entries and _is_affine(affine.module):
            found.append(affine)
    return max(found, key=lambda affine: sum(state[entry].numel() for entry in affine.entries), default=None)


def _is_affine(module: nn.Module) -> bool:
    # Not isinstance: a subclass, which parametrisations make too, may compute anything from its weight.
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return type(module) is nn.Linear


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One call of an affine module that has a part in the loss.

    Attributes:
        affine: The module.
        input: Its input.
        output: Its output, part of the graph.
        gradient: The loss's gradient in the output, part of the graph that differentiates it.
        input_gradient: The same in the input; None where that does not depend on what is differentiated.
        direct: Whether the module computed with the entries themselves, and not with something made of them.
    """

    affine: AffineMap
    input: Tensor
    output: Tensor
    gradient: Tensor
    input_gradient: Tensor | None
    direct: bool

    @property
    def examples(self) -> int:
        """Leading dimension of the output."""
        return self.output.shape[0]

    @property
    def batched(self) -> bool:
        """Whether the input has a leading dimension of examples."""
        return self.input.ndim >= (4 if isinstance(self.affine.module, nn.Conv2d) else 2)

    @functools.cached_property
    def slopes(self) -> Float[Tensor, "examples positions width"]:
        """The loss's gradient in the output, by position."""
        return self.affine.by_position(self.gradient)


def gradient_and_calls(
    objective: Objective, state: State, batch: Batch, entries: Sequence[str], affines: Collection[AffineMap]
) -> tuple[BatchGradient, list[LayerCall]]:
    """The gradient of one batch, and the calls of affine modules that it goes through, in their order.

    Args:
        objective: The loss.
        state: Where to differentiate, on the objective's device.
        batch: The examples.
        entries: Entries to differentiate in.
        affines: The modules.
    """
    values: list[tuple[AffineMap, Tensor, Tensor]] = []
    direct: list[bool] = []

    def record(affine: AffineMap, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not output.requires_grad:
            return None
        values.append((affine, args[0] if args else kwargs["input"], output))
        direct.append(all(entry.is_leaf for entry in module.parameters(recurse=False)))
        # A copy goes on, so that the network cannot change the recorded output in place.
        return output.clone()

    with contextlib.ExitStack() as hooks:
        for affine in affines:
            hook = functools.partial(record, affine)
            # First, so that it sees the module's own output and not what another hook makes of it.
            hooks.callback(affine.module.register_forward_hook(hook, prepend=True, with_kwargs=True).remove)
        gradient = BatchGradient(objective, state, batch, entries)
    # In one pass, so that an output's gradient is computed by way of the gradients in inputs that it feeds.
    slopes = gradient.at([tensor for _, input, output in values for tensor in (output, input)])
    found = zip(values, slopes[::2], slopes[1::2], direct, strict=True)
    return gradient, [LayerCall(*value, slope, inward, own) for value, slope, inward, own in found if slope is not None]
