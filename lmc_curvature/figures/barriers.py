"""Barriers between two networks, and between the children of each fork: predicted and measured."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lmc_curvature.barrier.expansions import Expansion
from lmc_curvature.barrier.measurement import BarrierMeasurement
from lmc_curvature.barrier.prediction import BarrierPrediction
from lmc_curvature.figures.agreement import draw_predicted_against_measured
from lmc_curvature.figures.panels import (
    ALPHA_LABEL,
    ALPHAS,
    BARRIER_LABEL,
    Bars,
    Measurements,
    Predictions,
    alone_title,
    alpha_axis,
    fork_title,
    heading,
    layer_rows,
    number_with_error,
    paired_forks,
    rows_height,
    short_number,
    zero_line,
)
from lmc_curvature.plotting.style import (
    COLUMN_WIDTH,
    EXPANSION_PENS,
    GREY,
    INK,
    TEXT_WIDTH,
    VERMILION,
    look,
    new_figure,
)

__all__ = [
    "draw_barrier_curves",
    "draw_layer_bars",
    "draw_measurement",
    "draw_predicted_against_measured",
    "draw_prediction",
]

_METRIC_UNITS = {"loss": "units of the loss", "error": "share of examples"}
_BAR_GREY = "#888888"
_MEASURED: dict[str, Any] = {"color": INK, "marker": "o", "markersize": 3, "linewidth": 1}
_TIGHT_LEGEND: dict[str, Any] = {"borderaxespad": 0, "borderpad": 0.2, "handlelength": 1.5, "columnspacing": 0.8}
_CURVE_HEIGHT = 2.3
_ROW_HEIGHT = 0.15
_MOST_COLUMNS = 3


@look()
def draw_prediction(prediction: BarrierPrediction) -> Figure:
    """Draw a prediction: the barrier curve of the whole network by every expansion, and the barrier of each layer.

    Bars are second-order barriers, with their standard errors where there was more than one batch.

    Args:
        prediction: What `predict_barrier` found.
    """
    legend_height = 0.85
    height = max(rows_height(len(prediction.layers), _ROW_HEIGHT) + 0.6, _CURVE_HEIGHT + legend_height)
    figure = new_figure(TEXT_WIDTH, height)
    grid = figure.add_gridspec(2, 2, height_ratios=[_CURVE_HEIGHT, height - _CURVE_HEIGHT])
    curves, legend, layers = (figure.add_subplot(cell) for cell in (grid[0, 0], grid[1, 0], grid[:, 1]))

    _barrier_axes(curves)
    for expansion, pen in EXPANSION_PENS.items():
        barrier = number_with_error(prediction.barrier(None, expansion), prediction.standard_error(None, expansion))
        _draw_expansion(curves, prediction, expansion, label=f"{pen.label}: barrier {barrier}")
    curves.set(xlabel=ALPHA_LABEL, ylabel=BARRIER_LABEL)
    heading(curves, "whole network, predicted", _distance_text(prediction))
    legend.set_axis_off()
    legend.legend(*curves.get_legend_handles_labels(), loc="upper left", borderaxespad=0)

    alone = [(name,) for name in prediction.layers]
    layer_rows(layers, prediction.layers, [_predicted_bars(prediction, alone)])
    layers.set_xlabel(BARRIER_LABEL)
    heading(layers, f"{alone_title(alone)}, predicted", "second order")
    return figure


@look()
def draw_measurement(measurement: BarrierMeasurement) -> Figure:
    """Draw a measurement: every metric along the segment with its chord, and the barrier of each set of layers.

    The barrier is the longest way up from the chord to the curve, and is drawn where it was found. The sets' barriers
    are of the first metric; without sets there is no such panel.

    Args:
        measurement: What `measure_barrier` found.
    """
    metrics, sets = measurement.metrics, measurement.sets
    curves_height = _CURVE_HEIGHT * len(metrics)
    spare = max(rows_height(len(sets), _ROW_HEIGHT) + 0.6 - curves_height, 0.0)
    figure = new_figure(TEXT_WIDTH if sets else COLUMN_WIDTH, curves_height + spare + 0.25)
    # A network of many layers makes a tall figure; its curves stay as they are, over an empty cell.
    heights = [_CURVE_HEIGHT] * len(metrics) + [spare] * (spare > 0)
    grid = figure.add_gridspec(len(heights), 2 if sets else 1, height_ratios=heights)
    panels = [figure.add_subplot(grid[row, 0]) for row in range(len(metrics))]
    for axes, metric in zip(panels, metrics, strict=True):
        _draw_metric(axes, measurement, metric)
    panels[-1].set_xlabel(ALPHA_LABEL)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    if sets:
        layers = figure.add_subplot(grid[:, 1])
        layer_rows(layers, measurement.layers, [_measured_bars(measurement, metrics[0])])
        layers.set_xlabel(f"{metrics[0]} barrier ({_METRIC_UNITS[metrics[0]]})")
        heading(layers, f"{alone_title(sets)}, measured", "the other layers stay at either end")
    return figure


@look()
def draw_barrier_curves(predictions: Predictions, measurements: Measurements) -> Figure:
    """Draw the barrier curves between the children of each fork, a panel a fork: measured, and predicted.

    Above each panel stand the barriers, the maxima of its curves, and the distance. Panels have one scale
    when their curves are of one order of magnitude, and a scale each otherwise.

    Args:
        predictions: Fork epoch, or any label, to the prediction for its two children.
        measurements: The same for measurements.

    Raises:
        OptionError: The two do not have the same forks, or a loss was not measured.
    """
    pairs = paired_forks(predictions, measurements)
    figure, panels = _fork_panels(len(pairs), 1.9)
    for (fork, (prediction, measurement)), axes in zip(pairs.items(), panels, strict=True):
        _barrier_axes(axes)
        axes.plot(measurement.alphas, measurement.curve(), label=short_number(measurement.barrier()), **_MEASURED)
        _draw_expansion(axes, prediction, "second-order", label=short_number(prediction.barrier()))
        # The legend fills its columns downwards: this stands beside the measured barrier.
        axes.plot([], [], linestyle="none", label=f"‖Δ‖ = {short_number(prediction.distance, 3)}")
        slopes = prediction.barrier(None, "with-slopes")
        _draw_expansion(axes, prediction, "with-slopes", label=short_number(slopes))
        axes.set_title(fork_title(fork), loc="left", pad=29)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.03, 1.02), ncols=2, **_TIGHT_LEGEND)
    _share_scale(panels)
    figure.supxlabel(ALPHA_LABEL, fontsize="medium")
    figure.supylabel(BARRIER_LABEL, fontsize="medium")
    handles: list[Artist] = [Line2D([], [], label="measured", **_MEASURED)]
    handles += [
        Line2D([], [], color=pen.color, linestyle=pen.linestyle, label=f"predicted, {pen.label}")
        for pen in (EXPANSION_PENS["second-order"], EXPANSION_PENS["with-slopes"])
    ]
    _legend_above(figure, handles)
    return figure


@look()
def draw_layer_bars(
    predictions: Predictions, measurements: Measurements, *, titles: Mapping[tuple[str, ...], str] | None = None
) -> Figure:
    """Draw the barrier of each layer alone, measured and predicted, a panel a fork, in the order of the network.

    Bars are measured, and predicted to second order with standard errors; diamonds are predicted with slopes. Every
    panel has its own scale.

    Args:
        predictions: Fork epoch, or any label, to the prediction for its two children.
        measurements: The same for measurements of sets of layers, each of one layer or more.
        titles: Set of layers to what to call it; by default what `BarrierMeasurement.layers` calls it.

    Raises:
        OptionError: The two do not have the same forks, or a measurement has no sets of layers, or no loss.
        PartitionError: A measured layer is not one of the prediction's: their partitions differ.
    """
    pairs = paired_forks(predictions, measurements)
    names = [_set_titles(measurement, titles or {}) for _, measurement in pairs.values()]
    figure, panels = _fork_panels(len(pairs), rows_height(max(map(len, names)), 0.19) + 0.55)
    handles: list[Artist] = []
    for number, (fork, (prediction, measurement)) in enumerate(pairs.items()):
        bars = [_measured_bars(measurement, "loss"), _predicted_bars(prediction, measurement.sets)]
        marks = _predicted_bars(prediction, measurement.sets, "with-slopes")
        named = number % _MOST_COLUMNS == 0 or len(set(names)) > 1
        layer_rows(panels[number], names[number], bars, marks=marks, label_rows=named)
        heading(panels[number], fork_title(fork), _distance_text(prediction))
        diamond = Line2D([], [], color=marks.color, marker="D", markersize=3, linestyle="none", label=marks.label)
        handles = [*(Patch(color=group.color, label=group.label) for group in bars), diamond]
    figure.supxlabel(BARRIER_LABEL, fontsize="medium")
    _legend_above(figure, handles)
    return figure


def _fork_panels(count: int, panel_height: float) -> tuple[Figure, list[Axes]]:
    """A figure with a panel a fork, row by row."""
    columns = min(count, _MOST_COLUMNS)
    rows = math.ceil(count / columns)
    legend_height = 0.5 if columns > 1 else 0.85
    width = max(TEXT_WIDTH * columns / _MOST_COLUMNS, COLUMN_WIDTH)
    figure = new_figure(width, panel_height * rows + legend_height)
    grid = figure.add_gridspec(rows, columns)
    return figure, [figure.add_subplot(grid[divmod(number, columns)]) for number in range(count)]


def _legend_above(figure: Figure, handles: Sequence[Artist]) -> None:
    columns = 3 if figure.get_figwidth() > COLUMN_WIDTH else 1
    figure.legend(handles=handles, loc="outside upper left", ncols=columns)


def _barrier_axes(axes: Axes) -> None:
    alpha_axis(axes)
    zero_line(axes)


def _draw_expansion(axes: Axes, prediction: BarrierPrediction, expansion: Expansion, *, label: str) -> None:
    pen = EXPANSION_PENS[expansion]
    curve = prediction.curve(ALPHAS, None, expansion)
    axes.plot(ALPHAS, curve, color=pen.color, linestyle=pen.linestyle, label=label)


def _draw_metric(axes: Axes, measurement: BarrierMeasurement, metric: str) -> None:
    """The metric along the segment, the chord between its ends, and the barrier between the two."""
    alphas, values, ends = measurement.alphas, measurement.values(metric), measurement.ends(metric)
    highest = measurement.curve(metric).argmax()
    chord = np.interp(alphas, [0, 1], ends)
    alpha_axis(axes)
    axes.plot(alphas, values, label="measured", **_MEASURED)
    axes.plot([0, 1], ends, color=GREY, linestyle="--", linewidth=1, label="chord between the ends")
    top = max(values[highest], chord[highest])
    axes.vlines(alphas[highest], chord[highest], top, color=VERMILION, linewidth=2, label="barrier")
    if values.min() >= 0:
        # An error of zero everywhere has no scale of its own, and no metric is below zero here.
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.04 * high), high)
    axes.set_ylabel(f"{metric} ({_METRIC_UNITS[metric]})")
    barrier = measurement.barrier(metric)
    found = f"barrier {number_with_error(barrier, measurement.standard_error(metric))} at α = {alphas[highest]:.2g}"
    heading(axes, f"{metric} along the segment", found if barrier > 0 else "no barrier: nowhere above the chord")


def _set_titles(measurement: BarrierMeasurement, titles: Mapping[tuple[str, ...], str]) -> tuple[str, ...]:
    return tuple(titles.get(members, name) for members, name in zip(measurement.sets, measurement.layers, strict=True))


def _measured_bars(measurement: BarrierMeasurement, metric: str) -> Bars:
    return Bars("measured", measurement.layer_barriers(metric), _BAR_GREY)


def _predicted_bars(
    prediction: BarrierPrediction, sets: Sequence[Sequence[str]], expansion: Expansion = "second-order"
) -> Bars:
    values = np.array([prediction.barrier(members, expansion) for members in sets])
    errors = np.array([prediction.standard_error(members, expansion) for members in sets])
    pen = EXPANSION_PENS[expansion]
    return Bars(f"predicted, {pen.label}", values, pen.color, errors)


def _distance_text(prediction: BarrierPrediction) -> str:
    return f"distance ‖Δ‖ = {short_number(prediction.distance, 3)}"


def _share_scale(panels: Sequence[Axes]) -> None:
    """Give the panels one scale for y, unless the widest range is over ten times the narrowest."""
    lows, highs = np.transpose([axes.get_ylim() for axes in panels])
    if np.max(highs - lows) <= 10 * np.min(highs - lows):
        for axes in panels:
            axes.set_ylim(lows.min(), highs.max())
