"""How far predicted barriers agree with measured ones, over forks and over layers."""

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from scipy import stats

from lmc_curvature.barrier.expansions import Expansion
from lmc_curvature.barrier.measurement import BarrierMeasurement
from lmc_curvature.barrier.prediction import BarrierPrediction
from lmc_curvature.figures.panels import (
    Fork,
    Measurements,
    Predictions,
    alone_title,
    heading,
    paired_forks,
    short_number,
)
from lmc_curvature.plotting.style import COLUMN_WIDTH, EXPANSION_PENS, GREY, PALE, SMALL, fork_colors, look, new_figure

Color = tuple[float, float, float, float]

# Barriers this many orders of magnitude below the largest would flatten all others into a corner.
_MOST_DECADES = 7
# The factor by which the axes reach beyond the points.
_MARGIN = 1.6
# Share of an axis that the strip takes.
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
        correlation, _ = np.asarray(stats.spearmanr(self.measured, self.predicted))
        return float(correlation)


@dataclass(frozen=True)
class LogScale:
    """A logarithmic axis from `floor` to `high`, and from `low` to `floor` a strip for what lies below.

    Attributes:
        low: Equal to `floor` where nothing lies below.
        floor: Where the axis begins.
        high: Where it ends.
        cut: Whether positive barriers lie below `floor`.
    """

    low: float
    floor: float
    high: float
    cut: bool

    @property
    def strip(self) -> float:
        """The middle of the strip."""
        return math.sqrt(self.low * self.floor)


@look()
def draw_predicted_against_measured(
    predictions: Predictions, measurements: Measurements, *, expansion: Expansion = "second-order"
) -> Figure:
    """Draw predicted against measured barriers: of the whole network, a point a fork; of each layer, a point a layer.

    Where single layers were measured beside larger sets, only the single layers are drawn. Axes are logarithmic.
    Barriers of zero or below, and those seven orders of magnitude below the largest, stand as hollow points in a grey
    strip at the low end of their axis. Rank correlations are of the barriers as they are.

    Args:
        predictions: Fork epoch, or any label, to the prediction for its two children.
        measurements: The same for measurements. Without sets of layers there is no panel of layers.
        expansion: Which prediction to draw.

    Raises:
        OptionError: The two do not have the same forks, a loss was not measured, or `expansion` is `"hermite"`
            although sets of layers were measured.
        PartitionError: A measured layer is not one of the prediction's: their partitions differ.
    """
    forks = paired_forks(predictions, measurements)
    colors = fork_colors(forks)
    panels = {"whole network": {fork: _whole(*pair, expansion) for fork, pair in forks.items()}}
    # Single layers and larger sets are not alike, and would not be told apart in one cloud.
    all_sets = {members for _, measurement in forks.values() for members in measurement.sets}
    compared = {members for members in all_sets if len(members) == 1} or all_sets
    if compared:
        panels[alone_title(compared)] = {fork: _sets(*pair, compared, expansion) for fork, pair in forks.items()}
    legend_columns = len(panels) * (6 if all(isinstance(fork, int) for fork in forks) else 2)
    figure = new_figure(COLUMN_WIDTH * len(panels), 3.8 + 0.16 * math.ceil(len(forks) / legend_columns))
    scales = []
    for number, (title, pairs) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), number + 1)
        scales.append(log_scale(pairs.values()))
        _draw_pairs(axes, pairs, scales[-1], colors)
        heading(axes, title, _correlation_text(list(pairs.values())))
        axes.set_xlabel("measured barrier (units of the loss)")
        axes.set_ylabel(f"predicted barrier, {EXPANSION_PENS[expansion].label}\n(units of the loss)")
    _draw_legend(figure, colors, scales, legend_columns)
    return figure


def log_scale(pairs: Iterable[Pairs]) -> LogScale:
    """The range of all barriers but those too small for it, with a strip where there are such."""
    values = np.concatenate([side for each in pairs for side in (each.measured, each.predicted)])
    positive = values[values > 0]
    largest = float(positive.max()) if len(positive) else 1.0
    smallest = max(float(positive.min()), largest * 10.0**-_MOST_DECADES) if len(positive) else 0.1
    floor, high = smallest / _MARGIN, largest * _MARGIN
    if values.min() >= floor:
        return LogScale(floor, floor, high, cut=False)
    low = floor * (floor / high) ** (_STRIP / (1 - _STRIP))
    return LogScale(low, floor, high, cut=bool((positive < floor).any()))


def _whole(prediction: BarrierPrediction, measurement: BarrierMeasurement, expansion: Expansion) -> Pairs:
    return Pairs(np.array([measurement.barrier()]), np.array([prediction.barrier(None, expansion)]))


def _sets(
    prediction: BarrierPrediction,
    measurement: BarrierMeasurement,
    compared: Container[tuple[str, ...]],
    expansion: Expansion,
) -> Pairs:
    chosen = [number for number, members in enumerate(measurement.sets) if members in compared]
    measured = measurement.layer_barriers()[chosen] if chosen else np.empty(0)
    predicted = [prediction.barrier(measurement.sets[number], expansion) for number in chosen]
    return Pairs(measured, np.array(predicted, dtype=np.float64))


