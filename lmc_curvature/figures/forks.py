"""Barriers between siblings by the epoch of their fork, measured beside predicted."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lmc_curvature.barrier.expansions import Expansion
from lmc_curvature.errors import OptionError
from lmc_curvature.figures.frames import at_epoch, by_fork, checked, having, known, numbers
from lmc_curvature.figures.panels import BARRIER_LABEL, fork_title
from lmc_curvature.plotting.decades import Decades, decades, decades_axis
from lmc_curvature.plotting.grids import EPOCH_LABEL, count_axis, fork_cells
from lmc_curvature.plotting.style import COLUMN_WIDTH, EXPANSION_PENS, INK, look, new_figure

Values = Float64[np.ndarray, " n"]

# The expansions beside the measurement, and their markers.
_COMPARED: dict[Expansion, str] = {"second-order": "s", "with-slopes": "D", "hermite": "^"}
# Those drawn over training, their markers and places in the strip: with slopes, a line would hide the second order.
_GROWN: dict[Expansion, tuple[str, float]] = {"second-order": ("s", 0.5), "hermite": ("^", 0.25)}


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


class Growth(NamedTuple):
    """Barriers of one kind over training.

    Attributes:
        label: What the legend calls them.
        color: Of points, lines and bars.
        marker: Shape of the points.
        thickness: Of the bars.
        opacity: Of the bars.
        share: How far up the strip those stand that have no place on the axis; at one height they would hide others.
        forks: Fork to its rows.
    """

    label: str
    color: str
    marker: str
    thickness: float
    opacity: float
    share: float
    forks: Mapping[int, pd.DataFrame]


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
    measured = _loss_barriers(barriers, split)
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
    """Draw the loss barrier between siblings over training, a panel a fork: measured, and predicted beside it.

    Panels have one logarithmic axis; hollow points in the grey strip at its foot are barriers of zero or below, or over
    1e5 times below the largest. Predictions are to second order, and of Hermite's quintic. Bars, pale ones for
    predictions, are standard errors; where one reaches into the strip, zero is within it.

    Args:
        barriers: A row a fork, epoch, split and metric, with the columns `barrier` and `standard_error`.
        predictions: A row a fork, epoch and expansion, with the columns `barrier` and `standard_error`.

    Raises:
        OptionError: A column is missing, or no row is of the training loss, or of the second order.
    """
    measured = by_fork(_loss_barriers(barriers, "train"))
    rows = checked(predictions, "predictions", ["expansion", "barrier", "standard_error"])
    # Of the expansions, the second order is the paper's.
    checked(rows, "predictions", [], expansion="second-order")
    rows = known(rows, "predictions", "barrier")
    predicted = {expansion: by_fork(having(rows, "expansion", expansion)) for expansion in _GROWN}
    forks = sorted(measured.keys() | {fork for each in predicted.values() for fork in each})
    drawn = [each for group in (measured, *predicted.values()) for each in group.values()]
    scale = decades(np.concatenate([_reach(numbers(e, "barrier"), numbers(e, "standard_error")) for e in drawn]))
    figure, cells = fork_cells(len(forks), 1.9, margin=0.6)
    groups = [
        Growth(f"predicted, {pen.label}", pen.color, marker, 3.0, 0.3, share, predicted[expansion])
        for expansion, (marker, share) in _GROWN.items()
        if predicted[expansion] and (pen := EXPANSION_PENS[expansion])
    ]
    groups.append(Growth("measured", INK, "o", 0.8, 1.0, 0.75, measured))
    panels: list[Axes] = []
    for fork, cell in zip(forks, cells, strict=True):
        axes = figure.add_subplot(cell, sharex=panels[0] if panels else None, sharey=panels[0] if panels else None)
        panels.append(axes)
        for group in groups:
            if fork in group.forks:
                _draw_growth(axes, group, group.forks[fork], scale)
        decades_axis(axes, scale)
        count_axis(axes, "")
        axes.set_title(fork_title(fork), loc="left")
    figure.supxlabel(EPOCH_LABEL, fontsize="medium")
    figure.supylabel(BARRIER_LABEL, fontsize="medium")
    handles = [
        Line2D([], [], color=group.color, marker=group.marker, markersize=3, label=group.label)
        for group in groups[::-1]
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=3 if figure.get_figwidth() > 4 else 1)
    return figure


def _draw_growth(axes: Axes, group: Growth, rows: pd.DataFrame, scale: Decades) -> None:
    """Barriers of a fork over epochs, with their standard errors."""
    epochs, barriers, errors = (numbers(rows, column) for column in ("epoch", "barrier", "standard_error"))
    values = scale.above(barriers)
    pen: dict[str, Any] = {"color": group.color, "marker": group.marker, "markersize": 2.5}
    bar: dict[str, Any] = {"ecolor": to_rgba(group.color, group.opacity), "elinewidth": group.thickness}
    axes.errorbar(epochs, values, yerr=_bars(values, errors, scale), linewidth=1, label=f"_{group.label}", **pen, **bar)
    hollow: dict[str, Any] = {"linestyle": "none", "markerfacecolor": "none", "label": f"_{group.label}, small"}
    axes.plot(epochs, scale.below(barriers, group.share), **pen, **hollow)


def _loss_barriers(barriers: pd.DataFrame, split: str) -> pd.DataFrame:
    rows = checked(barriers, "barriers", ["barrier", "standard_error"], split=split, metric="loss")
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


def _reach(values: Values, errors: Values) -> Float64[np.ndarray, " ends"]:
    """The values, and the ends of the bars of those that are positive; zero for lower ends that are nearly zero.

    A bar that ends just above zero would draw the axis out over decades in which nothing else is.
    """
    positive = values > 0
    lower, upper = (values - errors)[positive], (values + errors)[positive]
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
