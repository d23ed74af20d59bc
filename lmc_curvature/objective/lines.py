"""The loss of a few examples along a random line near a state: its values, and its derivatives by autograd."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lmc_curvature.objective.batches import map_tensors
from lmc_curvature.objective.losses import NetworkLoss, own_loss
from lmc_curvature.objective.network import State, as_leaves, graph_nodes
from lmc_curvature.objective.numerics import Numerics
from lmc_curvature.objective.precisions import precisions_met
from lmc_curvature.objective.values import is_of_torch

# How far from the state, relative to its entries: many units are at their kinks exactly at an initialisation.
_SHIFT = 2.0**-5
_NEARER = 2.0**-10


@dataclass(frozen=True)
class Derivative:
    """A derivative by autograd, the sum of the absolute values of its terms, and the entries that have no term."""

    value: float
    size: float
    idle: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Line:
    """The loss of a few examples along a line, with autograd and without.

    Attributes:
        loss_at: The loss where the moved entries are those of a state.
        state: The moved entries at the state.
        offset: From the state to the line's start, which is its position zero.
        direction: The direction of the line.
        numerics: The precision and the kernels that the network is computed with.
        rounding: Relative rounding error of the coarsest operation on the way.
        unit: Size of the numbers whose rounding the loss has: its own, or that of the outputs it is computed from.
        coarse_part: A few words on what computes in lower precision than the rest; empty if nothing does.
    """

    loss_at: Callable[[State], Tensor]
    state: State
    offset: State
    direction: State
    numerics: Numerics
    rounding: float
    unit: float
    coarse_part: str

    def loss(self, position: float) -> float:
        """The loss, computed as a measurement does."""
        with torch.no_grad(), self.numerics.exact():
            return self.loss_at(self._moved(position)).item()

    def slope(self, position: float) -> float:
        """The first derivative by autograd."""
        return self.derivatives(position, second=False)[0].value

    def derivatives(self, position: float = 0.0, *, second: bool) -> list[Derivative]:
        """The first derivative by autograd, and the second if it is asked for."""
        with self.numerics.differentiating():
            leaves = as_leaves(self._moved(position))
            loss = self.loss_at(leaves)
            slope, first = self._along(loss, leaves, create_graph=second)
            return [first, self._along(slope, leaves)[1]] if second else [first]

    def nearer(self, idle: Collection[str]) -> "Line":
        """The line nearer to the state, if some of these entries have a part in the loss there; else the same.

        A little off the state, whole layers may have none, where all units behind them go off.
        """
        through = replace(self, offset={name: torch.zeros_like(each) for name, each in self.offset.items()})
        if through.derivatives(second=False)[0].idle >= set(idle):
            return self
        return replace(self, offset={name: _NEARER * each for name, each in self.offset.items()})

    def functions(self) -> list[str]:
        """Names of the functions with backward passes of their own that the loss calls."""
        with self.numerics.differentiating():
            return own_functions(self.loss_at(as_leaves(self._moved(0.0))))

    def _moved(self, position: float) -> dict[str, Tensor]:
        return {
            name: tensor + self.offset[name] + position * self.direction[name] for name, tensor in self.state.items()
        }

    def _along(self, value: Tensor, leaves: State, *, create_graph: bool = False) -> tuple[Tensor, Derivative]:
        """The derivative of a value along the direction, as a tensor and with its terms."""
        if not value.requires_grad:
            return torch.zeros(()), Derivative(0.0, 0.0, frozenset(leaves))
        gradients = torch.autograd.grad(
            value, list(leaves.values()), create_graph=create_graph, allow_unused=True, materialize_grads=True
        )
        sums, absolute = [], []
        for gradient, along in zip(gradients, self.direction.values(), strict=True):
            # All terms together are as large as the network.
            term = gradient * along
            sums.append(term.sum())
            absolute.append(term.detach().abs().sum())
        total, sizes = torch.stack(sums).sum(), torch.stack(absolute).tolist()
        idle = frozenset(name for name, size in zip(leaves, sizes, strict=True) if not size)
        return total, Derivative(total.item(), sum(sizes), idle)


def own_functions(loss: Tensor) -> list[str]:
    """Names of the functions with backward passes of their own in the graph of a loss, torch's apart."""
    classes = {node._forward_cls for node in graph_nodes([loss]) if hasattr(node, "_forward_cls")}
    return sorted({cls.__name__ for cls in classes if not is_of_torch(cls)})


def random_line(
    network_loss: NetworkLoss,
    state: State,
    data: Any,
    movable: Collection[str],
    numerics: Numerics,
    dtype: torch.dtype,
    seed: int,
    *,
    through_state: bool = False,
) -> Line:
    """A random line near a state or through it, for a loss that is computed in a precision of its own."""

    def place(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype) if tensor.is_floating_point() else tensor

    generator = torch.Generator().manual_seed(seed)
    constants = {name: place(tensor) for name, tensor in state.items()}
    placed_data = map_tensors(place, data)
    near = {name: constants[name] for name in movable}
    offset, direction = {}, {}
    for name, tensor in near.items():
        shift, direction[name] = (_random_like(tensor, generator) for _ in range(2))
        offset[name] = (0.0 if through_state else _SHIFT) * shift
    # The network's own values have another precision, and are not used: all of them are given.
    in_dtype = NetworkLoss(network_loss.network, own_loss(network_loss.loss_fn, numerics.device, dtype))

    def loss_at(moved: State) -> Tensor:
        with torch.autocast(numerics.device.type, enabled=False):
            return in_dtype.at({**constants, **moved}, placed_data)[0]

    with torch.no_grad(), numerics.exact():
        (loss, output, _), met = precisions_met(in_dtype, lambda: in_dtype.at(constants, placed_data))
    # A cross-entropy near zero is the logarithm of a number near one, and rounded like that.
    plain = isinstance(output, Tensor) and output.is_floating_point()
    unit = max(abs(loss.item()), min(1.0, output.abs().max().item()) if plain else 1.0)
    rounding = max(torch.finfo(each).eps for each in met)
    return Line(loss_at, near, offset, direction, numerics, rounding, unit, _coarse_part(met, dtype))


def _coarse_part(met: Mapping[torch.dtype, str], dtype: torch.dtype) -> str:
    """A few words on the module that computes in the lowest precision, if that is lower than a network's own."""
    lowest = max(met, key=lambda each: torch.finfo(each).eps)
    if torch.finfo(lowest).eps <= torch.finfo(dtype).eps:
        return ""
    name = met[lowest]
    part = f"module {name.removeprefix('network.')!r}" if "." in name else f"the {name or 'loss'}"
    return f"{part} computes in {str(lowest).removeprefix('torch.')}"


def _random_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """A random direction in which no entry changes its sign soon: a variance must stay positive."""
    drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor)
    typical = tensor.square().mean().sqrt()
    return torch.where(tensor != 0, tensor.abs() * drawn, torch.where(typical > 0, typical, 0.01) * drawn.abs())
