"""What figures with a panel or a colour a fork share: how panels lie, their scales, axes of epochs, and legends."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lmc_curvature.plotting.style import COLUMN_WIDTH, TEXT_WIDTH, new_figure

Color = tuple[float, float, float, float]
EPOCH_LABEL = "epoch"

_MOST_COLUMNS = 3
# Forks in a row of the legend, for each inch of the figure.
_FORKS_PER_INCH = 1.8


def fork_cells(count: int, panel_height: float, *, margin: float) -> tuple[Figure, list[SubplotSpec]]:
    """A figure with room for a panel a fork, row by row.

    Args:
        count: How many forks.
        panel_height: Of each, in inches.
        margin: Inches for what stands above and below all panels.
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


def count_axis(axes: Axes, label: str) -> None:
    """Prepare x for whole numbers: epochs, or numbers of layers."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_xlabel(label)


def fork_legend(figure: Figure, colors: Mapping[int, Color], others: Sequence[Line2D] = ()) -> None:
    """The colour of each fork above the panels; below them, what else there is to tell."""
    style: dict[str, Any] = {"marker": "o", "markersize": 3.5, "linewidth": 1.4}
    handles = [Line2D([], [], color=color, label=str(fork), **style) for fork, color in colors.items()]
    columns = int(_FORKS_PER_INCH * figure.get_figwidth())
    figure.legend(
        handles=handles,
        title="fork at epoch",
        loc="outside upper left",
        ncols=min(columns, len(handles)),
        alignment="left",
        columnspacing=1.0,
    )
    if others:
        figure.legend(handles=list(others), loc="outside lower left", ncols=2 if figure.get_figwidth() > 4 else 1)
