"""Panels with a row a layer: horizontal bars, and the names beside them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba

from lmc_curvature.plotting.axes import plain_ticks
from lmc_curvature.plotting.style import GREY, INK, Color
from lmc_curvature.plotting.text import short_name

# Above this many rows a page is full, and only every second, third, … name is written.
_MOST_ROWS = 60
# Below this many, rows are as thick as if there were as many.
_FEWEST_ROWS = 4
THIN_ERROR: dict[str, Any] = {"ecolor": INK, "elinewidth": 0.7}
BROAD_ERROR: dict[str, Any] = {"ecolor": to_rgba(INK, 0.25), "elinewidth": 3.0}


@dataclass(frozen=True)
class Bars:
    """One horizontal bar a row, with errors of one or two kinds where they are finite.

    Attributes:
        label: Their name in the legend; a leading underscore keeps them out of it.
        values: Lengths, (rows,).
        color: The colour of the bars.
        errors: Errors drawn as thin lines, (rows,), or None; of marks, too.
        broad_errors: Errors drawn as broad pale lines behind these, (rows,), or None.
    """

    label: str
    values: Float[np.ndarray, " rows"]
    color: str | Color
    errors: Float[np.ndarray, " rows"] | None = None
    broad_errors: Float[np.ndarray, " rows"] | None = None


def rows_height(count: int, per_row: float) -> float:
    """Inches that a panel of rows needs, no more than a page."""
    return min(max(count, _FEWEST_ROWS), _MOST_ROWS) * per_row


def name_rows(axes: Axes, names: Sequence[str], longest: int = 30) -> None:
    """Write the names beside the rows, without tick marks; only every n-th where there are too many."""
    step = math.ceil(len(names) / _MOST_ROWS)
    axes.set_yticks(range(0, len(names), step), [short_name(name, longest) for name in names[::step]])
    axes.tick_params(axis="y", length=0)


def draw_rows(
    axes: Axes, names: Sequence[str], bars: Sequence[Bars], *, marks: Bars | None = None, label_rows: bool = True
) -> None:
    """Draw groups of horizontal bars, a row a name, the first name on top.

    Args:
        axes: The panel.
        names: Names of the rows.
        bars: The groups, the first on top within a row.
        marks: Diamonds instead of bars, over the last group.
        label_rows: Write the names beside the rows.
    """
    rows = np.arange(len(names))
    thickness = 0.8 / len(bars)
    for number, group in enumerate(bars):
        middles = rows - 0.4 + thickness * (number + 0.5)
        axes.barh(middles, group.values, height=0.92 * thickness, color=group.color, label=group.label)
        for errors, style in ((group.broad_errors, BROAD_ERROR), (group.errors, THIN_ERROR)):
            if errors is not None and np.isfinite(errors).any():
                axes.errorbar(group.values, middles, xerr=errors, fmt="none", label="_error", **style)
    if marks is not None:
        middles = rows + 0.4 - thickness / 2
        axes.plot(marks.values, middles, "D", color=marks.color, markersize=3, clip_on=False, label=marks.label)
        if marks.errors is not None and np.isfinite(marks.errors).any():
            axes.errorbar(marks.values, middles, xerr=marks.errors, fmt="none", label="_error", **THIN_ERROR)
    axes.axvline(0, color=GREY, linewidth=0.6, label="_zero")
    axes.set_ylim(max(len(names), _FEWEST_ROWS) - 0.4, -0.6)
    name_rows(axes, names if label_rows else [""] * len(names))
    axes.grid(axis="x")
    plain_ticks(axes.xaxis, most=4)
