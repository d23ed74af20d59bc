"""Logarithmic axes for values of which some are zero or below."""

import math
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from lmc_curvature.plotting.axes import plain_numbers
from lmc_curvature.plotting.style import PALE, SMALL
from lmc_curvature.plotting.text import has_exponents

Values = Float64[np.ndarray, "..."]

# The factor by which an axis reaches beyond the values.
_MARGIN = 1.6


class Decades(NamedTuple):
    """A logarithmic axis from `floor` to `high`, and from `low` to `floor` a strip for what lies below.

    Attributes:
        low: The lower end of the strip; equal to `floor` where nothing lies below.
        floor: The lower end of the axis proper.
        high: Its upper end.
        cut: True if positive values lie below `floor`.
    """

    low: float
    floor: float
    high: float
    cut: bool

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


def decades(values: Values, *, most: int = 5, strip: float = 0.1) -> Decades:
    """The axis for some values, of which only the finite ones count; without a strip if all have a place on it.

    Args:
        values: All that is to be drawn.
        most: Values this many orders of magnitude below the largest are noise, and would take the room of all others.
        strip: The share of the axis that the strip takes.
    """
    values = values[np.isfinite(values)]
    positive = values[values > 0]
    largest = float(positive.max()) if len(positive) else 1.0
    smallest = max(float(positive.min()), largest * 10.0**-most) if len(positive) else 0.1
    floor, high = smallest / _MARGIN, largest * _MARGIN
    low = floor if (values >= floor).all() else floor * (floor / high) ** (strip / (1 - strip))
    return Decades(low, floor, high, cut=bool((positive < floor).any()))


def decades_axis(
    axes: Axes,
    scale: Decades,
    name: Literal["x", "y"] = "y",
    *,
    below: str = "≈ 0",
    gap: float = 0.015,
    clear: float = 0.0,
    powers: bool = False,
) -> None:
    """Make an axis logarithmic, with few ticks, and shade the strip, where a position means no value.

    Args:
        axes: The panel.
        scale: The range of the axis.
        name: The axis, `"x"` or `"y"`.
        below: The text beside the strip.
        gap: The distance of that text from the panel, as a share of it.
        clear: The share of the axis above the strip that has no ticks, whose numbers would meet the text.
        powers: Write ticks that are powers of ten as such, 10⁻³, also where all are plain numbers.
    """
    axis = axes.yaxis if name == "y" else axes.xaxis
    axes.set(**{f"{name}scale": "log", f"{name}lim": (scale.low, scale.high)})
    extent = scale.high / scale.floor
    few = extent < 100
    first, last = math.floor(math.log10(scale.floor)), math.ceil(math.log10(scale.high))
    decade = 10.0 ** np.arange(first, last + 1, 1 + (last - first) // 9)
    ticks = np.outer(decade, [1, 2, 5] if few else [1]).ravel()
    lowest = scale.floor * extent**clear if scale.low < scale.floor else scale.floor
    ticks = ticks[(ticks >= lowest) & (ticks <= scale.high)].tolist()
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    if few or not (powers or has_exponents(ticks)):
        plain_numbers(axis)
    if scale.low < scale.floor and name == "y":
        axes.axhspan(scale.low, scale.floor, color=PALE, linewidth=0, zorder=0)
        place = axes.get_yaxis_transform()
        axes.text(-gap, scale.strip, below, fontsize=SMALL, transform=place, ha="right", va="center")
    elif scale.low < scale.floor:
        axes.axvspan(scale.low, scale.floor, color=PALE, linewidth=0, zorder=0)
        place = axes.get_xaxis_transform()
        axes.text(scale.strip, -gap, below, fontsize=SMALL, transform=place, ha="center", va="top")
