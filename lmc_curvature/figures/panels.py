"""The panels that figures are made of: barrier curves and horizontal bars of layers."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lmc_curvature.barrier.measurement import BarrierMeasurement
from lmc_curvature.barrier.prediction import BarrierPrediction
from lmc_curvature.errors import OptionError
from lmc_curvature.plotting.style import GREY, INK, PALE, SMALL

ALPHAS = np.linspace(0.0, 1.0, 201)
ALPHA_LABEL = "position α on the segment"
BARRIER_LABEL = "barrier (units of the loss)"

Fork = int | str
Predictions = Mapping[int, BarrierPrediction] | Mapping[str, BarrierPrediction]
Measurements = Mapping[int, BarrierMeasurement] | Mapping[str, BarrierMeasurement]

# Above this many rows a page is full, and only every second, third, … name is written.
_MAX_ROWS = 60
# Below this many, rows are as thick as if there were as many.
_FEWEST_ROWS = 4
_LONGEST_NAME = 30


@dataclass(frozen=True)
class Bars:
    """One horizontal bar a layer, with standard errors where they are finite.

    Attributes:
        label: What the legend calls them; a leading underscore keeps them out of it.
        values: Lengths, (layers,).
        color: Of the bars.
        errors: Standard errors, (layers,), or None.
    """

    label: str
    values: Float[np.ndarray, " layers"]
    color: str
    errors: Float[np.ndarray, " layers"] | None = None


def paired_forks(
    predictions: Predictions, measurements: Measurements
) -> dict[Fork, tuple[BarrierPrediction, BarrierMeasurement]]:
    """Prediction and measurement of each fork: epochs in increasing order, other labels in the order given.

    Raises:
        OptionError: There is no fork, or one is predicted but not measured, or the other way round.
    """
    predicted = {_plain(fork): prediction for fork, prediction in predictions.items()}
    measured = {_plain(fork): measurement for fork, measurement in measurements.items()}
    if not predicted or predicted.keys() != measured.keys():
        raise OptionError(
            f"The forks predicted are {list(predicted)}, those measured {list(measured)}; expected the same forks in "
            "both, and at least one."
        )
    epochs = sorted(fork for fork in predicted if isinstance(fork, int))
    labels = [fork for fork in predicted if isinstance(fork, str)]
    return {fork: (predicted[fork], measured[fork]) for fork in (*epochs, *labels)}


def _plain(fork: Fork) -> Fork:
    """NumPy's integers, from a table for example, as Python's."""
    return int(fork) if isinstance(fork, Integral) else str(fork)


def fork_title(fork: Fork) -> str:
    """Title of a fork's panel: an epoch is spelt out, any other label stands as it is."""
    return f"fork at epoch {fork}" if isinstance(fork, int) else fork


def alone_title(sets: Iterable[Sequence[str]]) -> str:
    """Title of a panel about sets of layers, which are often single layers."""
    return "each layer alone" if all(len(members) == 1 for members in sets) else "each set of layers alone"


def short_number(value: float, digits: int = 2) -> str:
    """A number with few digits: 0.0029, 5.4e−5, 120."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "–"
    if 1e-3 <= abs(value) < 1e4:
        decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
        text = f"{value:.{decimals}f}"
        return text.replace("-", "−")
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "−")


def number_with_error(value: float, error: float) -> str:
    """A number and its standard error, where that is known: 0.0027 ± 0.0007, (9.6 ± 0.7)e−4."""
    if not (math.isfinite(error) and error > 0 and value != 0):
        return short_number(value)
    power = math.floor(math.log10(max(abs(value), error)))
    shown = power if not 1e-3 <= abs(value) < 1e4 else 0
    decimals = max(shown - math.floor(math.log10(error)), 0)
    both = f"{value / 10.0**shown:.{decimals}f} ± {error / 10.0**shown:.{decimals}f}"
    return (f"({both})e{shown}" if shown else both).replace("-", "−")


def heading(axes: Axes, title: str, detail: str, *, lift: float = 0) -> None:
    """A title over the left end of a panel, and a line of small print under it.

    Args:
        axes: The panel.
        title: The title.
        detail: The small print.
        lift: Points to leave free between the panel and the small print.
    """
    axes.set_title(title, loc="left", pad=lift + SMALL + 7)
    place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(detail, (0, 1), (0, lift + 4), fontsize=SMALL, color=GREY, **place)


def plain_ticks(axis: Axis, most: int = 5) -> None:
    """A few round ticks with plain numbers; no factor set apart at the end of the axis."""
    axis.set_major_locator(MaxNLocator(nbins=most, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _tick_text(value)))


def alpha_axis(axes: Axes) -> None:
    """Prepare a panel for curves over the segment: α from 0 to 1, and plain numbers."""
    # A little room, so that points at the ends are whole.
    axes.set_xlim(-0.02, 1.02)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    plain_ticks(axes.yaxis)


def zero_line(axes: Axes) -> None:
    """A thin line at zero, where the curve meets the chord."""
    axes.axhline(0, color=GREY, linewidth=0.6, zorder=1, label="_zero")


def rows_height(count: int, per_row: float) -> float:
    """Inches that a panel with a row a layer needs, no more than a page."""
    return min(max(count, _FEWEST_ROWS), _MAX_ROWS) * per_row


def layer_rows(
    axes: Axes, names: Sequence[str], bars: Sequence[Bars], *, marks: Bars | None = None, label_rows: bool = True
) -> None:
    """Draw groups of horizontal bars, a row a layer, the first layer on top.

    Args:
        axes: Where.
        names: Of the layers, in the order of the network.
        bars: The groups, the first on top within a row.
        marks: Diamonds instead of bars, over the last group.
        label_rows: Write the names beside the rows; only every n-th where there are too many.
    """
    rows = np.arange(len(names))
    thickness = 0.8 / len(bars)
    for number, group in enumerate(bars):
        offsets = rows - 0.4 + thickness * (number + 0.5)
        axes.barh(offsets, group.values, height=0.92 * thickness, color=group.color, label=group.label)
        if group.errors is not None and np.isfinite(group.errors).any():
            axes.errorbar(
                group.values,
                offsets,
                xerr=group.errors,
                fmt="none",
                ecolor=INK,
                elinewidth=0.7,
                label="_standard error",
            )
    if marks is not None:
        middles = rows + 0.4 - thickness / 2
        axes.plot(marks.values, middles, "D", color=marks.color, markersize=3, clip_on=False, label=marks.label)
    axes.axvline(0, color=GREY, linewidth=0.6, label="_zero")
    axes.set_ylim(max(len(names), _FEWEST_ROWS) - 0.4, -0.6)
    step = math.ceil(len(names) / _MAX_ROWS)
    axes.set_yticks(rows[::step], [_shorten(name) for name in names[::step]] if label_rows else [])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=PALE, linewidth=0.5)
    plain_ticks(axes.xaxis, most=4)


def _tick_text(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.6g}".replace("-", "−")
    mantissa, exponent = f"{value:.4e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}".replace("-", "−")


def _shorten(name: str) -> str:
    """The end of a long name, which tells layers apart."""
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"
