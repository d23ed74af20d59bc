"""The witness of derivatives: those of autograd against differences of the loss itself, on a few examples."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmc_curvature.agreement import near
from lmc_curvature.errors import UnsupportedModelError
from lmc_curvature.objective.batches import Batch, map_tensors
from lmc_curvature.objective.losses import NetworkLoss, own_loss
from lmc_curvature.objective.network import State, as_leaves, graph_nodes
from lmc_curvature.objective.numerics import Numerics
from lmc_curvature.objective.precisions import precisions_met

# Examples are few, because each meets kinks and takes time; of small networks, more.
_LEAST_EXAMPLES, _MOST_EXAMPLES, _EXAMPLES_TIMES_PARAMETERS = 4, 32, 100_000
# Copies of a larger network in float64 take too much memory.
_MOST_PARAMETERS = 50_000_000

# Distances between losses, and between slopes, relative to the entries. The first suits smooth functions in float64;
# the smaller ones are for kinks, the larger ones for networks that compute in lower precision somewhere.
_LOSS_SPACINGS = (2.0**-12, 2.0**-18, 2.0**-8, 2.0**-5)
_SLOPE_SPACINGS = (2.0**-27, 2.0**-20, 2.0**-10)
# How far from the state, relative to its entries: many units are at their kinks exactly at an initialisation.
_SHIFT = 2.0**-5

# How far a fit's derivatives may be off, over the residual and in units of the spacing. By trying out: at most 6 for
# one kink wherever it lies, at most 5 for terms of higher order, and for rounding over 50 once in three thousand.
_ERRORS_PER_RESIDUAL = 50.0
# Relative to the sum of the absolute values of an inner product's terms: what differences of losses may be off to be
# enough for slope and curvature, and what they may be off to say something.
_ENOUGH_FOR_SLOPE, _ENOUGH_FOR_CURVATURE, _MOST_ERROR = 1e-4, 1e-6, 1e-2

WITHOUT_WITNESS = "derivatives were not compared with differences of the loss (witness=False)"
_SLOPES_ALONE = "of the derivatives, only the first was compared with differences of the loss"
_NOTHING = "derivatives could not be compared with differences of the loss"


def check_derivatives(
    network_loss: NetworkLoss,
    state: State,
    batch: Batch,
    *,
    movable: Collection[str],
    numerics: Numerics,
    second: bool = True,
) -> str:
    """Compare slope and curvature of the loss along a random direction with differences of the loss.

    This finds what all ways through autograd have in common: a backward pass that is not that of the function, or that
    autograd cannot see into. Seven losses at equal distances along the direction are fitted by a quartic, whose
    residual says how far its derivatives can be trusted: between them the loss may have kinks, where a rectifier
    switches, which no distance makes small in a second difference. Where they spoil the curvature, it is taken from
    differences of autograd's slopes, once the slope has been found right.

    Args:
        network_loss: The network and its loss.
        state: All entries of the network.
        batch: The batch that a few examples are taken from.
        movable: Names of the entries that move.
        numerics: The precision and the kernels that the network is computed with.
        second: Compare the curvature, too.

    Returns:
        A few words that say what could not be compared; none if all was.

    Raises:
        UnsupportedModelError: Autograd and differences disagree.
    """
    parameters = sum(state[name].numel() for name in movable)
    precise = torch.float64 if parameters <= _MOST_PARAMETERS else numerics.dtype
    few = min(max(_EXAMPLES_TIMES_PARAMETERS // max(parameters, 1), _LEAST_EXAMPLES), _MOST_EXAMPLES)
    trials = [(rows, precise) for rows in _selections(batch.size, few)]
    # For networks that do not take a few examples alone, or do not take float64.
    trials += [(None, dtype) for dtype in dict.fromkeys((precise, numerics.dtype))]
    note, reason, doubts = _NOTHING, "", []
    for seed, (rows, dtype) in enumerate(trials):
        if rows is None and note != _NOTHING:
            break
        data = batch.data if rows is None else batch.rows(rows)
        make_line = partial(_line, network_loss, state, data, movable, numerics, dtype)
        verdict = _judge(partial(make_line, seed), second)
        if verdict.disagreement:
            # Along another direction again, because the error of differences is an estimate.
            doubts.append(verdict.disagreement)
            verdict = _judge(partial(make_line, seed + len(trials)), second)
            if verdict.disagreement or len(doubts) > 1:
                break
            if verdict.slope:
                doubts.pop()
        if verdict.curvature or (verdict.slope and not second):
            note = ""
            break
        note = _SLOPES_ALONE if verdict.slope else "" if verdict.idle and rows is None else note
        reason = verdict.reason or reason
    if doubts:
        raise UnsupportedModelError(doubts[0])
    return f"{note} ({reason})" if note and reason else note


def _selections(size: int, few: int) -> list[list[int]]:
    """A few of the examples of a batch from all over it; then others, fewer, which meet fewer kinks."""
    spread = np.linspace(0, size - 1, min(few, size)).round().astype(int).tolist()
    return [spread, [size // 3], [size // 2, (size // 2 + 1) % size], spread[1::2] or spread]


@dataclass(frozen=True)
class _Derivative:
    """A derivative by autograd; and the sum of the absolute values of the terms that it is the sum of."""

    value: float
    size: float


@dataclass(frozen=True)
class _Estimate:
    """A derivative by differences, and what it may be off."""

    value: float
    error: float


@dataclass(frozen=True, eq=False)
class _Line:
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

    def derivatives(self, position: float = 0.0, *, second: bool) -> list[_Derivative]:
        """The first derivative by autograd, and the second if it is asked for."""
        with self.numerics.differentiating():
            leaves = as_leaves(self._moved(position))
            loss = self.loss_at(leaves)
            slope, size = self._along(loss, leaves, create_graph=second)
            found = [_Derivative(slope.item(), size)]
            if second:
                curvature, size = self._along(slope, leaves)
                found.append(_Derivative(curvature.item(), size))
        return found

    def functions(self) -> list[str]:
        """Names of the functions with backward passes of their own that the loss calls."""
        with self.numerics.differentiating():
            nodes = graph_nodes([self.loss_at(as_leaves(self.start))])
            return sorted({node._forward_cls.__name__ for node in nodes if hasattr(node, "_forward_cls")})

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


def _line(
    network_loss: NetworkLoss,
    state: State,
    data: Any,
    movable: Collection[str],
    numerics: Numerics,
    dtype: torch.dtype,
    seed: int,
) -> _Line:
    """A random line near a state, for a loss that is computed in a precision of its own."""

    def place(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype) if tensor.is_floating_point() else tensor

    generator = torch.Generator().manual_seed(seed)
    constants = {name: place(tensor) for name, tensor in state.items()}
    placed_data = map_tensors(place, data)
    start, direction = {}, {}
    for name in movable:
        shift, direction[name] = (_random_like(constants[name], generator) for _ in range(2))
        start[name] = constants[name] + _SHIFT * shift
    # The network's own values have another precision, and are not used: all of them are given.
    in_dtype = NetworkLoss(network_loss.network, own_loss(network_loss.loss_fn, numerics.device, dtype))

    def loss_at(moved: State) -> Tensor:
        with torch.autocast(numerics.device.type, enabled=False):
            return in_dtype.at({**constants, **moved}, placed_data)[0]

    with torch.no_grad(), numerics.exact():
        (loss, output, _), met = precisions_met(in_dtype, lambda: in_dtype.at({**constants, **start}, placed_data))
    # A cross-entropy near zero is the logarithm of a number near one, and rounded like that.
    plain = isinstance(output, Tensor) and output.is_floating_point()
    unit = max(abs(loss.item()), min(1.0, output.abs().max().item()) if plain else 1.0)
    rounding = max(torch.finfo(each).eps for each in met)
    return _Line(loss_at, start, direction, numerics, rounding, unit, _coarse_part(met, dtype))


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


@dataclass(frozen=True)
class _Verdict:
    """Whether slope and curvature agree, or the loss is constant; or how they disagree, or why nothing was compared."""

    slope: bool = False
    curvature: bool = False
    idle: bool = False
    disagreement: str = ""
    reason: str = ""


def _judge(make_line: Callable[[], _Line], second: bool) -> _Verdict:
    """Compare the derivatives along a line, as far as the network has them and can be computed there."""
    for second_too in (True, False) if second else (False,):
        try:
            return _compare(make_line(), second_too)
        except Exception:  # noqa: BLE001 - what a network makes of few examples or of float64 is nobody's concern
            continue
    return _Verdict()


def _compare(line: _Line, second: bool) -> _Verdict:
    slope, *curvatures = line.derivatives(second=second)
    # A few entries may have no part in the loss, as those of units that are off.
    if not any(each.size for each in (slope, *curvatures)) and line.loss(0.0) == line.loss(_LOSS_SPACINGS[0]):
        return _Verdict(idle=True)
    by_slope, by_curvature = _from_losses(line, slope)
    if not _says_something(by_slope, slope):
        return _Verdict(reason=line.coarse_part)
    if not _agree(slope, by_slope, line.rounding):
        return _Verdict(disagreement=_sentence(line, "slope", slope, by_slope))
    if not curvatures:
        return _Verdict(slope=True)
    # A curvature may vanish that the slope says to be measurable.
    curvature = _Derivative(curvatures[0].value, curvatures[0].size + 0.1 * slope.size)
    if by_curvature.error > _ENOUGH_FOR_CURVATURE * curvature.size:
        by_curvature = min(by_curvature, _from_slopes(line, slope, curvature), key=lambda each: each.error)
    if not _says_something(by_curvature, curvature):
        return _Verdict(slope=True, reason=line.coarse_part)
    if not _agree(curvature, by_curvature, line.rounding):
        return _Verdict(disagreement=_sentence(line, "curvature", curvature, by_curvature))
    return _Verdict(slope=True, curvature=True)


def _from_losses(line: _Line, slope: _Derivative) -> list[_Estimate]:
    """Slope and curvature by differences of losses, each at the distance that tells most."""
    found: list[list[_Estimate]] = []
    for spacing in _LOSS_SPACINGS:
        found.append(_differences(line.loss, spacing, points=7, rounding=line.rounding * line.unit))
        if found[-1][0].error <= _ENOUGH_FOR_SLOPE * slope.size:
            break
    return [min(estimates, key=lambda each: each.error) for estimates in zip(*found, strict=True)]


def _from_slopes(line: _Line, slope: _Derivative, curvature: _Derivative) -> _Estimate:
    """Curvature by differences of autograd's slopes, at the distance that tells most."""
    found: list[_Estimate] = []
    for spacing in _SLOPE_SPACINGS:
        found.append(_differences(line.slope, spacing, points=5, rounding=line.rounding * slope.size)[0])
        if found[-1].error <= _ENOUGH_FOR_CURVATURE * curvature.size:
            break
    return min(found, key=lambda each: each.error)


