"""The figures of a prediction and of a measurement, and how barriers are drawn in all figures."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lmc_curvature.barrier.expansions import Expansion
from lmc_curvature.barrier.measurement import BarrierMeasurement
from lmc_curvature.barrier.prediction import BarrierPrediction
from lmc_curvature.plotting.axes import heading, legend_line, plain_ticks, zero_line
from lmc_curvature.plotting.rows import BROAD_ERROR, THIN_ERROR, Bars, draw_rows, rows_height
from lmc_curvature.plotting.style import COLUMN_WIDTH, GREY, INK, TEXT_WIDTH, VERMILION, look, new_figure, pens
from lmc_curvature.plotting.text import number_with_error, short_number

ALPHAS = np.linspace(0.0, 1.0, 201)
ALPHA_LABEL = "position α on the segment"
BARRIER_LABEL = "barrier (units of the loss)"
LOG_BARRIER_LABEL = "barrier (units of the loss, log scale)"
_EXPANSION_NAMES: dict[Expansion, str] = {
    "anchored": "anchored",
    "second-order": "second order",
    "with-slopes": "with slopes",
    "shared-hessian": "shared Hessian",
    "hermite": "Hermite",
}
EXPANSION_PENS = pens(_EXPANSION_NAMES)
ANCHOR: dict[str, Any] = {"marker": "D", "markersize": 4, "linestyle": "none", "markerfacecolor": "white"}
MEASURED: dict[str, Any] = {"color": INK, "marker": "o", "markersize": 3, "linewidth": 1}

_METRIC_UNITS = {"loss": "units of the loss", "error": "share of examples"}
_BAR_GREY = "#888888"
_CURVE_HEIGHT = 2.3
_ROW_HEIGHT = 0.15


@look()
def draw_prediction(prediction: BarrierPrediction) -> Figure:
    """Draw a prediction: the barrier curve of the whole network by every expansion, and the barrier of each layer.

    Where there are anchors between the ends, they are marked on the anchored curve, bars are anchored, diamonds are of
    second order, and what is broad and pale is the expansion error; else bars are of second order. Thin lines are
    standard errors, where there was more than one batch.

    Args:
        prediction: A result of `predict_barrier`.
    """
    anchored = "anchored" in prediction.expansions
    # The legend below the curves takes 1 inch, and 0.7 more for anchors, errors and diamonds.
    below = 1.0 + 0.7 * anchored
    height = max(rows_height(len(prediction.layers), _ROW_HEIGHT) + 0.6, _CURVE_HEIGHT + below)
    figure = new_figure(TEXT_WIDTH, height)
    grid = figure.add_gridspec(2, 2, height_ratios=[_CURVE_HEIGHT, height - _CURVE_HEIGHT])
    curves, legend, layers = (figure.add_subplot(cell) for cell in (grid[0, 0], grid[1, 0], grid[:, 1]))

    _draw_expansions(curves, prediction)
    alone = [(name,) for name in prediction.layers]
    marks = predicted_bars(prediction, alone, "second-order") if anchored else None
    handles = [*curves.get_legend_handles_labels()[0], *error_lines("of a layer", is_anchored=anchored)]
    legend.set_axis_off()
    legend.legend(handles=[*handles, *([diamond(marks)] if marks else [])], loc="upper left", borderaxespad=0)

    draw_rows(layers, prediction.layers, [predicted_bars(prediction, alone)], marks=marks)
    layers.set_xlabel(BARRIER_LABEL)
    heading(layers, "each layer alone, predicted", EXPANSION_PENS[prediction.expansion].label)
    return figure


@look()
def draw_measurement(measurement: BarrierMeasurement) -> Figure:
    """Draw a measurement: every metric along the segment with its chord, and the barrier of each set of layers.

    The barrier is the longest way up from the chord to the curve, and is drawn where it was found. The sets' barriers
    are of the first metric; without sets there is no such panel.

    Args:
        measurement: A result of `measure_barrier`.
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
        draw_rows(layers, measurement.layers, [measured_bars(measurement, metrics[0])])
        layers.set_xlabel(f"{metrics[0]} barrier ({_METRIC_UNITS[metrics[0]]})")
        heading(layers, f"{sets_title(sets)}, measured", "the others stay; thin lines: standard errors")
    return figure


@look()
def draw_predicted_curves(prediction: BarrierPrediction) -> Figure:
    """Draw the barrier curve of the whole network by every expansion, small, beside what they are.

    Args:
        prediction: A result of `predict_barrier`.
    """
    figure = new_figure(TEXT_WIDTH, _CURVE_HEIGHT)
    curves = figure.add_subplot()
    _draw_expansions(curves, prediction)
    figure.legend(*curves.get_legend_handles_labels(), loc="outside right upper")
    return figure


@look()
def draw_measured_curves(measurement: BarrierMeasurement) -> Figure:
    """Draw every metric along the segment, small, side by side.

    Args:
        measurement: A result of `measure_barrier`.
    """
    metrics = measurement.metrics
    figure = new_figure(COLUMN_WIDTH * len(metrics), _CURVE_HEIGHT + 0.2)
    panels = list(figure.subplots(1, len(metrics), squeeze=False).flat)
    for axes, metric in zip(panels, metrics, strict=True):
        _draw_metric(axes, measurement, metric)
        axes.set_xlabel(ALPHA_LABEL)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return figure


