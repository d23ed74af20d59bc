"""Several panels in a figure: their places, scales, labels and legend."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec

from lmc_curvature.plotting.style import COLUMN_WIDTH, TEXT_WIDTH, new_figure

_MOST_COLUMNS = 3


class Panels(NamedTuple):
    """A figure with room for panels, row by row, and for a legend in what the last row leaves."""

    figure: Figure
    cells: list[SubplotSpec]
    spare: SubplotSpec | None


def panel_cells(count: int, panel_height: float, *, margin: float, legend: float = 0.0) -> Panels:
    """A figure with room for some panels, row by row.

    Args:
        count: The number of panels.
        panel_height: Inches for each.
        margin: Inches for labels above and below all panels.
        legend: Inches for a legend above them, where the last row leaves no room for it.
    """
    # Four panels are two rows of two, not a row of three and one alone.
    columns = 2 if count == 4 else min(count, _MOST_COLUMNS)
    rows = math.ceil(count / columns)
    width = max(TEXT_WIDTH * columns / _MOST_COLUMNS, COLUMN_WIDTH)
    is_full = count == rows * columns
    figure = new_figure(width, panel_height * rows + margin + (legend if is_full else 0.0))
    grid = figure.add_gridspec(rows, columns)
    cells = [grid[divmod(number, columns)] for number in range(count)]
    return Panels(figure, cells, None if is_full else grid[rows - 1, count - (rows - 1) * columns :])


def panel_legend(panels: Panels, handles: Sequence[Any], *, columns: int, **options: Any) -> None:
    """A legend of all panels: in the last row where that has room, so that no place is empty, and else above them."""
    if panels.spare is None:
        panels.figure.legend(handles=handles, loc="outside upper left", ncols=columns, **options)
    else:
        panels.figure.add_subfigure(panels.spare).legend(handles=handles, loc="center", **options)


def share_scale(panels: Sequence[Axes]) -> None:
    """Give the panels one scale for y, unless the widest range is over ten times the narrowest."""
    lows, highs = np.transpose([axes.get_ylim() for axes in panels])
    if np.max(highs - lows) <= 10 * np.min(highs - lows):
        for axes in panels:
            axes.set_ylim(lows.min(), highs.max())


def label_panels(figure: Figure, x: str, y: str = "") -> None:
    """One label for x, and one for y, of all panels."""
    figure.supxlabel(x, fontsize="medium")
    if y:
        figure.supylabel(y, fontsize="medium")