def _differences(
    function: Callable[[float], float], spacing: float, *, points: int, rounding: float
) -> list[_Estimate]:
    """First and second derivative at zero, from a fit by a polynomial with two coefficients fewer than points.

    `rounding` is what values may be off at least.
    """
    positions = np.arange(points) - points // 2
    values = np.array([function(spacing * position) for position in positions])
    powers = np.vander(positions, points - 2, increasing=True).astype(float)
    coefficients = np.linalg.lstsq(powers, values - values[points // 2])[0]
    residual = np.abs(powers @ coefficients - (values - values[points // 2])).max()
    error = _ERRORS_PER_RESIDUAL * max(residual, rounding)
    if not np.isfinite(error):
        error = np.inf
    return [
        _Estimate(float(coefficients[1] / spacing), float(error / spacing)),
        _Estimate(float(2 * coefficients[2] / spacing**2), float(error / spacing**2)),
    ]


def _says_something(estimate: _Estimate, derivative: _Derivative) -> bool:
    # A derivative that autograd takes for nothing at all may be something.
    return estimate.error <= _MOST_ERROR * max(derivative.size, abs(estimate.value))


def _agree(derivative: _Derivative, estimate: _Estimate, rounding: float) -> bool:
    value, expected, floor = derivative.value, estimate.value, estimate.error
    return near("witness", value, expected, rounding=rounding, scale=derivative.size, floor=floor)


def _sentence(line: _Line, kind: str, derivative: _Derivative, estimate: _Estimate) -> str:
    functions = line.functions()
    called = f"the backward pass of {', '.join(functions)}, or another " if functions else "a backward pass "
    return (
        f"The {kind} of the loss along a random direction is {derivative.value:.6g} by autograd, and "
        f"{estimate.value:.6g} ± {estimate.error:.1g} by differences of the loss, so the derivatives are not those of "
        f"what the network computes. Likely causes: {called}that is wrong or hidden from autograd (NumPy, C++, Triton, "
        "once_differentiable), .detach() or torch.no_grad() on the way, a straight-through estimator, hooks that "
        "change gradients. If it is meant so, pass witness=False, which results record."
    )
