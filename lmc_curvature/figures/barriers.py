"""Barriers between two networks, and between the children of each fork, predicted and measured."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lmc_curvature.barrier.expansions import Expansion
from lmc_curvature.barrier.measurement import BarrierMeasurement
from lmc_curvature.barrier.prediction import BarrierPrediction
from lmc_curvature.figures.agreement import draw_predicted_against_measured
from lmc_curvature.figures.panels import (
    ALPHA_LABEL,
    ALPHAS,
    BARRIER_LABEL,
    Bars,
    Fork,
    Measurements,
    Predictions,
    curve_axes,
    fork_title,
    heading,
    layer_rows,
    matched_forks,
    number_with_error,
    rows_height,
    short_number,
)
from lmc_curvature.figures.style import COLUMN_WIDTH, EXPANSION_PENS, GREY, MEASURED, TEXT_WIDTH, look, new_figure

__all__ = [
    "draw_barrier_curves",
    "draw_layer_bars",
    "draw_measurement",
    "draw_predicted_against_measured",
    "draw_prediction",
]

# The two expansions that hold for any set of layers and use both ends.
_COMPARED: tuple[Expansion, ...] = ("second-order", "with-slopes")
_METRIC_UNITS = {"loss": "units of the loss", "error": "share of examples"}
_PREDICTED_LABELS = tuple(f"predicted, {EXPANSION_PENS[expansion].label}" for expansion in _COMPARED)
_ACCENT = "#D55E00"
_BAR_GREY = "#888888"
_POINTS: dict[str, Any] = {"markersize": 3, "linewidth": 1}
_TIGHT: dict[str, Any] = {"borderaxespad": 0, "borderpad": 0.2, "handlelength": 1.6, "columnspacing": 0.9}
_CURVE_HEIGHT = 2.2
_MOST_COLUMNS = 3


@look()
def draw_prediction(prediction: BarrierPrediction) -> Figure:
    """Draw a prediction: the barrier curve of the whole network by every expansion, and the barrier of each layer.

    Bars are second-order barriers, with their standard errors where there was more than one batch.

    Args:
        prediction: What `predict_barrier` found.
    """
    legend_height = 0.85
    height = max(rows_height(len(prediction.layers), 0.15) + 0.6, _CURVE_HEIGHT + legend_height)
    figure = new_figure(TEXT_WIDTH, height)
    grid = figure.add_gridspec(2, 2, height_ratios=[_CURVE_HEIGHT, height - _CURVE_HEIGHT])
    curves, legend, layers = (figure.add_subplot(cell) for cell in (grid[0, 0], grid[1, 0], grid[:, 1]))

    for expansion, pen in EXPANSION_PENS.items():
        barrier = number_with_error(prediction.barrier(None, expansion), prediction.standard_error(None, expansion))
        _draw_expansion(curves, prediction, expansion, label=f"{pen.label}, barrier {barrier}")
    curve_axes(curves)
    curves.set(xlabel=ALPHA_LABEL, ylabel=BARRIER_LABEL)
    heading(curves, "whole network, predicted", f"distance ‖Δ‖ = {short_number(prediction.distance, 3)}")
    legend.set_axis_off()
    legend.legend(*curves.get_legend_handles_labels(), loc="upper left", borderaxespad=0)

    alone = tuple((name,) for name in prediction.layers)
    layer_rows(layers, prediction.layers, [_predicted_bars(prediction, alone)])
    layers.set_xlabel(BARRIER_LABEL)
    heading(layers, "each layer alone, predicted", "second order")
    return figure


@look()
def draw_measurement(measurement: BarrierMeasurement) -> Figure:
    """Draw a measurement: every metric along the segment with its chord, and the barrier of each set of layers.

    The barrier is the longest way up from the chord to the curve; it is marked where it was found. Layers are drawn
    for the first metric, when sets of layers were measured.

    Args:
        measurement: What `measure_barrier` found.
    """
    metrics, sets = measurement.metrics, len(measurement.sets)
    height = max(_CURVE_HEIGHT * len(metrics), (rows_height(sets, 0.15) + 0.6) if sets else 0)
    figure = new_figure(TEXT_WIDTH if sets else COLUMN_WIDTH, height)
    grid = figure.add_gridspec(len(metrics), 2 if sets else 1)
    for row, metric in enumerate(metrics):
        axes = figure.add_subplot(grid[row, 0])
        _draw_metric(axes, measurement, metric)
        if row == len(metrics) - 1:
            axes.set_xlabel(ALPHA_LABEL)
    if sets:
        layers = figure.add_subplot(grid[:, 1])
        metric = metrics[0]
        layer_rows(layers, measurement.layers, [_measured_bars(measurement, metric)])
        layers.set_xlabel(f"{metric} barrier ({_METRIC_UNITS[metric]})")
        heading(layers, "each set of layers alone, measured", "the others stay at either end")
    return figure


@look()
def draw_barrier_curves(predictions: Predictions, measurements: Measurements) -> Figure:
    """Draw the barrier curves between the children of each fork, a panel a fork: measured, and predicted.

    The barriers, the maxima of the curves, stand above each panel beside their pens. Panels have one scale when their
    curves are of one order of magnitude, and a scale each otherwise.

    Args:
        predictions: Fork epoch, or any label, to the prediction for its two children.
        measurements: The same for measurements.

    Raises:
        OptionError: The two do not have the same forks, or a loss was not measured.
    """
    forks = matched_forks(predictions, measurements)
    figure, panels = _fork_panels(forks, 1.8)
    for fork, axes in panels.items():
        prediction, measurement = predictions[fork], measurements[fork]
        curve_axes(axes)
        _draw_measured(axes, measurement, label=short_number(measurement.barrier()))
        for expansion in _COMPARED:
            _draw_expansion(axes, prediction, expansion, label=short_number(prediction.barrier(None, expansion)))
        heading(axes, _fork_heading(fork, prediction), " ")
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.99), ncols=3, **_TIGHT)
    _share_scale(list(panels.values()))
    figure.supxlabel(ALPHA_LABEL, fontsize="medium")
    figure.supylabel(BARRIER_LABEL, fontsize="medium")
    _shared_legend(figure, panels[forks[0]], [MEASURED.label, *_PREDICTED_LABELS])
    return figure


@look()
def draw_layer_bars(predictions: Predictions, measurements: Measurements) -> Figure:
    """Draw the barrier of each layer alone, measured and predicted, a panel a fork, in the order of the network.

    Bars are measured, and predicted to second order with standard errors; diamonds are predicted with slopes. Every
    panel has its own scale.

    Args:
        predictions: Fork epoch, or any label, to the prediction for its two children.
        measurements: The same for measurements of sets of layers, each of one layer or more.

    Raises:
        OptionError: The two do not have the same forks, or a measurement has no sets of layers, or no loss.
        UnknownLayerError: A measured layer is not one of the prediction's: their partitions differ.
    """
    forks = matched_forks(predictions, measurements)
    most = max(len(measurements[fork].sets) for fork in forks)
    figure, panels = _fork_panels(forks, rows_height(most, 0.19) + 0.35)
    same_names = len({measurements[fork].layers for fork in forks}) == 1
    for number, (fork, axes) in enumerate(panels.items()):
        prediction, measurement = predictions[fork], measurements[fork]
        layer_rows(
            axes,
            measurement.layers,
            [_measured_bars(measurement, "loss"), _predicted_bars(prediction, measurement.sets)],
            marks=_predicted_bars(prediction, measurement.sets, "with-slopes"),
            label_rows=number % _MOST_COLUMNS == 0 or not same_names,
        )
        heading(axes, _fork_heading(fork, prediction))
    figure.supxlabel(BARRIER_LABEL, fontsize="medium")
    _shared_legend(figure, panels[forks[0]], [MEASURED.label, *_PREDICTED_LABELS])
    return figure


def _fork_panels(forks: Sequence[Fork], panel_height: float) -> tuple[Figure, dict[Fork, Axes]]:
    """A figure with a panel a fork, row by row."""
    columns = min(len(forks), _MOST_COLUMNS)
    rows = math.ceil(len(forks) / columns)
    figure = new_figure(max(TEXT_WIDTH * columns / _MOST_COLUMNS, COLUMN_WIDTH), panel_height * rows + 0.6)
    grid = figure.add_gridspec(rows, columns)
    return figure, {fork: figure.add_subplot(grid[divmod(i, columns)]) for i, fork in enumerate(forks)}


def _draw_expansion(axes: Axes, prediction: BarrierPrediction, expansion: Expansion, *, label: str) -> None:
    pen = EXPANSION_PENS[expansion]
    curve = prediction.curve(ALPHAS, None, expansion)
    axes.plot(ALPHAS, curve, color=pen.color, linestyle=pen.linestyle, label=label)


def _draw_measured(axes: Axes, measurement: BarrierMeasurement, *, label: str) -> None:
    axes.plot(measurement.alphas, measurement.curve(), "o-", color=MEASURED.color, label=label, **_POINTS)


def _draw_metric(axes: Axes, measurement: BarrierMeasurement, metric: str) -> None:
    """The metric along the segment, the chord between its ends, and the barrier between the two."""
    alphas, values, ends = measurement.alphas, measurement.values(metric), measurement.ends(metric)
    highest = measurement.curve(metric).argmax()
    chord = np.interp(alphas, [0, 1], ends)
    axes.plot(alphas, values, "o-", color=MEASURED.color, label="measured", **_POINTS)
    axes.plot([0, 1], ends, color=GREY, linestyle="--", linewidth=1, label="chord between the ends")
    axes.vlines(alphas[highest], chord[highest], values[highest], color=_ACCENT, linewidth=2, label="barrier")
    curve_axes(axes)
    axes.set_ylabel(f"{metric} ({_METRIC_UNITS[metric]})")
    barrier = number_with_error(measurement.barrier(metric), measurement.standard_error(metric))
    heading(axes, f"{metric} along the segment", f"barrier {barrier} at α = {alphas[highest]:.2g}")


def _measured_bars(measurement: BarrierMeasurement, metric: str) -> Bars:
    return Bars(MEASURED.label, measurement.layer_barriers(metric), _BAR_GREY)


def _predicted_bars(
    prediction: BarrierPrediction, sets: Sequence[Sequence[str]], expansion: Expansion = "second-order"
) -> Bars:
    values = [prediction.barrier(members, expansion) for members in sets]
    errors = [prediction.standard_error(members, expansion) for members in sets]
    pen = EXPANSION_PENS[expansion]
    return Bars(pen.label, np.array(values), pen.color, np.array(errors))


def _fork_heading(fork: Fork, prediction: BarrierPrediction) -> str:
    return f"{fork_title(fork)}, ‖Δ‖ = {short_number(prediction.distance)}"


def _share_scale(panels: Sequence[Axes]) -> None:
    """Give the panels one scale for y, unless the largest is over ten times the smallest."""
    lows, highs = np.transpose([axes.get_ylim() for axes in panels])
    spans = highs - lows
    if spans.max() <= 10 * spans.min():
        for axes in panels:
            axes.set_ylim(lows.min(), highs.max())


def _shared_legend(figure: Figure, axes: Axes, labels: Sequence[str]) -> None:
    """One legend above all panels, from the handles of one of them."""
    handles, _ = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels))
