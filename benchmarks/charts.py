"""Pictures of benchmarks, in the house style."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from timing import Measurement, Spread

from lmc_curvature.figures.style import (
    BLUE,
    COLUMN_WIDTH,
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

_COLORS = (BLUE, VERMILION, GREEN, PURPLE, GREY, INK)
_MARKERS = "osD^vP"


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


@look()
def draw_roads(measurements: Mapping[str, Measurement], ours: Sequence[str], xlabel: str) -> Figure:
    """A horizontal bar a road, on a logarithmic axis, in multiples of a forward pass.

    Args:
        measurements: By name; those without samples are left out.
        ours: Names of this library's roads, which have a colour of their own.
        xlabel: What the axis shows.
    """
    shown = {name: found.in_forwards for name, found in measurements.items() if found.multiples}
    figure = new_figure(TEXT_WIDTH, 0.7 + 0.22 * len(shown))
    axes = figure.subplots()
    for row, (name, spread) in enumerate(shown.items()):
        axes.barh(row, spread.median, height=0.7, color=BLUE if name in ours else GREY)
        axes.plot([spread.low, spread.high], [row, row], color=INK, linewidth=0.8)
        axes.annotate(
            f"{spread.median:.3g}",
            (spread.high, row),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=SMALL,
        )
    axes.set_yticks(range(len(shown)), list(shown))
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.1)
    axes.grid(axis="x", color=PALE, linewidth=0.5)
    axes.set_xlabel(xlabel)
    return figure


@look()
def draw_panels(panels: Sequence[Panel]) -> Figure:
    """Panels side by side, each with its curves on logarithmic axes."""
    figure = new_figure(max(TEXT_WIDTH, COLUMN_WIDTH * len(panels)) if len(panels) > 1 else TEXT_WIDTH, 3.2)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_panel(axes, panel)
    return figure


def _draw_panel(axes: Axes, panel: Panel) -> None:
    for number, line in enumerate(panel.lines):
        medians = np.array([spread.median for spread in line.ys])
        below, above = (np.array([getattr(spread, end) for spread in line.ys]) for end in ("low", "high"))
        axes.errorbar(
            line.xs,
            medians,
            yerr=[medians - below, above - medians],
            color=_COLORS[number % len(_COLORS)],
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=3.5,
            linewidth=1.0,
            elinewidth=0.8,
            label=line.label if line.exponent is None else f"{line.label}: exponent {line.exponent:.2f}",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = sorted({x for line in panel.lines for x in line.xs})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(color=PALE, linewidth=0.5)
    axes.set_xlabel(panel.xlabel)
    axes.set_ylabel(panel.ylabel)
    axes.set_title(panel.title, loc="left")
    axes.legend(loc="best")
