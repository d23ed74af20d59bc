"""How siblings drift apart while they train: the angle between them, their distance, and the plane they settle in."""

from collections.abc import Callable

import numpy as np
import pandas as pd
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lmc_curvature.figures.frames import by_fork, checked, known, numbers
from lmc_curvature.figures.panels import plain_ticks
from lmc_curvature.plotting.grids import EPOCH_LABEL, Color, count_axis, fork_legend
from lmc_curvature.plotting.style import COLUMN_WIDTH, GREY, TEXT_WIDTH, fork_colors, look, new_figure

Values = Float64[np.ndarray, " epochs"]

_LEGEND_HEIGHT = 0.4


@look()
def draw_sibling_angles(geometry: pd.DataFrame) -> Figure:
    """Draw the angle between siblings over training, a line a fork: seen from the origin, and seen from their fork.

    Figure 2 of Singh et al. 2024. At the fork itself siblings are one network, and seen from there have no angle.

    Args:
        geometry: A row a fork and epoch, with the columns `cosine_origin` and `cosine_fork`.

    Raises:
        OptionError: A column is missing, or has no number.
    """
    rows = checked(geometry, "geometry", ["cosine_origin", "cosine_fork"])
    colors = _colors(rows)
    figure = new_figure(TEXT_WIDTH, 2.5 + _LEGEND_HEIGHT)
    panels = figure.subplots(1, 2, sharey=True)
    titles = {"cosine_origin": "seen from the origin", "cosine_fork": "seen from the fork"}
    for axes, (column, title) in zip(panels, titles.items(), strict=True):
        # Independent directions in many dimensions are at right angles.
        axes.axhline(90, color=GREY, linewidth=0.6, zorder=1, label="_right angle")
        _draw_lines(axes, rows, column, colors, _degrees)
        axes.set_title(title, loc="left")
    highest = max(float(np.max(line.get_ydata())) for axes in panels for line in axes.get_lines())
    panels[0].set(ylim=(0, 1.05 * highest), ylabel="angle between siblings (degrees)")
    panels[0].set_yticks(range(0, int(highest) + 1, 30))
    fork_legend(figure, colors)
    return figure


@look()
def draw_solution_planes(geometry: pd.DataFrame) -> Figure:
    """Draw the cosine of the difference between siblings with their difference at the end, a line a fork.

    Figure 13 of Singh et al. 2024. It is 1 once siblings have fixed the plane in which their solutions lie, and at the
    last epoch by definition.

    Args:
        geometry: A row a fork and epoch, with the column `cosine_final`.

    Raises:
        OptionError: A column is missing, or has no number.
    """
    figure, axes = _single_panel(geometry, "cosine_final")
    lowest = min(float(np.min(line.get_ydata())) for line in axes.get_lines())
    axes.set(ylim=(min(0.0, lowest - 0.03), 1.03), ylabel="cosine with the final difference")
    return figure


@look()
def draw_sibling_distances(geometry: pd.DataFrame) -> Figure:
    """Draw the distance between siblings over training, a line a fork: Figure 14 of Singh et al. 2024.

    Args:
        geometry: A row a fork and epoch, with the column `distance`: ‖θ₂ − θ₁‖, in units of the parameters.

    Raises:
        OptionError: A column is missing, or has no number.
    """
    figure, axes = _single_panel(geometry, "distance")
    axes.set(ylabel="distance ‖Δ‖ between siblings")
    axes.set_ylim(bottom=0)
    return figure


def _single_panel(geometry: pd.DataFrame, column: str) -> tuple[Figure, Axes]:
    rows = checked(geometry, "geometry", [column])
    colors = _colors(rows)
    figure = new_figure(1.3 * COLUMN_WIDTH, 2.6 + _LEGEND_HEIGHT)
    axes = figure.add_subplot()
    _draw_lines(axes, rows, column, colors)
    plain_ticks(axes.yaxis)
    fork_legend(figure, colors)
    return figure, axes


def _colors(rows: pd.DataFrame) -> dict[int, Color]:
    forks = list(by_fork(rows))
    return dict(zip(forks, fork_colors(forks).values(), strict=True))


def _draw_lines(
    axes: Axes,
    rows: pd.DataFrame,
    column: str,
    colors: dict[int, Color],
    convert: Callable[[Values], Values] = np.asarray,
) -> None:
    """A line a fork, over the epochs at which the column has a number."""
    for fork, each in by_fork(known(rows, "geometry", column)).items():
        epochs, values = numbers(each, "epoch"), convert(numbers(each, column))
        axes.plot(epochs, values, color=colors[fork], marker="o", markersize=2.5, label=f"_{fork}")
    count_axis(axes, EPOCH_LABEL)


def _degrees(cosines: Values) -> Values:
    return np.degrees(np.arccos(np.clip(cosines, -1.0, 1.0)))
