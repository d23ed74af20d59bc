"""The witness of derivatives: those of autograd against differences of the loss itself, on a few examples."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from lmc_curvature.agreement import near
from lmc_curvature.errors import UnsupportedModelError
from lmc_curvature.objective.batches import Batch, tensors_in
from lmc_curvature.objective.lines import Derivative, Line, random_line
from lmc_curvature.objective.losses import NetworkLoss
from lmc_curvature.objective.network import State
from lmc_curvature.objective.numerics import Numerics
from lmc_curvature.objective.zeros import meets_zeros

# Examples are few, because each meets kinks and takes time; of small networks, more.
_LEAST_EXAMPLES, _MOST_EXAMPLES, _EXAMPLES_TIMES_PARAMETERS = 4, 32, 100_000
# Copies of a larger network in float64 take too much memory.
_MOST_PARAMETERS = 50_000_000

# Distances between losses, and between slopes, relative to the entries. The first suits smooth functions in float64;
# the smaller ones are for kinks, the larger ones for networks that compute in lower precision somewhere.
_LOSS_SPACINGS = (2.0**-12, 2.0**-18, 2.0**-8, 2.0**-5)
_SLOPE_SPACINGS = (2.0**-27, 2.0**-20, 2.0**-10)
# How far a fit's derivatives may be off, over the residual and in units of the spacing. By trying out: at most 6 for
# one kink wherever it lies, at most 5 for terms of higher order, and for rounding over 50 once in three thousand.
_ERRORS_PER_RESIDUAL = 50.0
# Relative to the sum of the absolute values of an inner product's terms: what differences of losses may be off to be
# enough for slope and curvature, and what they may be off to say something.
_ENOUGH_FOR_SLOPE, _ENOUGH_FOR_CURVATURE, _MOST_ERROR = 1e-4, 1e-6, 1e-2

WITHOUT_WITNESS = "derivatives were not compared with differences of the loss (witness=False)"
_SLOPES_ALONE = "of the derivatives, only the first was compared with differences of the loss"
_AT_ZERO = (
    "A norm, an absolute value, a distance or a root is exactly zero at the state, and its derivatives are lost there, "
    "also where its square has them: write squares as sums of squares, such as p.pow(2).sum() for p.norm() ** 2."
)
_NOTHING = "derivatives could not be compared with differences of the loss"


def check_derivatives(
    network_loss: NetworkLoss,
    state: State,
    batch: Batch,
    *,
    movable: Collection[str],
    numerics: Numerics,
    second: bool = True,
    functions: Collection[str] = (),
    is_other_graph: Callable[[Any], bool] = lambda _: False,
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
        functions: Names of functions with backward passes of their own that the whole batch calls. Where a few examples
            in float64 call others, as networks do that have a kernel for one type, the batch is looked at as it is.
            Where there are any, slopes of the whole batch are compared, too.
        is_other_graph: Tells whether the autograd graph of the loss of some data is another than the whole batch's.
            Where a few examples have another one, as where parts are left out of the graph of many to save memory, the
            whole batch is compared, too.

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
    note, reason, doubts, is_another = _NOTHING, "", [], False
    for seed, (rows, dtype) in enumerate(trials):
        if is_another and (rows, dtype) != trials[-1]:
            continue
        if rows is None and note != _NOTHING:
            break
        data = batch.data if rows is None else batch.rows(rows)
        make_line = partial(random_line, network_loss, state, data, movable, numerics, dtype)
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
            if (rows, dtype) == trials[-1] or not set(functions) - set(make_line(seed).functions()):
                note = ""
                fewer = [t.shape for t in tensors_in(data)] != [t.shape for t in tensors_in(batch.data)]
                other = fewer and is_other_graph(data)
                if other or (fewer and functions):
                    whole = partial(random_line, network_loss, state, batch.data, movable, numerics, precise)
                    first, again = (partial(whole, len(trials) + number) for number in range(2))
                    doubt = _judge(first, second and other).disagreement
                    if doubt and _judge(again, second and other).disagreement:
                        doubts.append(doubt)
                break
            # The function that the batch calls is another.
            note, is_another = _NOTHING, True
            continue
        note = _SLOPES_ALONE if verdict.slope else "" if verdict.idle and rows is None else note
        reason = verdict.reason or reason
    if doubts:
        raise UnsupportedModelError(doubts[0])
    if second:
        _check_zeros(network_loss, state, batch, movable, numerics, trials)
    return f"{note} ({reason})" if note and reason else note


def _check_zeros(
    network_loss: NetworkLoss,
    state: State,
    batch: Batch,
    movable: Collection[str],
    numerics: Numerics,
    trials: Sequence[tuple[list[int] | None, torch.dtype]],
) -> None:
    """Where lengths are zero at the state, compare derivatives there: near it they are others.

    Raises:
        UnsupportedModelError: Autograd and differences disagree.
    """
    rows, dtype = trials[0]
    for data in (batch.rows(rows or []), batch.data):
        if meets_zeros(network_loss, state, data):
            make_line = partial(random_line, network_loss, state, data, movable, numerics, dtype, through_state=True)
            verdicts = (_judge(partial(make_line, len(trials) + seed), True) for seed in range(2))
            if all(doubts := [verdict.disagreement for verdict in verdicts]):
                raise UnsupportedModelError(f"{_AT_ZERO} {doubts[0]}")
            return


def _selections(size: int, few: int) -> list[list[int]]:
    """A few of the examples of a batch from all over it; then others, fewer, which meet fewer kinks."""
    spread = np.linspace(0, size - 1, min(few, size)).round().astype(int).tolist()
    return [spread, [size // 3], [size // 2, (size // 2 + 1) % size], spread[1::2] or spread]


@dataclass(frozen=True)
class _Estimate:
    """A derivative by differences, and what it may be off."""

    value: float
    error: float


@dataclass(frozen=True)
class _Verdict:
    """Whether slope and curvature agree, or the loss is constant; or how they disagree, or why nothing was compared."""

    slope: bool = False
    curvature: bool = False
    idle: bool = False
    disagreement: str = ""
    reason: str = ""


def _judge(make_line: Callable[[], Line], second: bool) -> _Verdict:
    """Compare the derivatives along a line, as far as the network has them and can be computed there."""
    for second_too in (True, False) if second else (False,):
        try:
            return _compare(make_line(), second_too)
        except Exception:  # noqa: BLE001 - what a network makes of few examples or of float64 is nobody's concern
            continue
    return _Verdict()


def _compare(line: Line, second: bool) -> _Verdict:
    slope, *curvatures = line.derivatives(second=second)
    if slope.idle and (nearer := line.nearer(slope.idle)) is not line:
        line, (slope, *curvatures) = nearer, nearer.derivatives(second=second)
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
    curvature = Derivative(curvatures[0].value, curvatures[0].size + 0.1 * slope.size)
    if by_curvature.error > _ENOUGH_FOR_CURVATURE * curvature.size:
        by_curvature = min(by_curvature, _from_slopes(line, slope, curvature), key=lambda each: each.error)
    if not _says_something(by_curvature, curvature):
        return _Verdict(slope=True, reason=line.coarse_part)
    if not _agree(curvature, by_curvature, line.rounding):
        return _Verdict(disagreement=_sentence(line, "curvature", curvature, by_curvature))
    return _Verdict(slope=True, curvature=True)


def _from_losses(line: Line, slope: Derivative) -> list[_Estimate]:
    """Slope and curvature by differences of losses, each at the distance that tells most."""
    found: list[list[_Estimate]] = []
    for spacing in _LOSS_SPACINGS:
        found.append(_differences(line.loss, spacing, points=7, rounding=line.rounding * line.unit))
        if found[-1][0].error <= _ENOUGH_FOR_SLOPE * slope.size:
            break
    return [min(estimates, key=lambda each: each.error) for estimates in zip(*found, strict=True)]


def _from_slopes(line: Line, slope: Derivative, curvature: Derivative) -> _Estimate:
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


def _says_something(estimate: _Estimate, derivative: Derivative) -> bool:
    # A derivative that autograd takes for nothing at all may be something.
    return estimate.error <= _MOST_ERROR * max(derivative.size, abs(estimate.value))


def _agree(derivative: Derivative, estimate: _Estimate, rounding: float) -> bool:
    value, expected, floor = derivative.value, estimate.value, estimate.error
    return near("witness", value, expected, rounding=rounding, scale=derivative.size, floor=floor)


def _sentence(line: Line, kind: str, derivative: Derivative, estimate: _Estimate) -> str:
    functions = line.functions()
    called = f"the backward pass of {', '.join(functions)}, or another " if functions else "a backward pass "
    return (
        f"The {kind} of the loss along a random direction is {derivative.value:.6g} by autograd, and "
        f"{estimate.value:.6g} ± {estimate.error:.1g} by differences of the loss, so the derivatives are not those of "
        f"what the network computes. Likely causes: {called}that is wrong or hidden from autograd (NumPy, C++, Triton, "
        "once_differentiable), .detach() or torch.no_grad() on the way, a straight-through estimator, hooks that "
        "change gradients. If it is meant so, pass witness=False, which results record, or predict with "
        "method='losses', which differentiates nothing."
    )
