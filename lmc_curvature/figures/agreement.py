"""How far predicted barriers agree with measured ones, over forks and over layers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy import stats

from lmc_curvature.barrier.expansions import Expansion
from lmc_curvature.barrier.measurement import BarrierMeasurement
from lmc_curvature.barrier.prediction import BarrierPrediction
from lmc_curvature.figures.panels import Fork, Measurements, Predictions, heading, matched_forks
from lmc_curvature.figures.style import COLUMN_WIDTH, EXPANSION_PENS, GREY, PALE, SMALL, fork_colors, look, new_figure

# Barriers further below the largest are rounding, or might as well be.
_MOST_DECADES = 7
# Share of an axis that the strip of the smallest takes.
_STRIP = 0.12


@dataclass(frozen=True)
class Pairs:
    """Measured and predicted barriers of the same things, (n,) each."""

    measured: Float[np.ndarray, " n"]
    predicted: Float[np.ndarray, " n"]

    def rank_correlation(self) -> float:
        """Spearman's ρ; NaN for fewer than three pairs, or where one side is constant."""
        if len(self.measured) < 3 or np.ptp(self.measured) == 0 or np.ptp(self.predicted) == 0:
            return math.nan
        return float(stats.spearmanr(self.measured, self.predicted).statistic)


class _Scale(NamedTuple):
    """A logarithmic axis from `floor` to `high`, and below it, down to `low`, a strip for what does not fit."""

    low: float
    floor: float
    high: float

    @property
    def strip(self) -> float:
        """The middle of the strip."""
        return math.sqrt(self.low * self.floor)


@look()
def draw_predicted_against_measured(
    predictions: Predictions, measurements: Measurements, *, expansion: Expansion = "second-order"
) -> Figure:
    """Draw predicted against measured barriers: of the whole network, a point a fork; of each layer, a point a layer.

    Axes are logarithmic. Barriers of zero or below, and those seven orders of magnitude under the largest, stand
    as hollow points in a grey strip at the low end of their axis. Rank correlations use the barriers as they are.

    Args:
        predictions: Fork epoch, or any label, to the prediction for its two children.
        measurements: The same for measurements. Without sets of layers there is no panel of layers.
        expansion: Which prediction to draw.

    Raises:
        OptionError: The two do not have the same forks, a loss was not measured, or `expansion` is `"hermite"`
            although sets of layers were measured.
        UnknownLayerError: A measured layer is not one of the prediction's: their partitions differ.
    """
    forks = matched_forks(predictions, measurements)
    colors = fork_colors(forks)
    panels = {"whole network": {fork: _whole(predictions[fork], measurements[fork], expansion) for fork in forks}}
    if any(measurements[fork].sets for fork in forks):
        panels["each layer alone"] = {fork: _sets(predictions[fork], measurements[fork], expansion) for fork in forks}
    figure = new_figure(COLUMN_WIDTH * len(panels) + _LEGEND_WIDTH, 3.2)
    for number, (title, pairs) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), number + 1)
        _draw_pairs(axes, pairs, colors)
        heading(axes, title, _correlation_text(list(pairs.values())))
        axes.set_xlabel("measured barrier (units of the loss)")
        axes.set_ylabel(f"predicted barrier, {EXPANSION_PENS[expansion].label}")
    _draw_legend(figure, colors, hollow=any(_has_small(pairs.values()) for pairs in panels.values()))
    return figure


def _whole(prediction: BarrierPrediction, measurement: BarrierMeasurement, expansion: Expansion) -> Pairs:
    return Pairs(np.array([measurement.barrier()]), np.array([prediction.barrier(None, expansion)]))


def _sets(prediction: BarrierPrediction, measurement: BarrierMeasurement, expansion: Expansion) -> Pairs:
    measured = measurement.layer_barriers() if measurement.sets else np.empty(0)
    return Pairs(measured, np.array([prediction.barrier(members, expansion) for members in measurement.sets]))


def _pooled(pairs: Iterable[Pairs]) -> Pairs:
    return Pairs(
        np.concatenate([each.measured for each in pairs]), np.concatenate([each.predicted for each in pairs])
    )


def _correlation_text(pairs: Sequence[Pairs]) -> str:
    pooled = _pooled(pairs)
    correlation = pooled.rank_correlation()
    found = f"= {correlation:.2f}" if math.isfinite(correlation) else "undefined"
    text = f"Spearman ρ {found}, n = {len(pooled.measured)}"
    within = [rho for rho in (each.rank_correlation() for each in pairs) if math.isfinite(rho)]
    return f"{text}; median within forks {np.median(within):.2f}" if len(within) > 1 else text


def _scale(pairs: Iterable[Pairs]) -> _Scale:
    """Whole decades that hold all barriers but the smallest, and room for a strip when there are such."""
    pooled = _pooled(pairs)
    values = np.concatenate([pooled.measured, pooled.predicted])
    positive = values[values > 0]
    largest = positive.max() if len(positive) else 1.0
    smallest = max(positive.min(), largest * 10.0**-_MOST_DECADES) if len(positive) else 0.1
    floor, high = 10.0 ** math.floor(math.log10(smallest)), 10.0 ** math.ceil(math.log10(largest) + 0.05)
