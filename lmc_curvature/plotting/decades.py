"""Logarithmic axes for barriers, of which some are zero or below."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lmc_curvature.figures.panels import short_number
from lmc_curvature.plotting.style import PALE, SMALL

Values = Float64[np.ndarray, " n"]

# Barriers this many orders of magnitude below the largest are noise, and would take the room of all others.
MOST_DECADES = 5
_MARGIN = 1.6
# Share of the axis that the strip takes.
_STRIP = 0.1


class Decades(NamedTuple):
    """A logarithmic axis from `floor` to `high`, and from `low` to `floor` a strip for what lies below."""

    low: float
    floor: float
    high: float

    @property
    def strip(self) -> float:
        """The middle of the strip."""
        return math.sqrt(self.low * self.floor)

    def above(self, values: Values) -> Values:
        """The values that have a place on the axis, and NaN for the others."""
        return np.where(values >= self.floor, values, np.nan)

    def below(self, values: Values, share: float = 0.5) -> Values:
        """A share of the way up the strip for values that lie below the axis, and NaN for the others."""
        return np.where(values < self.floor, self.low * (self.floor / self.low) ** share, np.nan)


def decades(values: Values) -> Decades:
    """The axis for some values, of which only the finite ones count; without a strip if all have a place on it."""
    values = values[np.isfinite(values)]
    positive = values[values > 0]
    largest = float(positive.max()) if len(positive) else 1.0
    smallest = max(float(positive.min()), largest * 10.0**-MOST_DECADES) if len(positive) else 0.1
    floor, high = smallest / _MARGIN, largest * _MARGIN
    if (values >= floor).all():
        return Decades(floor, floor, high)
    return Decades(floor * (floor / high) ** (_STRIP / (1 - _STRIP)), floor, high)


def decades_axis(axes: Axes, scale: Decades) -> None:
    """Make y logarithmic, with few ticks, and shade the strip, where a position means no value."""
    axes.set(yscale="log", ylim=(scale.low, scale.high))
    few = scale.high / scale.floor < 100
    powers = 10.0 ** np.arange(math.floor(math.log10(scale.floor)), math.ceil(math.log10(scale.high)) + 1)
    ticks = np.outer(powers, [1, 2, 5] if few else [1]).ravel()
    axes.yaxis.set_major_locator(FixedLocator(ticks[(ticks >= scale.floor) & (ticks <= scale.high)].tolist()))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value, 1)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color=PALE, linewidth=0.5)
    if scale.low < scale.floor:
        axes.axhspan(scale.low, scale.floor, color=PALE, linewidth=0, zorder=0)
        place = axes.get_yaxis_transform()
        axes.text(-0.015, scale.strip, "≈ 0", fontsize=SMALL, transform=place, ha="right", va="center")
