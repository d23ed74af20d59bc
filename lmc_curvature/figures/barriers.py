"""Barriers between two networks, and between the children of each fork, predicted and measured."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lmc_curvature.barrier.expansions import Expansion
from lmc_curvature.barrier.measurement import BarrierMeasurement
from lmc_curvature.barrier.prediction import BarrierPrediction
from lmc_curvature.errors import OptionError
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
    plain_ticks,
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
    figure, panels = _fork_panels(forks, 1.75)
    for fork, axes in panels.items():
        _draw_fork_curves(axes, predictions[fork], measurements[fork])
        heading(axes, _fork_heading(fork, predictions[fork]), " ")
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=3, borderaxespad=0, **_NARROW_LEGEND)
    _share_scale(list(panels.values()))
    figure.supxlabel(ALPHA_LABEL, fontsize="medium")
    figure.supylabel(BARRIER_LABEL, fontsize="medium")
    _shared_legend(figure, [MEASURED.label, *(f"predicted, {EXPANSION_PENS[name].label}" for name in _COMPARED)])
    return figure


@look()
def draw_layer_bars(predictions: Predictions, measurements: Measurements) -> Figure:
    """Draw the barrier of each layer alone, measured and predicted, a panel a fork, in the order of the network.

    Bars are measured and predicted to second order, the latter with standard errors; diamonds are predicted with
    slopes. Every panel has its own scale.

    Args:
        predictions: Fork epoch, or any label, to the prediction for its two children.
        measurements: The same for measurements of sets of layers, which may hold more than one layer.

    Raises:
        OptionError: The two do not have the same forks, or a measurement has no sets of layers.
        UnknownLayerError: A measured layer is not one of the prediction's: they are of different partitions.
    """
    forks = matched_forks(predictions, measurements)
    most = max(len(measurements[fork].sets) for fork in forks)
    figure, panels = _fork_panels(forks, rows_height(most, 0.19) + 0.35)
    same_names = len({measurements[fork].layers for fork in forks}) == 1
    for number, (fork, axes) in enumerate(panels.items()):
        prediction, measurement = predictions[fork], measurements[fork]
        bars = [_measured_bars(measurement, "loss"), _predicted_bars(prediction, measurement.sets)]
        named = number % _MOST_COLUMNS == 0 or not same_names
        layer_rows(axes, measurement.layers, bars, label_rows=named)
        with_slopes = [prediction.barrier(members, "with-slopes") for members in measurement.sets]
        pen = EXPANSION_PENS["with-slopes"]
        middles = np.arange(len(with_slopes)) + 0.2
        axes.plot(with_slopes, middles, "D", color=pen.color, markersize=2.8, markeredgewidth=0, label=pen.label)
        heading(axes, _fork_heading(fork, prediction))
    figure.supxlabel(BARRIER_LABEL, fontsize="medium")
    _shared_legend(figure, ["measured", "predicted, second order", "predicted, with slopes"])
    return figure


def _draw_expansion(axes: Axes, prediction: BarrierPrediction, expansion: Expansion, *, label: str) -> None:
    pen = EXPANSION_PENS[expansion]
    axes.plot(
        ALPHAS, prediction.curve(ALPHAS, None, expansion), color=pen.color, linestyle=pen.linestyle, label=label
    )
