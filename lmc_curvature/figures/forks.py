"""Barriers between siblings by the epoch of their fork, measured beside predicted."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lmc_curvature.barrier.expansions import Expansion
from lmc_curvature.errors import OptionError
from lmc_curvature.figures.decades import Decades, decades, decades_axis
from lmc_curvature.figures.frames import at_epoch, by_fork, checked, having, known, numbers
from lmc_curvature.figures.grids import EPOCH_LABEL, count_axis, fork_legend
from lmc_curvature.figures.panels import BARRIER_LABEL
from lmc_curvature.figures.style import COLUMN_WIDTH, EXPANSION_PENS, INK, TEXT_WIDTH, fork_colors, look, new_figure

Values = Float64[np.ndarray, " n"]

# The expansions beside the measurement, and their markers.
_COMPARED: dict[Expansion, str] = {"second-order": "s", "with-slopes": "D", "hermite": "^"}


@dataclass(frozen=True)
class Points:
    """A point a fork.

    Attributes:
        label: What the legend calls them.
        color: Of the points.
        marker: Their shape.
        values: Barriers, (forks,), NaN where there is none.
        errors: Standard errors, (forks,), NaN where they are not known.
    """

    label: str
    color: str
    marker: str
    values: Float64[np.ndarray, " forks"]
    errors: Float64[np.ndarray, " forks"]


@look()
def draw_barriers_by_fork(barriers: pd.DataFrame, predictions: pd.DataFrame, *, split: str = "train") -> Figure:
    """Draw the loss barrier between siblings at their last epoch, by fork: measured, and predicted beside it.

    Figure 4 of Singh et al. 2024. The axis is logarithmic; hollow points in the grey strip at its foot are barriers of
    zero or below, or over 1e5 times below the largest. Bars are standard errors; where one reaches into the strip, zero
    is within it. Predictions are to second order, with slopes, and of Hermite's quintic. They are always of the loss on
    the training data, whatever the split.

    Args:
        barriers: A row a fork, epoch, split and metric, with the columns `barrier` and `standard_error`.
        predictions: A row a fork, epoch and expansion, with the columns `barrier` and `standard_error`.
        split: On which data barriers were measured: `"train"` or `"test"`.

    Raises:
        OptionError: A column is missing, no row has this split, or nothing is predicted for the last epochs.
    """
    measured = _loss_barriers(barriers, split, "standard_error")
    measured = at_epoch(measured, "barriers", None)
    times = list(zip(measured["fork"], measured["epoch"], strict=True))
    of_train = "" if split == "train" else " (train)"
    groups = [_points(measured, times, f"measured, {split}", INK, "o")]
    predicted = checked(predictions, "predictions", ["expansion", "barrier", "standard_error"])
    for expansion, marker in _COMPARED.items():
        rows = having(predicted, "expansion", expansion)
        pen = EXPANSION_PENS[expansion]
        groups.append(_points(rows, times, f"predicted{of_train}, {pen.label}", pen.color, marker))
    if not np.isfinite([group.values for group in groups[1:]]).any():
        last = ", ".join(f"fork {int(fork)} at epoch {int(epoch)}" for fork, epoch in times)
        raise OptionError(f"The table of predictions has no barrier for the last epochs measured: {last}.")
    figure = new_figure(max(COLUMN_WIDTH, 0.5 * len(times) + 1.2), 3.1)
    axes = figure.add_subplot()
    scale = decades(np.concatenate([_reach(group.values, group.errors) for group in groups]))
    groups = [group for group in groups if np.isfinite(group.values).any()]
    for offset, group in zip(0.16 * (np.arange(len(groups)) - (len(groups) - 1) / 2), groups, strict=True):
        _draw_points(axes, group, offset, scale)
    decades_axis(axes, scale)
    axes.set_xticks(range(len(times)), [str(int(fork)) for fork, _ in times])
    axes.set(xlim=(-0.6, len(times) - 0.4), xlabel="fork at epoch", ylabel=BARRIER_LABEL)
    handles = [_handle(group) for group in groups]
    figure.legend(handles=handles, loc="outside upper left", ncols=1, borderaxespad=0.2)
    return figure


@look()
def draw_barrier_growth(barriers: pd.DataFrame, predictions: pd.DataFrame) -> Figure:
    """Draw the loss barrier between siblings over training, a colour a fork: measured, and predicted to second order.

    The axis is logarithmic; hollow points in the grey strip at its foot, a row a fork, are measured barriers of zero or
    below, or over 1e5 times below the largest. Predictions as small are left out.

    Args:
        barriers: A row a fork, epoch, split and metric, with the column `barrier`.
        predictions: A row a fork, epoch and expansion, with the column `barrier`.

    Raises:
        OptionError: A column is missing, or no row is of the training loss, or of the second order.
    """
    measured = by_fork(_loss_barriers(barriers, "train"))
    rows = checked(predictions, "predictions", ["barrier"], expansion="second-order")
    predicted = by_fork(known(rows, "predictions", "barrier"))
    forks = sorted(measured.keys() | predicted.keys())
    colors = dict(zip(forks, fork_colors(forks).values(), strict=True))
    scale = decades(np.concatenate([numbers(each, "barrier") for each in (*measured.values(), *predicted.values())]))
    legend_rows = -(-len(forks) // 9)
    figure = new_figure(0.75 * TEXT_WIDTH, 3.2 + 0.15 * legend_rows)
    axes = figure.add_subplot()
    # Small, but a line cannot show a point that stands alone.
    dashed: dict[str, Any] = {"linestyle": "--", "linewidth": 1, "marker": "s", "markersize": 1.5}
    for fork, each in predicted.items():
        epochs, values = numbers(each, "epoch"), scale.above(numbers(each, "barrier"))
        axes.plot(epochs, values, color=colors[fork], label=f"_{fork}, predicted", **dashed)
    hollow: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 3, "markerfacecolor": "white"}
    for number, (fork, each) in enumerate(measured.items(), start=1):
        epochs, values = numbers(each, "epoch"), numbers(each, "barrier")
        # At one height, forks would hide each other.
        strip = scale.below(values, 1 - number / (len(measured) + 1))
        axes.plot(epochs, scale.above(values), color=colors[fork], marker="o", markersize=3, label=f"_{fork}")
        axes.plot(epochs, strip, color=colors[fork], label=f"_{fork}, small", **hollow)
    decades_axis(axes, scale)
    count_axis(axes, EPOCH_LABEL)
    axes.set_ylabel(BARRIER_LABEL)
    styles = [
        Line2D([], [], color=INK, marker="o", markersize=3, label="measured"),
        Line2D([], [], color=INK, label="predicted, second order", **dashed),
    ]
    fork_legend(figure, colors, styles)
    return figure


def _loss_barriers(barriers: pd.DataFrame, split: str, *columns: str) -> pd.DataFrame:
    rows = checked(barriers, "barriers", ["barrier", *columns], split=split, metric="loss")
    return known(rows, "barriers", "barrier")


def _points(rows: pd.DataFrame, times: list[tuple[int, int]], label: str, color: str, marker: str) -> Points:
    """Barriers at given forks and epochs."""
    found = {
        (fork, epoch): (barrier, error)
        for fork, epoch, barrier, error in zip(
            rows["fork"], rows["epoch"], numbers(rows, "barrier"), numbers(rows, "standard_error"), strict=True
        )
    }
    values, errors = np.array([found.get(time, (np.nan, np.nan)) for time in times]).T
    return Points(label, color, marker, values, errors)


def _reach(values: Values, errors: Values) -> Values:
    """The values, and the ends of the bars of those that are positive; zero for lower ends that are nearly zero.

    A bar that ends just above zero would draw the axis out over decades in which nothing else is.
    """
    positive = values > 0
    values, lower, upper = values, (values - errors)[positive], (values + errors)[positive]
    least = 0.1 * values[positive].min(initial=np.inf)
    return np.concatenate([values, np.where(lower < least, 0.0, lower), upper])


def _bars(values: Values, errors: Values, scale: Decades) -> Float64[np.ndarray, "2 n"]:
    """How far bars reach down and up; what has no place on the axis ends in the strip."""
    lower = values - errors
    return np.stack([values - np.where(lower < scale.floor, scale.strip, lower), errors])


def _draw_points(axes: Axes, points: Points, offset: float, scale: Decades) -> None:
    positions = np.arange(len(points.values)) + offset
    values = scale.above(points.values)
    errors = _bars(values, points.errors, scale)
    pen: dict[str, Any] = {"color": points.color, "marker": points.marker, "markersize": 4, "linestyle": "none"}
    axes.errorbar(positions, values, yerr=errors, elinewidth=0.8, label=f"_{points.label}", **pen)
    axes.plot(positions, scale.below(points.values), markerfacecolor="none", label=f"_{points.label}, small", **pen)
    # Faint, since there is nothing between two forks: it leads the eye.
    axes.plot(positions, values, color=points.color, linewidth=0.6, alpha=0.5, label="_guide")


def _handle(points: Points) -> Line2D:
    return Line2D([], [], color=points.color, marker=points.marker, markersize=4, linestyle="none", label=points.label)
