"""Several panels in a figure: their places, scales and labels."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec

from lmc_curvature.plotting.style import COLUMN_WIDTH, TEXT_WIDTH, new_figure

_MOST_COLUMNS = 3


def panel_cells(count: int, panel_height: float, *, margin: float) -> tuple[Figure, list[SubplotSpec]]:
    """A figure with room for some panels, row by row.

    Args:
        count: The number of panels.
        panel_height: Inches for each.
        margin: Inches for legends and labels above and below all panels.
    """
    # Four panels are two rows of two, not a row of three and one alone.
    columns = 2 if count == 4 else min(count, _MOST_COLUMNS)
    rows = math.ceil(count / columns)
    width = max(TEXT_WIDTH * columns / _MOST_COLUMNS, COLUMN_WIDTH)
    figure = new_figure(width, panel_height * rows + margin)
    grid = figure.add_gridspec(rows, columns)
    return figure, [grid[divmod(number, columns)] for number in range(count)]


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