def _correlation_text(pairs: Sequence[Pairs]) -> str:
    pooled = Pairs(np.concatenate([p.measured for p in pairs]), np.concatenate([p.predicted for p in pairs]))
    text = f"Spearman ρ {_correlation(pooled.rank_correlation())}, n = {len(pooled.measured)}"
    # Forks differ so much in scale that together they correlate even where no fork does.
    within = [rho for rho in (each.rank_correlation() for each in pairs) if math.isfinite(rho)]
    return f"{text}; median within forks {_correlation(float(np.median(within)))}" if len(within) > 1 else text


def _correlation(value: float) -> str:
    return f"= {value:.2f}".replace("-", "−") if math.isfinite(value) else "undefined"


def _draw_pairs(axes: Axes, pairs: Mapping[Fork, Pairs], scale: LogScale, colors: Mapping[Fork, Color]) -> None:
    axes.set(xscale="log", yscale="log", xlim=(scale.low, scale.high), ylim=(scale.low, scale.high))
    axes.set_box_aspect(1)
    axes.plot([scale.floor, scale.high], [scale.floor, scale.high], color=GREY, linewidth=0.8, label="_identity")
    for fork, each in pairs.items():
        points = np.stack([each.measured, each.predicted])
        small = (points < scale.floor).any(axis=0)
        shown = np.where(points < scale.floor, scale.strip, points)
        _draw_points(axes, shown[:, ~small], colors[fork], colors[fork], label=f"_{fork}")
        _draw_points(axes, shown[:, small], colors[fork], "none", label=f"_{fork}, small")
    _set_ticks(axes, scale)
    if scale.low < scale.floor:
        _draw_strips(axes, scale)
        _count_both_small(axes, pairs.values(), scale)


def _draw_points(axes: Axes, points: Float[np.ndarray, "2 n"], color: Color, face: Color | str, *, label: str) -> None:
    x, y = points
    axes.plot(x, y, "o", color=color, markerfacecolor=face, markersize=4, alpha=0.85, label=label)


def _set_ticks(axes: Axes, scale: LogScale) -> None:
    """Ticks at decades, and between them where there are few; none in the strip or beside it, where its label is."""
    extent = scale.high / scale.floor
    lowest = scale.floor * extent**0.06 if scale.low < scale.floor else scale.floor
    few = extent < 100
    first, last = math.floor(math.log10(scale.floor)), math.ceil(math.log10(scale.high))
    powers = 10.0 ** np.arange(first, last + 1, 1 + (last - first) // 9)
    ticks = np.outer(powers, [1, 2, 5] if few else [1]).ravel()
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator(ticks[(ticks >= lowest) & (ticks <= scale.high)].tolist()))
        axis.set_minor_locator(NullLocator())
        if few:
            axis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value, 1)))


def _draw_strips(axes: Axes, scale: LogScale) -> None:
    """Shade the low end of both axes, where a position means no value."""
    axes.axvspan(scale.low, scale.floor, color=PALE, linewidth=0, zorder=0)
    axes.axhspan(scale.low, scale.floor, color=PALE, linewidth=0, zorder=0)
    text = "≈ 0" if scale.cut else "≤ 0"
    below, beside = axes.get_xaxis_transform(), axes.get_yaxis_transform()
    axes.text(scale.strip, -0.025, text, fontsize=SMALL, transform=below, ha="center", va="top")
    axes.text(-0.025, scale.strip, text, fontsize=SMALL, transform=beside, ha="right", va="center")


def _count_both_small(axes: Axes, pairs: Iterable[Pairs], scale: LogScale) -> None:
    """Say how many points lie on one spot, in the corner of the two strips."""
    count = sum(int(((each.measured < scale.floor) & (each.predicted < scale.floor)).sum()) for each in pairs)
    if count > 1:
        axes.annotate(f"×{count}", (scale.strip, scale.strip), (4, 3), textcoords="offset points", fontsize=SMALL - 1)


def _draw_legend(figure: Figure, colors: Mapping[Fork, Color], scales: Sequence[LogScale], columns: int) -> None:
    """The forks above the panels; below them, what the line and the strip mean."""
    points: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 4}
    forks = [Line2D([], [], color=color, label=str(fork), **points) for fork, color in colors.items()]
    others = [Line2D([], [], color=GREY, linewidth=0.8, label="predicted = measured")]
    if any(scale.low < scale.floor for scale in scales):
        cut = any(scale.cut for scale in scales)
        label = "in the grey strip: no barrier (≤ 0)" + cut * f",\nor over 1e{_MOST_DECADES} times below the largest"
        others.append(Line2D([], [], color=GREY, markerfacecolor="none", label=label, **points))
    figure.legend(handles=others, loc="outside lower left")
    title = "fork at epoch" if all(isinstance(fork, int) for fork in colors) else "fork"
    figure.legend(handles=forks, title=title, loc="outside upper left", ncols=columns, alignment="left")
