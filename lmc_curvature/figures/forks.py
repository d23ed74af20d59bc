"""Barriers between siblings by the epoch of their fork, measured beside predicted."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lmc_curvature.barrier.drawing import EXPANSION_PENS, LOG_BARRIER_LABEL
from lmc_curvature.barrier.expansions import Expansion
from lmc_curvature.errors import OptionError
from lmc_curvature.figures.frames import at_epoch, by_fork, checked, having, known, numbers
from lmc_curvature.figures.panels import EPOCH_LABEL, fork_title, strip_entries
from lmc_curvature.plotting.axes import legend_line, ticks_among
from lmc_curvature.plotting.decades import Decades, decades, decades_axis
from lmc_curvature.plotting.grids import label_panels, panel_cells, panel_legend
from lmc_curvature.plotting.style import COLUMN_WIDTH, INK, Color, look, new_figure

# Barriers this many orders of magnitude below the largest stand in the strip.
_MOST_DECADES = 5
_MARKERS: dict[Expansion, str] = {"anchored": "v", "second-order": "s", "with-slopes": "D", "hermite": "^"}


class Kind(NamedTuple):
    """Barriers of one kind, measured or predicted by some expansion.

    Attributes:
        rows: Rows with the columns `barrier` and `standard_error`.
        label: Their name in the legend.
        color: The colour of points, lines and bars.
        marker: The shape of the points.
        share: The height in the strip, from 0 to 1, of those below the axis; at one height kinds would hide each other.
    """

    rows: pd.DataFrame
    label: str
    color: str | Color
    marker: str
    share: float = 0.5


@look()
def draw_barriers_by_fork(barriers: pd.DataFrame, predictions: pd.DataFrame, *, split: str = "train") -> Figure:
    """Draw the loss barrier between siblings at their last epoch, by fork: measured, and predicted beside it.

    Figure 4 of Singh et al. 2024. The axis is logarithmic; hollow points in the grey strip at its foot are barriers of
    zero or below, or over 1e5 times below the largest. Every kind stands at its fork's tick, the measurement in front.
    Bars are standard errors; where one reaches into the strip, zero is within it. Predictions are anchored, with broad
    pale bars for the expansion error, and to second order; where none is anchored, they are to second order, with
    slopes, and of Hermite's quintic. They are always of the loss on the training data, whatever the split.

    Args:
        barriers: A row a fork, epoch, split and metric, with the columns `barrier` and `standard_error`.
        predictions: A row a fork, epoch and expansion, with the columns `barrier` and `standard_error`, and
            `expansion_error` where some are anchored.
        split: The data on which barriers were measured: `"train"` or `"test"`.

    Raises:
        OptionError: A column is missing, no row has this split, or nothing is predicted for the last epochs.
    """
    measured = at_epoch(_loss_barriers(barriers, split), "barriers", None)
    times = measured[["fork", "epoch"]]
    predicted = checked(predictions, "predictions", ["expansion", "barrier", "standard_error"])
    kinds = [Kind(measured, f"measured, {split}", INK, "o")]
    expansions: tuple[Expansion, ...] = ("second-order", "with-slopes", "hermite")
    for expansion in ("anchored", "second-order") if _has_anchored(predicted) else expansions:
        kind = _predicted(predicted, expansion, "predicted" if split == "train" else "predicted (train)")
        # Where a fork has no prediction, its row has no numbers.
        kind = kind._replace(rows=times.merge(kind.rows, how="left"))
        if np.isfinite(numbers(kind.rows, "barrier")).any():
            kinds.append(kind)
    if len(kinds) == 1:
        last = ", ".join(f"fork {fork:.0f} at epoch {epoch:.0f}" for fork, epoch in times.itertuples(index=False))
        raise OptionError(f"The table of predictions has no barrier for the last epochs measured: {last}.")
    figure = new_figure(max(COLUMN_WIDTH, 0.5 * len(times) + 1.2), 3.1)
    axes = figure.add_subplot()
    scale = _scale(kind.rows for kind in kinds)
    positions = np.arange(len(times))
    styles: list[dict[str, Any]] = []
    for number, kind in enumerate(kinds):
        # All at the fork's tick: what is in front is smaller, and its bars are thinner, than what is behind it.
        styles.append({"markersize": 3.5 + 1.5 * number, "linestyle": "none"})
        front = {"elinewidth": 0.8 + 0.8 * number, "zorder": 4 - 0.3 * number}
        kind = kind._replace(share=1 - (number + 1) / (len(kinds) + 1))
        _draw_barriers(axes, positions, kind, scale, **front, **styles[-1])
        _draw_expansion_errors(axes, positions, kind, scale)
        # Faint, since there is nothing between two forks: it leads the eye.
        shown = scale.above(numbers(kind.rows, "barrier"))
        axes.plot(positions, shown, color=kind.color, linewidth=0.6, alpha=0.5, label="_guide")
    decades_axis(axes, scale)
    axes.grid(axis="y")
    axes.set_xticks(range(len(times)), [f"{fork:.0f}" for fork in times["fork"]])
    axes.set(xlim=(-0.6, len(times) - 0.4), xlabel="fork at epoch", ylabel=LOG_BARRIER_LABEL)
    handles = [_handle(kind, **style) for kind, style in zip(kinds, styles, strict=True)]
    handles += strip_entries([scale], _MOST_DECADES, marker="o", markersize=3.5)
    figure.legend(handles=handles, loc="outside upper left", ncols=1, borderaxespad=0.2)
    return figure


@look()
def draw_barrier_growth(barriers: pd.DataFrame, predictions: pd.DataFrame) -> Figure:
    """Draw the loss barrier between siblings over training, a panel a fork: measured, and predicted beside it.

    Panels have one logarithmic axis; hollow points in the grey strip at its foot are barriers of zero or below, or over
    1e5 times below the largest. Predictions are anchored, in a pale band of the expansion error, and to second order;
    where none is anchored, they are to second order, and of Hermite's quintic. Bars, pale ones for predictions, are
    standard errors; where one reaches into the strip, zero is within it.

    Args:
        barriers: A row a fork, epoch, split and metric, with the columns `barrier` and `standard_error`.
        predictions: A row a fork, epoch and expansion, with the columns `barrier` and `standard_error`, and
            `expansion_error` where some are anchored.

    Raises:
        OptionError: A column is missing, or no row is of the training loss, or of the second order.
    """
    measured = Kind(_loss_barriers(barriers, "train"), "measured", INK, "o", share=0.75)
    predicted = checked(predictions, "predictions", ["expansion", "barrier", "standard_error"])
    # Of the expansions, the second order is the paper's.
    checked(predicted, "predictions", [], expansion="second-order")
    predicted = known(predicted, "predictions", "barrier")
    # With slopes, a line would hide the second order.
    other = "anchored" if _has_anchored(predicted) else "hermite"
    kinds = [_predicted(predicted, "second-order"), _predicted(predicted, other, share=0.25), measured]
    kinds = [kind for kind in kinds if len(kind.rows)]
    scale = _scale(rows for kind in kinds for rows in by_fork(kind.rows).values())
    forks = sorted({int(fork) for kind in kinds for fork in kind.rows["fork"]})
    panels = panel_cells(len(forks), 1.9, margin=0.33, legend=0.45)
    figure, epochs = panels.figure, np.concatenate([numbers(kind.rows, "epoch") for kind in kinds])
    first: Axes | None = None
    for fork, cell in zip(forks, panels.cells, strict=True):
        axes = figure.add_subplot(cell, sharex=first, sharey=first)
        first = first or axes
        for kind in kinds:
            each = kind._replace(rows=having(kind.rows, "fork", fork))
            # The bars of predictions are broad and pale, behind the thin ones of the measurement.
            thickness, opacity = (0.8, 1.0) if kind is measured else (3.0, 0.3)
            style = {"linewidth": 1, "elinewidth": thickness, "ecolor": to_rgba(kind.color, opacity)}
            if len(each.rows):
                own = numbers(each.rows, "epoch")
                _draw_barriers(axes, own, each, scale, markersize=2.5, **style)
                _draw_expansion_errors(axes, own, each, scale, joined=len(own) > 1)
        decades_axis(axes, scale)
        axes.grid(axis="y")
        ticks_among(axes.xaxis, epochs)
        axes.set_title(fork_title(fork), loc="left")
    label_panels(figure, EPOCH_LABEL, LOG_BARRIER_LABEL)
    handles = [_handle(kind, markersize=3) for kind in kinds[::-1]]
    handles += strip_entries([scale], _MOST_DECADES, marker="o", markersize=3)
    panel_legend(panels, handles, columns=1 + int(figure.get_figwidth() > 4) + int(figure.get_figwidth() > 6))
    return figure


def _loss_barriers(barriers: pd.DataFrame, split: str) -> pd.DataFrame:
    rows = checked(barriers, "barriers", ["barrier", "standard_error"], split=split, metric="loss")
    return known(rows, "barriers", "barrier")


def _has_anchored(predictions: pd.DataFrame) -> bool:
    return bool((predictions["expansion"] == "anchored").any())


def _predicted(predictions: pd.DataFrame, expansion: Expansion, name: str = "predicted", share: float = 0.5) -> Kind:
    pen = EXPANSION_PENS[expansion]
    if expansion == "anchored":
        checked(predictions, "predictions", ["expansion_error"])
    rows = having(predictions, "expansion", expansion)
    return Kind(rows, f"{name}, {pen.label}", pen.color, _MARKERS[expansion], share)


def _handle(kind: Kind, **style: Any) -> Line2D:
    broad = "\n(pale: expansion error)" if np.isfinite(_expansion_errors(kind.rows)).any() else ""
    return legend_line(f"{kind.label}{broad}", color=kind.color, marker=kind.marker, **style)


def _scale(tables: Iterable[pd.DataFrame]) -> Decades:
    """The axis for barriers and for the ends of the bars of those that are positive.

    A bar that ends just above zero would draw the axis out over decades in which nothing else is: it ends at zero.
    """
    reached = []
    for rows in tables:
        barriers, errors = numbers(rows, "barrier"), numbers(rows, "standard_error")
        errors = np.fmax(errors, _expansion_errors(rows))
        positive = barriers > 0
        lower, upper = (barriers - errors)[positive], (barriers + errors)[positive]
        least = 0.1 * barriers[positive].min(initial=np.inf)
        reached += [barriers, np.where(lower < least, 0.0, lower), upper]
    return decades(np.concatenate(reached), most=_MOST_DECADES)


def _draw_barriers(axes: Axes, positions: np.ndarray, kind: Kind, scale: Decades, **style: Any) -> None:
    """Points with their standard errors; hollow points, and ends of bars, in the strip for what is below the axis."""
    barriers, errors = numbers(kind.rows, "barrier"), numbers(kind.rows, "standard_error")
    shown, lower = scale.above(barriers), barriers - errors
    below = shown - np.where(lower < scale.floor, scale.strip, lower)
    point: dict[str, Any] = {"color": kind.color, "marker": kind.marker}
    axes.errorbar(positions, shown, yerr=np.stack([below, errors]), label=f"_{kind.label}", **point, **style)
    point |= {"markersize": style["markersize"], "linestyle": "none", "markerfacecolor": "none"}
    axes.plot(positions, scale.below(barriers, kind.share), label=f"_{kind.label}, small", **point)


def _draw_expansion_errors(
    axes: Axes, positions: np.ndarray, kind: Kind, scale: Decades, *, joined: bool = False
) -> None:
    """How far predictions may be off, apart from sampling: broad pale bars, or a band through them."""
    errors = _expansion_errors(kind.rows)
    if not np.isfinite(errors).any():
        return
    shown = scale.above(numbers(kind.rows, "barrier"))
    lower = shown - errors
    low, high = np.where(lower < scale.floor, scale.strip, lower), shown + errors
    style: dict[str, Any] = {"color": kind.color, "zorder": 1.5, "label": f"_{kind.label}, expansion error"}
    if joined:
        axes.fill_between(positions, low, high, alpha=0.15, linewidth=0, **style)
    else:
        axes.vlines(positions, low, high, alpha=0.25, linewidth=4, **style)


def _expansion_errors(rows: pd.DataFrame) -> np.ndarray:
    """Of kinds that have none, such as measurements, they are not numbers."""
    return numbers(rows, "expansion_error") if "expansion_error" in rows else np.full(len(rows), np.nan)
