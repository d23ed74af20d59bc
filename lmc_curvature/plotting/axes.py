"""Ticks, lines and headings of a panel, and entries of legends."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, Formatter, MaxNLocator

from lmc_curvature.plotting.style import GREY, SMALL
from lmc_curvature.plotting.text import tick_numbers


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
    plain_numbers(axis)


class OneNotation(Formatter):
    """Plain numbers at the ticks of an axis, all with exponents or none."""

    def __call__(self, x: float, pos: int | None = None) -> str:  # noqa: D102
        return tick_numbers([x])[0]

    def format_ticks(self, values: Sequence[float] | np.ndarray) -> list[str]:  # noqa: D102
        return tick_numbers(list(values))


def plain_numbers(axis: Axis) -> None:
    """Plain numbers at the ticks, wherever these are, in one notation."""
    axis.set_major_formatter(OneNotation())


def count_axis(axes: Axes, label: str) -> None:
    """Prepare x for whole numbers, such as numbers of layers."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_xlabel(label)


def ticks_among(axis: Axis, places: Sequence[float] | np.ndarray, most: int = 6) -> None:
    """Ticks at some of the places where something is known, the last among them, and at no other."""
    axis.set_major_locator(FixedLocator(thinned(places, most)))
    plain_numbers(axis)


def thinned(places: Sequence[float] | np.ndarray, most: int) -> list[float]:
    """The last of some numbers, and of the others those that are far enough from the next."""
    ordered = np.unique(places)[::-1].tolist()
    least = (ordered[0] - ordered[-1]) / most
    kept = ordered[:1]
    for place in ordered[1:]:
        if kept[-1] - place >= least:
            kept.append(place)
    return kept[::-1]


def zero_line(axes: Axes) -> None:
    """A thin line at zero."""
    axes.axhline(0, color=GREY, linewidth=0.6, zorder=1, label="_zero")


def legend_line(label: str, **style: Any) -> Line2D:
    """An entry of a legend for lines or points."""
    return Line2D([], [], label=label, **style)
