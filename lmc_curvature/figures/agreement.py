"""Predicted against measured barriers, over forks and over layers."""

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from lmc_curvature.averages import rank_correlation
from lmc_curvature.barrier.drawing import EXPANSION_PENS, error_lines, sets_title
from lmc_curvature.barrier.expansions import Expansion
from lmc_curvature.figures.panels import Fork, Measurements, Pair, Predictions, paired_forks, strip_entries
from lmc_curvature.plotting.axes import heading, legend_line
from lmc_curvature.plotting.decades import Decades, decades, decades_axis
from lmc_curvature.plotting.style import COLUMN_WIDTH, GREY, SMALL, Color, look, new_figure, sequential_colors
from lmc_curvature.plotting.text import correlation_text

# Of the same things: measured barriers and their standard errors, predicted barriers and theirs, and expansion errors.
Barriers = Float64[np.ndarray, "5 n"]

# Barriers this many orders of magnitude below the largest would flatten all others into a corner.
_MOST_DECADES = 7
_POINT: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 4}
_IDENTITY: dict[str, Any] = {"color": GREY, "linewidth": 0.8}


@look()
def draw_predicted_against_measured(
    predictions: Predictions, measurements: Measurements, *, expansion: Expansion | None = None
) -> Figure:
    """Draw predicted against measured barriers: of the whole network, a point a fork; of each layer, a point a layer.

    Where single layers were measured beside larger sets, only the single layers are drawn. Axes are logarithmic. Thin
    bars are standard errors, and broad pale ones expansion errors of anchored predictions. Barriers of zero or below,
    and those seven orders of magnitude below the largest, stand as hollow points in a grey strip at the low end of
    their axis. Rank correlations are of the barriers as they are.

    Args:
        predictions: Fork epoch, or any label, to the prediction for its two children.
        measurements: The same for measurements. Without sets of layers there is no panel of layers.
        expansion: The prediction to draw; by default the anchored one where every prediction has anchors between the
            ends, with that of second order below it; and that of second order alone otherwise.

    Raises:
        OptionError: The two do not have the same forks, a loss was not measured, or `expansion` is `"hermite"`
            although sets of layers were measured.
        PartitionError: A measured layer is not one of the prediction's: their partitions differ.
    """
    forks = paired_forks(predictions, measurements)
    anchored = all(prediction.expansion == "anchored" for prediction, _ in forks.values())
    by_default: tuple[Expansion, ...] = ("anchored", "second-order") if anchored else ("second-order",)
    expansions = by_default if expansion is None else (expansion,)
    epochs = all(isinstance(fork, int) for fork in forks)
    colors = sequential_colors(forks)
    # Single layers and larger sets are not alike, and would not be told apart in one cloud.
    all_sets = {members for _, measurement in forks.values() for members in measurement.sets}
    compared = {members for members in all_sets if len(members) == 1} or all_sets
    titles = ["whole network", *([sets_title(compared)] if compared else [])]
    legend_columns = len(titles) * (6 if epochs else 2)
    height = 3.3 * len(expansions) + 0.5 + 0.16 * math.ceil(len(forks) / legend_columns)
    figure = new_figure(COLUMN_WIDTH * len(titles), height)
    scales = []
    for row, each in enumerate(expansions):
        of_networks = {fork: _of_network(pair, each) for fork, pair in forks.items()}
        of_sets = {fork: _of_sets(pair, compared, each) for fork, pair in forks.items()}
        for column, (title, barriers) in enumerate(zip(titles, (of_networks, of_sets), strict=False)):
            axes = figure.add_subplot(len(expansions), len(titles), row * len(titles) + column + 1)
            scales.append(decades(_reached([*barriers.values()]), most=_MOST_DECADES, strip=0.12))
            _draw_points(axes, barriers, scales[-1], colors)
            heading(axes, title, _correlations([*barriers.values()]))
            axes.set_xlabel("measured barrier\n(units of the loss, log scale)")
            axes.set_ylabel(f"predicted barrier, {EXPANSION_PENS[each].label}\n(units of the loss, log scale)")
    handles = [legend_line("predicted = measured", **_IDENTITY)]
    handles += error_lines(is_anchored="anchored" in expansions)
    handles += strip_entries(scales, _MOST_DECADES, **_POINT)
    figure.legend(handles=handles, loc="outside lower left", ncols=len(titles))
    handles = [legend_line(str(fork), color=color, **_POINT) for fork, color in colors.items()]
    title = "fork at epoch" if epochs else "fork"
    figure.legend(handles=handles, title=title, loc="outside upper left", ncols=legend_columns, alignment="left")
    return figure


