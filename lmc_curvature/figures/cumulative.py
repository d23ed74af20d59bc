"""Barriers that grow layer by layer: of the first k layers, and of the last k."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lmc_curvature.barrier.drawing import BARRIER_LABEL
from lmc_curvature.figures.frames import any_known, at_epoch, by_fork, checked, having, numbers
from lmc_curvature.figures.panels import fork_title
from lmc_curvature.plotting.axes import count_axis, heading, legend_line, plain_ticks, zero_line
from lmc_curvature.plotting.grids import label_panels, panel_cells, panel_legend, share_scale
from lmc_curvature.plotting.style import BLUE, INK, VERMILION, look

_SIDES = {"first": BLUE, "last": VERMILION}
_MEASURED: dict[str, Any] = {"marker": "o", "markersize": 2.5, "linewidth": 1}
# Where the first is not known, the second takes its place.
_ANCHORED = {"predicted_anchored": ("predicted, anchored", "--")}
_SHARED = {"predicted_shared": ("predicted, shared Hessian", "--")}
_SECOND_ORDER = {"predicted": ("predicted, second order", ":")}


@look()
def draw_cumulative_barriers(cumulative: pd.DataFrame, *, epoch: int | None = None) -> Figure:
    """Draw the barrier of the first k layers and of the last k layers together, for every k, a panel a fork.

    Measured as by Adilova et al. 2023, with standard errors where they are known; and predicted: anchored, in a pale
    band of the expansion error, or, where nothing is, from the curvature at one end (Singh et al. 2024, equation 21);
    and from the curvature at both ends (second order). Panels have one scale when they are of one order of magnitude,
    and a scale each otherwise.

    Args:
        cumulative: A row a fork, epoch, side (`"first"` or `"last"`) and count of layers, with the columns `measured`,
            `predicted`, `predicted_shared`, and where that is known `measured_se`, `predicted_anchored` and its
            `expansion_error`.
        epoch: The siblings' epoch; by default the last that each fork has.

    Raises:
        OptionError: A column is missing, or no fork has this epoch.
    """
    columns = ["side", "count", "measured", *_SHARED, *_SECOND_ORDER]
    rows = at_epoch(checked(cumulative, "cumulative barriers", columns), "cumulative barriers", epoch)
    anchored = any_known(rows, *_ANCHORED)
    predicted = (_ANCHORED if anchored else _SHARED) | _SECOND_ORDER
    forks = by_fork(rows)
    panels = panel_cells(len(forks), 1.9, margin=0.33, legend=0.52)
    drawn = [panels.figure.add_subplot(cell) for cell in panels.cells]
    for axes, (fork, each) in zip(drawn, forks.items(), strict=True):
        zero_line(axes)
        for side, color in _SIDES.items():
            side_rows = having(each, "side", side, by="count")
            for column, (_, style) in predicted.items():
                pen: dict[str, Any] = {"linestyle": style, "color": color, "label": f"_{side}, {column}"}
                axes.plot(numbers(side_rows, "count"), numbers(side_rows, column), **pen)
            _draw_measured(axes, side_rows, color, f"_{side}, measured")
            if any_known(side_rows, "expansion_error"):
                _draw_band(axes, side_rows, color, f"_{side}, expansion error")
        count_axis(axes, "")
        plain_ticks(axes.yaxis)
        heading(axes, fork_title(fork), f"siblings at epoch {int(numbers(each, 'epoch')[0])}")
    share_scale(drawn)
    label_panels(panels.figure, "number of layers k", BARRIER_LABEL)
    # Colours for the sides, and line styles for where the barriers come from.
    handles: list[Any] = [legend_line(f"{side} k layers", color=color, linewidth=3) for side, color in _SIDES.items()]
    bars = " ± standard error" if any_known(rows, "measured_se") else ""
    handles.append(legend_line(f"measured{bars}", color=INK, **_MEASURED))
    handles += [legend_line(label, color=INK, linestyle=style) for label, style in predicted.values()]
    if any_known(rows, "expansion_error"):
        handles.append(Patch(label="expansion error", color=INK, alpha=0.15, linewidth=0))
    panel_legend(panels, handles, columns=3 if panels.figure.get_figwidth() > 6 else 2)
    return panels.figure


def _draw_measured(axes: Axes, rows: pd.DataFrame, color: str, label: str) -> None:
    """Measured barriers, and their standard errors where tables have them."""
    counts, barriers = numbers(rows, "count"), numbers(rows, "measured")
    axes.plot(counts, barriers, color=color, label=label, **_MEASURED)
    if any_known(rows, "measured_se"):
        style: dict[str, Any] = {"fmt": "none", "ecolor": color, "elinewidth": 0.7, "label": f"{label}, error"}
        axes.errorbar(counts, barriers, yerr=numbers(rows, "measured_se"), **style)


def _draw_band(axes: Axes, rows: pd.DataFrame, color: str, label: str) -> None:
    """How far anchored predictions may be off, apart from sampling."""
    middle, error = numbers(rows, "predicted_anchored"), np.nan_to_num(numbers(rows, "expansion_error"))
    style: dict[str, Any] = {"color": color, "alpha": 0.15, "linewidth": 0, "label": label}
    axes.fill_between(numbers(rows, "count"), middle - error, middle + error, **style)
