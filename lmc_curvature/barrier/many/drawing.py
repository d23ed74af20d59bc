"""The figures of predictions and of measurements of several networks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lmc_curvature.barrier.drawing import BARRIER_LABEL, EXPANSION_PENS, sets_title
from lmc_curvature.plotting.axes import heading
from lmc_curvature.plotting.rows import Bars, draw_rows, rows_height
from lmc_curvature.plotting.style import GREY, INK, SMALL, TEXT_WIDTH, look, new_figure
from lmc_curvature.plotting.text import number_with_error, short_name, short_number

if TYPE_CHECKING:
    from lmc_curvature.barrier.many.measurement import BarriersMeasurement
    from lmc_curvature.barrier.many.prediction import BarriersPrediction

# Up to so many networks, cells have room for numbers.
_MOST_NUMBERS = 5
_HEIGHT, _ROW_HEIGHT, _LONGEST = 2.6, 0.15, 12


@look()
def draw_predicted_barriers(prediction: "BarriersPrediction") -> Figure:
    """Draw the predicted barriers of all pairs, and that of each layer between the networks and their mean.

    Thin lines are standard errors, where there was more than one batch; what is broad and pale is the expansion error.

    Args:
        prediction: A result of `predict_barriers`.
    """
    layers = prediction.layers
    errors = np.array([prediction.mean_standard_error(layer) for layer in layers])
    broad = prediction.mean_expansion_errors(np.eye(len(layers), dtype=bool))
    bars = Bars("predicted", prediction.layer_barriers(), EXPANSION_PENS["anchored"].color, errors, broad)
    barrier = number_with_error(prediction.mean_barrier(), prediction.mean_standard_error())
    figure, pairs, rows = _panels(len(layers))
    _draw_pairs(pairs, prediction.names, prediction.heights(), "predicted")
    draw_rows(rows, layers, [bars])
    rows.set_xlabel(BARRIER_LABEL)
    heading(rows, "each layer at the mean of all, predicted", f"of all layers, evaluated: {barrier}")
    return figure


@look()
def draw_measured_barriers(measurement: "BarriersMeasurement") -> Figure:
    """Draw the measured barriers of all pairs, and of each set of layers, and all, between the networks and their mean.

    They are of the first metric. Thin lines are standard errors, where there was more than one batch.

    Args:
        measurement: A result of `measure_barriers`.
    """
    metric = measurement.metrics[0]
    names = [", ".join(members) for members in measurement.sets]
    values = np.append(measurement.set_barriers(metric), measurement.mean_barrier(metric))
    errors = np.append(measurement.set_standard_errors(metric), measurement.mean_standard_error(metric))
    figure, pairs, rows = _panels(len(values))
    _draw_pairs(pairs, measurement.names, measurement.heights(metric), f"measured, by {metric}")
    draw_rows(rows, [*names, "all layers"], [Bars("measured", values, GREY, errors)])
    rows.set_xlabel(f"{metric} barrier")
    title = f"{sets_title(measurement.sets)} at the mean, measured" if names else "the mean of all, measured"
    heading(rows, title, "the others stay; thin lines: standard errors")
    return figure


def _panels(rows: int) -> tuple[Figure, Axes, Axes]:
    figure = new_figure(TEXT_WIDTH, max(_HEIGHT, rows_height(rows, _ROW_HEIGHT) + 0.8))
    pairs, layers = figure.subplots(1, 2)
    return figure, pairs, layers


def _draw_pairs(axes: Axes, names: Sequence[str], heights: Float[np.ndarray, "N N"], detail: str) -> None:
    """A cell a pair: red is above the chord, and blue below it."""
    cells = np.where(np.eye(len(names), dtype=bool), np.nan, heights)
    most = float(np.abs(heights).max()) or 1.0
    axes.imshow(cells, cmap="RdBu_r", vmin=-most, vmax=most)
    if len(names) <= _MOST_NUMBERS:
        for (i, j), height in np.ndenumerate(heights):
            if i != j:
                color = "white" if abs(height) > 0.65 * most else INK
                axes.text(j, i, short_number(height, 1), ha="center", va="center", fontsize=SMALL, color=color)
    labels = [short_name(name, _LONGEST) for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), labels)
    axes.tick_params(length=0)
    heading(axes, "barriers of pairs", f"{detail}; red: above the chord")
