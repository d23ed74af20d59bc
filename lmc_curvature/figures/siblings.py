"""Siblings drift apart while they train: the angle between them, their distance, and the plane they settle in."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lmc_curvature.figures.frames import by_fork, checked, known, numbers
from lmc_curvature.figures.panels import EPOCH_LABEL, fork_legend
from lmc_curvature.plotting.axes import plain_ticks, ticks_among
from lmc_curvature.plotting.style import COLUMN_WIDTH, GREY, TEXT_WIDTH, look, new_figure, sequential_colors

# Width and height of the figure of a single panel.
_SINGLE = (1.3 * COLUMN_WIDTH, 3.0)


@look()
def draw_sibling_angles(geometry: pd.DataFrame) -> Figure:
    """Draw the angle between siblings over training, a line a fork: seen from the origin, and seen from their fork.

    Figure 2 of Singh et al. 2024. At the fork itself siblings are one network, and seen from there have no angle.

    Args:
        geometry: A row a fork and epoch, with the columns `cosine_origin` and `cosine_fork`.

    Raises:
        OptionError: A column is missing, or has no number.
    """
    titles = {"cosine_origin": "seen from the origin", "cosine_fork": "seen from the fork"}
    rows = checked(geometry, "geometry", list(titles))
    # Rounding takes cosines of parallel vectors beyond ±1.
    angles = rows.assign(**{column: np.degrees(np.arccos(numbers(rows, column).clip(-1, 1))) for column in titles})
    figure, panels = _draw_lines(angles, list(titles), TEXT_WIDTH, 2.9)
    for axes, title in zip(panels, titles.values(), strict=True):
        # Independent directions in many dimensions are at right angles.
        axes.axhline(90, color=GREY, linewidth=0.6, zorder=1, label="_right angle")
        axes.set_title(title, loc="left")
    highest = max(float(np.max(line.get_ydata())) for axes in panels for line in axes.get_lines())
    panels[0].set(ylim=(0, 1.05 * highest), ylabel="angle between siblings (degrees)")
    panels[0].set_yticks(np.arange(0.0, int(highest) + 1, 30))
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
    figure, (axes,) = _draw_lines(checked(geometry, "geometry", ["cosine_final"]), ["cosine_final"], *_SINGLE)
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
    figure, (axes,) = _draw_lines(checked(geometry, "geometry", ["distance"]), ["distance"], *_SINGLE)
    axes.set(ylim=(0, None), ylabel="distance ‖Δ‖ between siblings")
    return figure


def _draw_lines(rows: pd.DataFrame, columns: list[str], width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A panel a column, and in it a line a fork, over the epochs at which the column has a number."""
    colors = sequential_colors(by_fork(rows))
    figure = new_figure(width, height)
    panels = list(figure.subplots(1, len(columns), sharey=True, squeeze=False).flat)
    for axes, column in zip(panels, columns, strict=True):
        for fork, each in by_fork(known(rows, "geometry", column)).items():
            style = {"color": colors[fork], "marker": "o", "markersize": 2.5}
            axes.plot(numbers(each, "epoch"), numbers(each, column), label=f"_{fork}", **style)
        ticks_among(axes.xaxis, numbers(rows, "epoch"))
        axes.set_xlabel(EPOCH_LABEL)
        plain_ticks(axes.yaxis)
    fork_legend(figure, colors)
    return figure, panels
