"""Figures with a panel or a colour a fork: which forks, their titles, and their legend."""

import math
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lmc_curvature.barrier.measurement import BarrierMeasurement
from lmc_curvature.barrier.prediction import BarrierPrediction
from lmc_curvature.errors import OptionError
from lmc_curvature.plotting.axes import legend_line
from lmc_curvature.plotting.decades import Decades
from lmc_curvature.plotting.style import GREY, Color

EPOCH_LABEL = "epoch"

Fork = int | str
Pair = tuple[BarrierPrediction, BarrierMeasurement]
Predictions = Mapping[int, BarrierPrediction] | Mapping[str, BarrierPrediction]
Measurements = Mapping[int, BarrierMeasurement] | Mapping[str, BarrierMeasurement]

# Forks in a row of the legend, for each inch of the figure.
_FORKS_PER_INCH = 1.8


def paired_forks(predictions: Predictions, measurements: Measurements) -> dict[Fork, Pair]:
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
    ordered = sorted(predicted, key=lambda fork: fork if isinstance(fork, int) else math.inf)
    return {fork: (predicted[fork], measured[fork]) for fork in ordered}


def _plain(fork: Fork) -> Fork:
    """NumPy's integers, from a table for example, as Python's."""
    return int(fork) if isinstance(fork, Integral) else str(fork)


def fork_title(fork: Fork) -> str:
    """Title of a fork's panel: an epoch is spelt out, any other label stands as it is."""
    return f"fork at epoch {fork}" if isinstance(fork, int) else fork


def strip_entries(scales: Iterable[Decades], most: int, **style: Any) -> list[Line2D]:
    """The entry of a legend that says what hollow points in the grey strip are; none where there is no strip.

    Args:
        scales: The axes, which leave out what is this many orders of magnitude below the largest.
        most: That number.
        **style: Marker and size of the points.
    """
    strips = [scale for scale in scales if scale.low < scale.floor]
    if not strips:
        return []
    cut = any(scale.cut for scale in strips)
    label = "in the grey strip: no barrier (≤ 0)"
    if cut:
        label = f"in the grey strip: no barrier\n(≤ 0, or over 1e{most} times\nbelow the largest)"
    return [legend_line(label, **{**style, "color": GREY, "markerfacecolor": "none", "linestyle": "none"})]


def fork_legend(figure: Figure, colors: Mapping[int, Color]) -> None:
    """The colour of each fork above the panels."""
    handles = [legend_line(str(fork), color=color, marker="o", markersize=3.5) for fork, color in colors.items()]
    columns = min(int(_FORKS_PER_INCH * figure.get_figwidth()), len(handles))
    place: dict[str, Any] = {"loc": "outside upper left", "alignment": "left"}
    figure.legend(handles=handles, title="fork at epoch", ncols=columns, columnspacing=1.0, **place)