def _draw_expansions(axes: Axes, prediction: BarrierPrediction) -> None:
    """The curves of the whole network, with their barriers in the legend; anchored ones with anchors and error."""
    alpha_axis(axes)
    zero_line(axes)
    for expansion in prediction.expansions:
        barrier = number_with_error(prediction.barrier(None, expansion), prediction.standard_error(None, expansion))
        draw_expansion(axes, prediction, expansion, label=f"{EXPANSION_PENS[expansion].label}: barrier {barrier}")
    if "anchored" in prediction.expansions:
        error = short_number(prediction.expansion_error())
        draw_expansion_error(axes, prediction, label=f"expansion error: ± {error} at the highest")
        draw_anchors(axes, prediction, label="anchors")
    axes.set(xlabel=ALPHA_LABEL, ylabel=BARRIER_LABEL)
    heading(axes, "whole network, predicted", distance_text(prediction))


def alpha_axis(axes: Axes) -> None:
    """Prepare a panel for curves over the segment: α from 0 to 1, and plain numbers."""
    # A little room, so that points at the ends are whole.
    axes.set_xlim(-0.02, 1.02)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    plain_ticks(axes.yaxis)


def draw_expansion(axes: Axes, prediction: BarrierPrediction, expansion: Expansion, *, label: str) -> None:
    """The barrier curve of the whole network by one expansion."""
    axes.plot(ALPHAS, prediction.curve(ALPHAS, None, expansion), label=label, **EXPANSION_PENS[expansion].style)


def draw_expansion_error(axes: Axes, prediction: BarrierPrediction, *, label: str) -> None:
    """How far the anchored curve of the whole network may be off, as a pale band about it."""
    curve, error = prediction.curve(ALPHAS, None, "anchored"), prediction.set_expansion_errors([None], ALPHAS)[0]
    color = EXPANSION_PENS["anchored"].color
    axes.fill_between(ALPHAS, curve - error, curve + error, color=color, alpha=0.18, linewidth=0, label=label)


def draw_anchors(axes: Axes, prediction: BarrierPrediction, *, label: str = "_anchors") -> None:
    """The anchors, on the anchored curve of the whole network."""
    alphas = [anchor.alpha for anchor in prediction.anchors]
    color = EXPANSION_PENS["anchored"].color
    # Those at the ends are whole.
    points: dict[str, Any] = {"color": color, "label": label, "clip_on": False, "zorder": 3, **ANCHOR}
    axes.plot(alphas, prediction.curve(alphas, None, "anchored"), **points)


def error_lines(what: str = "", *, is_anchored: bool = True) -> list[Line2D]:
    """Entries of a legend for the errors on bars; of those, anchored ones have expansion errors."""
    kinds = {"standard error": THIN_ERROR} | ({"expansion error": BROAD_ERROR} if is_anchored else {})
    return [
        legend_line(f"{name} {what}".strip(), color=style["ecolor"], linewidth=style["elinewidth"])
        for name, style in kinds.items()
    ]


def diamond(marks: Bars) -> Line2D:
    """Entry of a legend for marks over bars."""
    return legend_line(marks.label, color=marks.color, marker="D", markersize=3, linestyle="none")


def measured_bars(measurement: BarrierMeasurement, metric: str = "loss") -> Bars:
    """Measured barriers of sets of layers, as bars with standard errors."""
    barriers, errors = measurement.layer_barriers(metric), measurement.layer_standard_errors(metric)
    return Bars("measured", barriers, _BAR_GREY, errors)


def predicted_bars(
    prediction: BarrierPrediction, sets: Sequence[Sequence[str]], expansion: Expansion | None = None
) -> Bars:
    """Predicted barriers of sets of layers, as bars with standard errors, and anchored ones with expansion errors."""
    expansion = expansion or prediction.expansion
    values = np.array([prediction.barrier(members, expansion) for members in sets])
    errors = np.array([prediction.standard_error(members, expansion) for members in sets])
    broad = np.array([prediction.expansion_error(members) for members in sets]) if expansion == "anchored" else None
    pen = EXPANSION_PENS[expansion]
    return Bars(f"predicted, {pen.label}", values, pen.color, errors, broad)


def sets_title(sets: Iterable[Sequence[str]]) -> str:
    """Title of a panel about sets of layers, which are often single layers."""
    return "each layer alone" if all(len(members) == 1 for members in sets) else "each set of layers alone"


def distance_text(prediction: BarrierPrediction) -> str:
    """The distance between the two networks."""
    return f"distance ‖Δ‖ = {short_number(prediction.distance, 3)}"


def _draw_metric(axes: Axes, measurement: BarrierMeasurement, metric: str) -> None:
    """The metric along the segment, the chord between its ends, and the barrier between the two."""
    alphas, values, ends = measurement.alphas, measurement.values(metric), measurement.ends(metric)
    highest = measurement.curve(metric).argmax()
    chord = np.interp(alphas, [0, 1], ends)
    alpha_axis(axes)
    axes.plot(alphas, values, label="measured", **MEASURED)
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
