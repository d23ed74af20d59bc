"""Ticks, lines and headings of a panel, and entries of legends."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lmc_curvature.plotting.style import GREY, SMALL
from lmc_curvature.plotting.text import short_number, tick_number


def heading(axes: Axes, title: str, detail: str, *, lift: float = 0) -> None:
    """A title over the left end of a panel, and a line of small print under it.

    Args:
        axes: The panel.
        title: The title.
        detail: The small print.
        lift: Points to leave free between the panel and the small print.
    """
    axes.set_title(title, loc="left", pad=lift + SMALL + 7)
    axes.annotate(detail, (0, 1), (0, lift + 4), "axes fraction", "offset points", fontsize=SMALL, color=GREY)


def plain_ticks(axis: Axis, most: int = 5) -> None:
    """A few round ticks with plain numbers; no factor set apart at the end of the axis."""
    axis.set_major_locator(MaxNLocator(nbins=most, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick_number(value)))


def short_ticks(axis: Axis, digits: int) -> None:
    """Numbers of few digits at the ticks, wherever these are."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value, digits)))


def count_axis(axes: Axes, label: str) -> None:
    """Prepare x for whole numbers: epochs, or numbers of layers."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_xlabel(label)


def zero_line(axes: Axes) -> None:
    """A thin line at zero."""
    axes.axhline(0, color=GREY, linewidth=0.6, zorder=1, label="_zero")


def legend_line(label: str, **style: Any) -> Line2D:
    """An entry of a legend for lines or points."""
    return Line2D([], [], label=label, **style)
