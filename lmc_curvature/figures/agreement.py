"""Predicted against measured barriers, over forks and over layers."""

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lmc_curvature.averages import rank_correlation
from lmc_curvature.barrier.drawing import EXPANSION_PENS, sets_title
from lmc_curvature.barrier.expansions import Expansion
from lmc_curvature.figures.panels import Fork, Measurements, Pair, Predictions, paired_forks
from lmc_curvature.plotting.axes import heading, legend_line
from lmc_curvature.plotting.decades import Decades, decades, decades_axis
from lmc_curvature.plotting.style import COLUMN_WIDTH, GREY, SMALL, Color, look, new_figure, sequential_colors
from lmc_curvature.plotting.text import correlation_text

# Measured and predicted barriers of the same things.
Barriers = Float64[np.ndarray, "2 n"]

# Barriers this many orders of magnitude below the largest would flatten all others into a corner.
_MOST_DECADES = 7
_POINT: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 4}
_IDENTITY: dict[str, Any] = {"color": GREY, "linewidth": 0.8}


@look()
def draw_predicted_against_measured(
    predictions: Predictions, measurements: Measurements, *, expansion: Expansion | None = None
) -> Figure:
    """Draw predicted against measured barriers: of the whole network, a point a fork; of each layer, a point a layer.

    Where single layers were measured beside larger sets, only the single layers are drawn. Axes are logarithmic.
    Barriers of zero or below, and those seven orders of magnitude below the largest, stand as hollow points in a grey
    strip at the low end of their axis. Rank correlations are of the barriers as they are.

    Args:
        predictions: Fork epoch, or any label, to the prediction for its two children.
        measurements: The same for measurements. Without sets of layers there is no panel of layers.
        expansion: The prediction to draw; by default the anchored one where every prediction has anchors between the
            ends, and that of second order otherwise.

    Raises:
        OptionError: The two do not have the same forks, a loss was not measured, or `expansion` is `"hermite"`
            although sets of layers were measured.
        PartitionError: A measured layer is not one of the prediction's: their partitions differ.
    """
    forks = paired_forks(predictions, measurements)
    anchored = all(prediction.expansion == "anchored" for prediction, _ in forks.values())
    by_default: Expansion = "anchored" if anchored else "second-order"
    expansion = by_default if expansion is None else expansion
    epochs = all(isinstance(fork, int) for fork in forks)
    colors = sequential_colors(forks)
    panels: dict[str, dict[Fork, Barriers]] = {
        "whole network": {
            fork: np.array([[measurement.barrier()], [prediction.barrier(None, expansion)]])
            for fork, (prediction, measurement) in forks.items()
        }
    }
    # Single layers and larger sets are not alike, and would not be told apart in one cloud.
    all_sets = {members for _, measurement in forks.values() for members in measurement.sets}
    compared = {members for members in all_sets if len(members) == 1} or all_sets
    if compared:
        panels[sets_title(compared)] = {fork: _of_sets(pair, compared, expansion) for fork, pair in forks.items()}
    legend_columns = len(panels) * (6 if epochs else 2)
    figure = new_figure(COLUMN_WIDTH * len(panels), 3.8 + 0.16 * math.ceil(len(forks) / legend_columns))
    scales = []
    for number, (title, barriers) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), number + 1)
        scales.append(decades(np.hstack([*barriers.values()]), most=_MOST_DECADES, strip=0.12))
        _draw_points(axes, barriers, scales[-1], colors)
        heading(axes, title, _correlations([*barriers.values()]))
        axes.set_xlabel("measured barrier (units of the loss)")
        axes.set_ylabel(f"predicted barrier, {EXPANSION_PENS[expansion].label}\n(units of the loss)")
    others = [legend_line("predicted = measured", **_IDENTITY)]
    if any(scale.low < scale.floor for scale in scales):
        cut = any(scale.cut for scale in scales)
        label = "in the grey strip: no barrier (≤ 0)" + cut * f",\nor over 1e{_MOST_DECADES} times below the largest"
        others.append(legend_line(label, color=GREY, markerfacecolor="none", **_POINT))
    figure.legend(handles=others, loc="outside lower left")
    handles = [legend_line(str(fork), color=color, **_POINT) for fork, color in colors.items()]
    title = "fork at epoch" if epochs else "fork"
    figure.legend(handles=handles, title=title, loc="outside upper left", ncols=legend_columns, alignment="left")
    return figure


def _of_sets(pair: Pair, compared: Container[tuple[str, ...]], expansion: Expansion) -> Barriers:
    prediction, measurement = pair
    chosen = [number for number, members in enumerate(measurement.sets) if members in compared]
    measured = measurement.layer_barriers()[chosen] if chosen else np.empty(0)
    return np.array([measured, [prediction.barrier(measurement.sets[number], expansion) for number in chosen]])


def _correlations(barriers: Sequence[Barriers]) -> str:
    pooled = np.hstack(barriers)
    overall = rank_correlation(*pooled)
    text = f"Spearman ρ {'= ' if math.isfinite(overall) else ''}{correlation_text(overall)}, n = {pooled.shape[1]}"
    # Forks differ so much in scale that together they correlate even where no fork does.
    within = [rho for rho in (rank_correlation(*each) for each in barriers) if math.isfinite(rho)]
    return f"{text}; median within forks = {correlation_text(float(np.median(within)))}" if len(within) > 1 else text


def _draw_points(axes: Axes, barriers: Mapping[Fork, Barriers], scale: Decades, colors: Mapping[Fork, Color]) -> None:
    axes.set_box_aspect(1)
    axes.plot([scale.floor, scale.high], [scale.floor, scale.high], label="_identity", **_IDENTITY)
    for fork, points in barriers.items():
        small = (points < scale.floor).any(axis=0)
        shown = np.where(points < scale.floor, scale.strip, points)
        style: dict[str, Any] = {"color": colors[fork], "alpha": 0.85, **_POINT}
        axes.plot(*shown[:, ~small], label=f"_{fork}", **style)
        axes.plot(*shown[:, small], markerfacecolor="none", label=f"_{fork}, small", **style)
    zero = "≈ 0" if scale.cut else "≤ 0"
    decades_axis(axes, scale, "x", below=zero, gap=0.025, clear=0.06, powers=True)
    decades_axis(axes, scale, "y", below=zero, gap=0.025, clear=0.06, powers=True)
    # Those that are small on both axes lie on one spot.
    count = sum(int((points < scale.floor).all(axis=0).sum()) for points in barriers.values())
    if count > 1:
        axes.annotate(f"×{count}", (scale.strip, scale.strip), (4, 3), textcoords="offset points", fontsize=SMALL - 1)
