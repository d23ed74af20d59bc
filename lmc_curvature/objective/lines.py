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

# How far from the state, relative to its entries: many units are at their kinks exactly at an initialisation. Nearer
# where so far off entries have no part in the loss that have one at the state, as those behind units that go off.
_SHIFTS = (2.0**-5, 2.0**-15)


@dataclass(frozen=True)
class Derivative:
    """A derivative by autograd; and the sum of the absolute values of the terms that it is the sum of."""

    value: float
    size: float


@dataclass(frozen=True, eq=False)
class Line:
    """The loss of a few examples along a line, with autograd and without.

    Attributes:
        loss_at: The loss where the moved entries are those of a state.
        start: The moved entries at zero.
        direction: The direction of the line.
        numerics: The precision and the kernels that the network is computed with.
        rounding: Relative rounding error of the coarsest operation on the way.
        unit: Size of the numbers whose rounding the loss has: its own, or that of the outputs it is computed from.
        coarse_part: A few words on what computes in lower precision than the rest; empty if nothing does.
    """

    loss_at: Callable[[State], Tensor]
    start: State
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
            slope, size = self._along(loss, leaves, create_graph=second)
            found = [Derivative(slope.item(), size)]
            if second:
                curvature, size = self._along(slope, leaves)
                found.append(Derivative(curvature.item(), size))
        return found

    def entries(self) -> set[str]:
        """Names of the entries in which the loss has a slope at the start."""
        with self.numerics.differentiating():
            leaves = as_leaves(self.start)
            loss = self.loss_at(leaves)
            slopes = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True) if loss.requires_grad else ()
        return {name for name, slope in zip(leaves, slopes, strict=False) if slope is not None and bool(slope.any())}

    def functions(self) -> list[str]:
        """Names of the functions with backward passes of their own that the loss calls."""
        with self.numerics.differentiating():
            return own_functions(self.loss_at(as_leaves(self.start)))

    def _moved(self, position: float) -> dict[str, Tensor]:
        return {name: tensor + position * self.direction[name] for name, tensor in self.start.items()}

    def _along(self, value: Tensor, leaves: State, *, create_graph: bool = False) -> tuple[Tensor, float]:
        """The derivative of a value along the direction, and the sum of the absolute values of its terms."""
        if not value.requires_grad:
            return torch.zeros(()), 0.0
        gradients = torch.autograd.grad(
            value, list(leaves.values()), create_graph=create_graph, allow_unused=True, materialize_grads=True
        )
        terms = [gradient * along for gradient, along in zip(gradients, self.direction.values(), strict=True)]
        sizes = [term.detach().abs().sum() for term in terms]
        return torch.stack([term.sum() for term in terms]).sum(), torch.stack(sizes).sum().item()


def own_functions(loss: Tensor) -> list[str]:
    """Names of the functions with backward passes of their own in the graph of a loss."""
    return sorted({node._forward_cls.__name__ for node in graph_nodes([loss]) if hasattr(node, "_forward_cls")})


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
    start, shift, direction = {name: constants[name] for name in movable}, {}, {}
    for name in movable:
        shift[name], direction[name] = (_random_like(constants[name], generator) for _ in range(2))
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
    line = through = Line(loss_at, start, direction, numerics, rounding, unit, _coarse_part(met, dtype))
    for distance in () if through_state else _SHIFTS:
        line = replace(line, start={name: start[name] + distance * shift[name] for name in movable})
        if through.entries() <= line.entries():
            break
    return line


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
