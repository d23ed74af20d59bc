"""Scales for heights in three dimensions, where matplotlib has linear ones alone."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator
from mpl_toolkits.mplot3d import Axes3D

from lmc_curvature.plotting.text import tick_numbers

_MOST_TICKS = 5
_MULTIPLES = (1.0, 2.0, 5.0)


@dataclass(frozen=True)
class Heights:
    """A scale of heights: places on a linear axis for values, the ends of the axis, and ticks.

    Attributes:
        low: The value at the lower end.
        high: The value at the upper end.
        kind: Linear, logarithmic, or logarithmic on either side of zero.
        linear: For the last, how far from zero it is about linear.
    """

    low: float
    high: float
    kind: Literal["linear", "log", "symlog"] = "linear"
    linear: float = 1.0

    @property
    def base(self) -> float:
        """The place that curves stand on: zero, or of a logarithmic scale the lower end."""
        return float(self.places(np.array(self.low))) if self.kind == "log" else 0.0

    @property
    def name(self) -> str:
        """What to add to the label of the axis."""
        return "" if self.kind == "linear" else f" ({self.kind} scale)"

    def places(self, values: np.ndarray) -> np.ndarray:
        """Places of values on the axis."""
        if self.kind == "log":
            return np.asarray(np.log10(values))
        return np.asarray(np.arcsinh(values / self.linear)) if self.kind == "symlog" else values

    def ticks(self) -> list[float]:
        """Round values within the ends, few enough for their numbers to be apart."""
        if self.kind == "linear":
            values = np.asarray(MaxNLocator(nbins=4).tick_values(self.low, self.high)).tolist()
            return [value for value in values if self.low <= value <= self.high]
        smallest = self.low if self.kind == "log" else self.linear
        largest = max(abs(self.low), self.high)
        decades = 10.0 ** np.arange(math.floor(math.log10(smallest)), math.ceil(math.log10(largest)) + 1)
        wide = self.kind == "log" and largest > 100 * smallest
        round_values = np.outer(decades, [1.0] if wide else _MULTIPLES).ravel()
        if self.kind == "log":
            return self._apart(round_values[(round_values >= self.low) & (round_values <= self.high)])
        above = self._apart(np.array([0.0, *round_values[round_values <= self.high]]))
        below = self._apart(np.array([0.0, *-round_values[round_values <= -self.low]]))
        return [*below[:0:-1], *above]

    def _apart(self, values: np.ndarray) -> list[float]:
        """The first of some values, and of the others those that are far enough from the one before."""
        least = float(np.ptp(self.places(np.array([self.low, self.high])))) / _MOST_TICKS
        kept = values[:1].tolist()
        for value in values[1:].tolist():
            if abs(float(self.places(np.array(value)) - self.places(np.array(kept[-1])))) >= least:
                kept.append(value)
        return kept

    def dress(self, axes: Axes3D) -> list[str]:
        """Set ends and ticks of an axis of heights, and return the numbers at the ticks."""
        ends, ticks = self.places(np.array([self.low, self.high])), self.ticks()
        numbers = tick_numbers(ticks)
        axes.set_zlim(*ends)
        axes.zaxis.set_major_locator(FixedLocator(self.places(np.array(ticks)).tolist()))
        axes.zaxis.set_major_formatter(FixedFormatter(numbers))
        return numbers
