"""Pictures of benchmarks, in the house style."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.support.timing import Measurement, Spread
from lmc_curvature.plotting.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    PALE,
    PURPLE,
    SMALL,
    TEXT_WIDTH,
    VERMILION,
    look,
    new_figure,
)
from lmc_curvature.plotting.text import short_number

_COLORS = (BLUE, VERMILION, GREEN, PURPLE, GREY, INK)
# Not as many as colours, so that pairs come back after thirty.
_MARKERS = "osD^v"
# Within this factor from the smallest to the largest, points have a linear axis.
_NARROW = 2.0


@dataclass(frozen=True)
class Line:
    """One curve of a panel, and where its power law is fitted.

    Attributes:
        label: What the legend calls it.
        xs: Where it was measured.
        ys: What was measured.
        exponent: Of a power law fitted through it, for the legend; None for no fit.
    """

    label: str
    xs: Sequence[float]
    ys: Sequence[Spread]
    exponent: float | None = None


@dataclass(frozen=True)
class Panel:
    """Curves over one quantity, on logarithmic axes."""

    title: str
    xlabel: str
    ylabel: str
    lines: Sequence[Line]


def fitted_exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The p of y ∝ xᵖ, by least squares on the logarithms."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def draw_roads(measurements: Mapping[str, Measurement], ours: Sequence[str], xlabel: str) -> Figure:
    """A point a road with its quartiles, on a logarithmic axis, in multiples of a forward pass.

    Args:
        measurements: By name; those without samples are left out.
        ours: Names of this library's roads, which have a colour of their own.
        xlabel: What the axis shows.
    """
    return draw_points(
        {name: found.in_forwards for name, found in measurements.items() if found.multiples}, ours, xlabel
    )


@look()
def draw_points(shown: Mapping[str, Spread], ours: Sequence[str], xlabel: str) -> Figure:
    """A point for each name with its quartiles; this library's have a colour of their own.

    The axis is logarithmic, but where all lie within a factor of two: then it begins at zero, or small differences
    would look large.
    """
    figure = new_figure(TEXT_WIDTH, 0.8 + 0.2 * len(shown))
    axes = figure.subplots()
    for row, (name, spread) in enumerate(shown.items()):
        color = BLUE if name in ours else GREY
        axes.plot([spread.low, spread.high], [row, row], color=color, linewidth=1.0)
        axes.plot(spread.median, row, "o", color=color, markersize=4)
        text, place = short_number(spread.median, 3), (spread.high, row)
        axes.annotate(text, place, (6, 0), textcoords="offset points", va="center", fontsize=SMALL)
    axes.set_yticks(range(len(shown)), list(shown))
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    if max(spread.high for spread in shown.values()) > _NARROW * min(spread.low for spread in shown.values()):
        axes.set_xscale("log")
        # On the right, for the numbers.
        axes.margins(x=0.15)
        _plain_ticks(axes.xaxis)
    else:
        axes.set_xlim(0, 1.15 * max(spread.high for spread in shown.values()))
    axes.grid(color=PALE, linewidth=0.5)
    axes.set_xlabel(xlabel)
    if 0 < sum(name in ours for name in shown) < len(shown):
        point: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 4}
        handles = [Line2D([], [], color=BLUE, label="this library", **point)]
        handles.append(Line2D([], [], color=GREY, label="others", **point))
        figure.legend(handles=handles, loc="outside upper left", ncols=2)
    return figure


@look()
def draw_panels(panels: Sequence[Panel]) -> Figure:
    """Panels side by side on logarithmic axes, with one legend; a number at a curve's end is its fitted exponent."""
    labels = list(dict.fromkeys(line.label for panel in panels for line in panel.lines))
    figure = new_figure(max(TEXT_WIDTH, 2.6 * len(panels)), 2.6 + 0.15 * math.ceil(len(labels) / 3))
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_panel(axes, panel, labels)
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend([handles[label] for label in labels], labels, loc="outside lower left", ncols=3)
    # How close numbers come is known once all have their places.
    figure.draw_without_rendering()
    for axes in figure.axes:
        _part_numbers(axes)
    return figure


def _part_numbers(axes: Axes) -> None:
    """Move the numbers at the ends of curves up and down, no farther than it takes for none to cover another."""
    numbers = sorted((text for text in axes.texts if isinstance(text, Annotation)), key=lambda text: text.xy[1])
    heights = np.array([axes.transData.transform(number.xy)[1] for number in numbers]) * 72 / axes.figure.dpi
    for number, height, place in zip(numbers, heights, spread_out(heights.tolist(), 1.15 * SMALL), strict=True):
        number.set_position((number.get_position()[0], place - height))


def spread_out(heights: Sequence[float], gap: float) -> list[float]:
    """Heights in increasing order, at least a gap apart, where those too close stay centred on where they were."""
    groups: list[tuple[float, int]] = []
    for height in heights:
        groups.append((height, 1))
        # Two groups that overlap are one, around the mean of all that is in it.
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (groups[-1][1] + groups[-2][1]) / 2:
            (below, lower), (above, upper) = groups[-2:]
            groups[-2:] = [((below * lower + above * upper) / (lower + upper), lower + upper)]
    return [middle + gap * (number - (count - 1) / 2) for middle, count in groups for number in range(count)]


def _draw_panel(axes: Axes, panel: Panel, labels: Sequence[str]) -> None:
    for line in panel.lines:
        number = labels.index(line.label)
        color = _COLORS[number % len(_COLORS)]
        medians = np.array([spread.median for spread in line.ys])
        below, above = (np.array([getattr(spread, end) for spread in line.ys]) for end in ("low", "high"))
        axes.errorbar(
            line.xs,
            medians,
            yerr=[medians - below, above - medians],
            color=color,
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=3.5,
            linewidth=1.0,
            elinewidth=0.8,
            label=line.label,
        )
        if line.exponent is not None:
            end: Any = (line.xs[-1], medians[-1])
            place: Any = {"textcoords": "offset points", "va": "center"}
            axes.annotate(f"{line.exponent:.2f}", end, (5, 0), fontsize=SMALL, color=color, **place)
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = sorted({x for line in panel.lines for x in line.xs})
    axes.set_xticks(ticks, [_short(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    _plain_ticks(axes.yaxis)
    axes.margins(x=0.15)
    axes.grid(color=PALE, linewidth=0.5)
    axes.set_xlabel(panel.xlabel)
    axes.set_ylabel(panel.ylabel)
    axes.set_title(panel.title, loc="left")


def _short(value: float) -> str:
    """A tick's number: 330, 1.1k, 10k."""
    return f"{value:g}" if value < 1000 else f"{value / 1000:.2g}k"


def _plain_ticks(axis: Axis) -> None:
    """Ticks at 1, 2 and 5 of each decade, or at its start alone where there are many decades, as plain numbers."""
    low, high = axis.get_view_interval()
    subs = (1.0, 2.0, 5.0) if high < 200 * max(low, 1e-12) else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
