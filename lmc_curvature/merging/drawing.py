"""The picture of a merge: where its layers are between the two networks, and how far the loss rises."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from lmc_curvature.plotting.axes import heading, plain_ticks, zero_line
from lmc_curvature.plotting.rows import BROAD_ERROR, THIN_ERROR
from lmc_curvature.plotting.style import BLUE, GREY, INK, TEXT_WIDTH, VERMILION, look, new_figure
from lmc_curvature.plotting.text import short_name

# More names than this do not fit below the layers.
_MOST_NAMES = 24


@dataclass(frozen=True)
class Rise:
    """A rise of the loss, with its sampling error and, if it is predicted, its expansion error."""

    name: str
    value: float
    standard_error: float
    expansion_error: float = math.nan


@look()
def draw_merge(alphas: Mapping[str, float], rises: Sequence[Rise], *, budget: float | None = None) -> Figure:
    """Draw a merge: the position of every layer between the two networks, and rises of the loss with their errors.

    Args:
        alphas: Layer to its position, in the order of the network: 0 is `model_a`, 1 is `model_b`.
        rises: Predicted and measured rises. Thin lines are standard errors, broad pale ones expansion errors.
        budget: The largest rise, if there is one.
    """
    figure = new_figure(TEXT_WIDTH, 2.4)
    layers, bars = figure.subplots(1, 2, width_ratios=[2.2, 1])
    places = np.arange(len(alphas))
    positions = np.array(list(alphas.values()))
    layers.vlines(places, 0, positions, color=BLUE, linewidth=1, label="_from model_a")
    layers.plot(places, positions, "o", color=BLUE, markersize=3, clip_on=False, label="layers")
    layers.set(ylim=(0, 1), yticks=[0, 0.5, 1], xlim=(-0.6, len(alphas) - 0.4))
    layers.set_yticklabels(["model_a", "½", "model_b"])
    step = math.ceil(len(alphas) / _MOST_NAMES)
    names = [short_name(name, 18) for name in alphas]
    layers.set_xticks(places[::step], names[::step], rotation=60, ha="right", rotation_mode="anchor")
    layers.grid(axis="y")
    heading(layers, "where each layer is", "between the two networks")
    zero_line(bars)
    for number, rise in enumerate(rises):
        for error, style in ((rise.expansion_error, BROAD_ERROR), (rise.standard_error, THIN_ERROR)):
            if math.isfinite(error):
                bars.errorbar([number], [rise.value], yerr=[error], fmt="none", label="_error", **style)
        color = VERMILION if number == 0 else INK
        bars.plot([number], [rise.value], "o", color=color, markersize=4, label=rise.name)
    if budget is not None:
        bars.axhline(budget, color=GREY, linestyle="--", linewidth=1, label="budget")
        bars.text(0.98, budget, "budget", color=GREY, transform=bars.get_yaxis_transform(), ha="right", va="bottom")
    bars.set_xticks(range(len(rises)), [rise.name for rise in rises], rotation=20, ha="right", rotation_mode="anchor")
    bars.set(xlim=(-0.6, len(rises) - 0.4))
    plain_ticks(bars.yaxis)
    heading(bars, "rise of the loss", "lines: standard errors; pale: expansion")
    return figure