def _of_network(pair: Pair, expansion: Expansion) -> Barriers:
    prediction, measurement = pair
    broad = prediction.expansion_error() if expansion == "anchored" else math.nan
    predicted = prediction.barrier(None, expansion), prediction.standard_error(None, expansion)
    return np.array([[measurement.barrier()], [measurement.standard_error()], *([each] for each in predicted), [broad]])


def _of_sets(pair: Pair, compared: Container[tuple[str, ...]], expansion: Expansion) -> Barriers:
    prediction, measurement = pair
    chosen = [number for number, members in enumerate(measurement.sets) if members in compared]
    if not chosen:
        return np.empty((5, 0))
    sets = [measurement.sets[number] for number in chosen]
    return np.array(
        [
            measurement.layer_barriers()[chosen],
            measurement.layer_standard_errors()[chosen],
            [prediction.barrier(members, expansion) for members in sets],
            [prediction.standard_error(members, expansion) for members in sets],
            [prediction.expansion_error(members) if expansion == "anchored" else math.nan for members in sets],
        ]
    )


def _reached(barriers: Sequence[Barriers]) -> np.ndarray:
    """The values, and the upper ends of the bars, that an axis has to hold."""
    measured, measured_se, predicted, predicted_se, broad = np.hstack(barriers)
    upper = predicted + np.fmax(predicted_se, broad)
    # An error that is many times its barrier would leave the others a corner.
    upper = np.minimum(upper, 3 * max(measured.max(), predicted.max()))
    return np.concatenate([measured, predicted, measured + measured_se, upper])


def _correlations(barriers: Sequence[Barriers]) -> str:
    pairs = [each[[0, 2]] for each in barriers]
    pooled = np.hstack(pairs)
    overall = rank_correlation(*pooled)
    text = f"Spearman ρ {'= ' if math.isfinite(overall) else ''}{correlation_text(overall)}, n = {pooled.shape[1]}"
    # Forks differ so much in scale that together they correlate even where no fork does.
    within = [rho for rho in (rank_correlation(*each) for each in pairs) if math.isfinite(rho)]
    return f"{text}; median within forks = {correlation_text(float(np.median(within)))}" if len(within) > 1 else text


def _draw_points(axes: Axes, barriers: Mapping[Fork, Barriers], scale: Decades, colors: Mapping[Fork, Color]) -> None:
    axes.set_box_aspect(1)
    axes.plot([scale.floor, scale.high], [scale.floor, scale.high], label="_identity", **_IDENTITY)
    both_small = 0
    for fork, each in barriers.items():
        points = each[[0, 2]]
        small = (points < scale.floor).any(axis=0)
        both_small += int((points < scale.floor).all(axis=0).sum())
        shown = np.where(points < scale.floor, scale.strip, points)
        style: dict[str, Any] = {"color": colors[fork], "alpha": 0.85, **_POINT}
        _draw_errors(axes, each[:, ~small], scale, colors[fork], f"_{fork}")
        axes.plot(*shown[:, ~small], label=f"_{fork}", **style)
        axes.plot(*shown[:, small], markerfacecolor="none", label=f"_{fork}, small", **style)
    zero = "≈ 0" if scale.cut else "≤ 0"
    decades_axis(axes, scale, "x", below=zero, gap=0.025, clear=0.06, powers=True)
    decades_axis(axes, scale, "y", below=zero, gap=0.025, clear=0.06, powers=True)
    # Those that are small on both axes lie on one spot.
    if both_small > 1:
        text = f"×{both_small}"
        axes.annotate(text, (scale.strip, scale.strip), (4, 3), textcoords="offset points", fontsize=SMALL - 1)


def _draw_errors(axes: Axes, barriers: Barriers, scale: Decades, color: Color, label: str) -> None:
    """Standard errors along both axes, and behind them expansion errors; down to the end of the axis."""
    measured, measured_se, predicted, predicted_se, broad = barriers
    for horizontal, vertical, width, opacity, name in (
        (None, broad, 3.0, 0.2, "expansion error"),
        (measured_se, predicted_se, 0.7, 0.6, "standard error"),
    ):
        bars = {
            f"{axis}err": np.stack([np.minimum(errors, values - scale.low), errors])
            for axis, values, errors in (("x", measured, horizontal), ("y", predicted, vertical))
            if errors is not None and np.isfinite(errors).any()
        }
        if bars:
            style: dict[str, Any] = {"ecolor": to_rgba(color, opacity), "elinewidth": width, "zorder": 1.5}
            axes.errorbar(measured, predicted, fmt="none", label=f"{label}, {name}", **bars, **style)
