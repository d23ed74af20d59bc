"""Barriers between the children of each fork, a panel a fork: curves of the whole network, and bars of its layers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lmc_curvature.barrier import drawing
from lmc_curvature.barrier.expansions import Expansion
from lmc_curvature.barrier.prediction import BarrierPrediction
from lmc_curvature.figures.panels import Measurements, Predictions, fork_title, paired_forks
from lmc_curvature.plotting.axes import heading, legend_line, zero_line
from lmc_curvature.plotting.grids import Panels, label_panels, panel_cells, panel_legend, share_scale
from lmc_curvature.plotting.rows import draw_rows, rows_height
from lmc_curvature.plotting.style import look
from lmc_curvature.plotting.text import short_number

_TIGHT_LEGEND: dict[str, Any] = {"borderaxespad": 0, "borderpad": 0.2, "handlelength": 1.5, "columnspacing": 0.8}


@look()
def draw_barrier_curves(predictions: Predictions, measurements: Measurements) -> Figure:
    """Draw the barrier curves between the children of each fork, a panel a fork: measured, and predicted.

    Where there are anchors between the ends, predictions are anchored, with the anchors and the expansion error, and of
    second order; else of second order, and with slopes. Above each panel stand the barriers, the maxima of its curves,
    and the distance. Panels have one scale when their curves are of one order of magnitude, and a scale each otherwise.

    Args:
        predictions: Fork epoch, or any label, to the prediction for its two children.
        measurements: The same for measurements.

    Raises:
        OptionError: The two do not have the same forks, or a loss was not measured.
    """
    pairs = paired_forks(predictions, measurements)
    handles = _curve_handles([prediction for prediction, _ in pairs.values()])
    panels = panel_cells(len(pairs), 1.9, margin=0.33, legend=_legend_height(len(pairs), len(handles)))
    drawn = [panels.figure.add_subplot(cell) for cell in panels.cells]
    for (fork, (prediction, measurement)), axes in zip(pairs.items(), drawn, strict=True):
        drawing.alpha_axis(axes)
        zero_line(axes)
        measured = short_number(measurement.barrier())
        axes.plot(measurement.alphas, measurement.curve(), label=measured, **drawing.MEASURED)
        first, second = _compared(prediction)
        _draw_predicted(axes, prediction, first)
        # The legend fills its columns downwards: this stands beside the measured barrier.
        axes.plot([], [], linestyle="none", label=f"‖Δ‖ = {short_number(prediction.distance, 3)}")
        _draw_predicted(axes, prediction, second)
        if first == "anchored":
            drawing.draw_expansion_error(axes, prediction, label="_expansion error")
            drawing.draw_anchors(axes, prediction)
        axes.set_title(fork_title(fork), loc="left", pad=29)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.03, 1.02), ncols=2, **_TIGHT_LEGEND)
    share_scale(drawn)
    label_panels(panels.figure, drawing.ALPHA_LABEL, drawing.BARRIER_LABEL)
    _draw_legend(panels, handles)
    return panels.figure


def _compared(prediction: BarrierPrediction) -> tuple[Expansion, Expansion]:
    """The expansion that a prediction means, and one to compare it with."""
    return ("anchored", "second-order") if prediction.expansion == "anchored" else ("second-order", "with-slopes")


def _draw_predicted(axes: Axes, prediction: BarrierPrediction, expansion: Expansion) -> None:
    label = short_number(prediction.barrier(None, expansion))
    drawing.draw_expansion(axes, prediction, expansion, label=label)


def _curve_handles(predictions: Sequence[BarrierPrediction]) -> list[Any]:
    drawn: dict[Expansion, None] = dict.fromkeys(
        expansion for prediction in predictions for expansion in _compared(prediction)
    )
    pens = [drawing.EXPANSION_PENS[expansion] for expansion in drawn]
    handles: list[Any] = [legend_line("measured", **drawing.MEASURED)]
    handles += [legend_line(f"predicted, {pen.label}", **pen.style) for pen in pens]
    if "anchored" in drawn:
        color = drawing.EXPANSION_PENS["anchored"].color
        handles.append(legend_line("anchors", color=color, **drawing.ANCHOR))
        handles.append(Patch(label="expansion error", color=color, alpha=0.18, linewidth=0))
    return handles


@look()
def draw_layer_bars(
    predictions: Predictions, measurements: Measurements, *, titles: Mapping[tuple[str, ...], str] | None = None
) -> Figure:
    """Draw the barrier of each layer alone, measured and predicted, a panel a fork, in the order of the network.

    Where there are anchors between the ends, predicted bars are anchored, with expansion errors broad and pale, and
    diamonds are of second order; else bars are of second order, and diamonds with slopes. Thin lines are standard
    errors. Every panel has its own scale.

    Args:
        predictions: Fork epoch, or any label, to the prediction for its two children.
        measurements: The same for measurements of sets of layers, each of one layer or more.
        titles: Set of layers to what to call it; by default what `BarrierMeasurement.layers` calls it.

    Raises:
        OptionError: The two do not have the same forks, or a measurement has no sets of layers, or no loss.
        PartitionError: A measured layer is not one of the prediction's: their partitions differ.
    """
    pairs = paired_forks(predictions, measurements)
    titles = titles or {}
    names = [
        [titles.get(members, name) for members, name in zip(measurement.sets, measurement.layers, strict=True)]
        for _, measurement in pairs.values()
    ]
    height = rows_height(max(map(len, names)), 0.19) + 0.55
    anchored = any(prediction.expansion == "anchored" for prediction, _ in pairs.values())
    errors = drawing.error_lines(is_anchored=anchored)
    expected = {expansion for prediction, _ in pairs.values() for expansion in _compared(prediction)}
    legend = _legend_height(len(pairs), 1 + len(expected) + len(errors))
    panels = panel_cells(len(pairs), height, margin=0.33, legend=legend)
    handles: dict[str, Any] = {}
    for (fork, (prediction, measurement)), rows, cell in zip(pairs.items(), names, panels.cells, strict=True):
        axes = panels.figure.add_subplot(cell)
        first, second = _compared(prediction)
        bars = [drawing.measured_bars(measurement), drawing.predicted_bars(prediction, measurement.sets, first)]
        marks = drawing.predicted_bars(prediction, measurement.sets, second)
        label_rows = cell.is_first_col() or any(rows != others for others in names)
        draw_rows(axes, rows, bars, marks=marks, label_rows=label_rows)
        heading(axes, fork_title(fork), drawing.distance_text(prediction))
        handles |= {group.label: Patch(color=group.color, label=group.label) for group in bars}
        handles[f"{marks.label}, diamond"] = drawing.diamond(marks)
    label_panels(panels.figure, drawing.BARRIER_LABEL)
    _draw_legend(panels, [*handles.values(), *errors])
    return panels.figure


def _legend_columns(panels: int) -> int:
    """Entries in a row of the legend: as many as fit over one column of panels, over two, or over three."""
    return {1: 1, 2: 3, 4: 3}.get(panels, 5)


def _legend_height(panels: int, entries: int) -> float:
    """Inches for a legend above the panels."""
    return 0.17 * math.ceil(entries / _legend_columns(panels))


def _draw_legend(panels: Panels, handles: list[Any]) -> None:
    panel_legend(panels, handles, columns=_legend_columns(len(panels.cells)))
