"""The ridge between siblings while they train: barrier curves, one behind the other."""

from collections.abc import Mapping
from itertools import repeat
from typing import Any, Literal, get_args

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from mpl_toolkits.mplot3d import Axes3D
from mpl_toolkits.mplot3d.art3d import Poly3DCollection

from lmc_curvature.errors import check_choice
from lmc_curvature.figures.frames import by_fork, checked, having, known, numbers
from lmc_curvature.figures.panels import EPOCH_LABEL, fork_title
from lmc_curvature.plotting.axes import heading
from lmc_curvature.plotting.grids import panel_cells
from lmc_curvature.plotting.style import GREY, SMALL, TEXT_WIDTH, look
from lmc_curvature.plotting.text import short_number

Quantity = Literal["value", "barrier"]

# More curves than this hide each other.
_MOST_CURVES = 24
_WHITENED = 0.6
# Panels of values have one scale while the highest is at most this many times as high as the lowest.
_ALIKE = 3.0
# How far a panel of barriers reaches below the chord, as a share of the way above it.
_VALLEY = 1 / 3


@look()
def draw_ridges(
    curves: pd.DataFrame, *, metric: str = "error", quantity: Quantity = "value", split: str = "train"
) -> Figure:
    """Draw the metric along the segment between siblings in three dimensions, a curve an epoch and a panel a fork.

    Figures 1 and 8 to 12 of Singh et al. 2024. All panels have the same epochs and the same colours, from the first
    epoch in dark to the last in light. Of many epochs, 24 evenly chosen ones are drawn, the first and the last among
    them.

    Values fall while networks learn, so the last epoch stands in front. Panels of values have one scale unless one is
    over three times as high as another. Barriers rise, so the first epoch stands in front. As later forks have barriers
    orders of magnitude lower, each panel has a scale of its own, and a grey sheet at zero, where the chord is. Below
    the chord it reaches a third as far as above, so that valleys do not flatten the ridge: deeper curves are cut at the
    floor, and the small print says how deep they are.

    Args:
        curves: A row a fork, epoch, split, metric and α, with the columns `alpha`, `value` and `barrier`.
        metric: The metric, `"loss"` or `"error"`.
        quantity: `"value"` for the metric itself, `"barrier"` for how far it lies above the chord.
        split: The data, `"train"` or `"test"`.

    Raises:
        OptionError: A column is missing, no row has this split and metric, or `quantity` is unknown.
    """
    check_choice("quantity", quantity, get_args(Quantity))
    rows = known(checked(curves, "curves", ["alpha", quantity], split=split, metric=metric), "curves", quantity)
    forks = by_fork(rows)
    first, last = numbers(rows, "epoch").min(), numbers(rows, "epoch").max()
    epochs = (first, last + (first == last))
    in_depth = epochs if quantity == "barrier" else epochs[::-1]
    limits = _panel_limits({fork: numbers(each, quantity) for fork, each in forks.items()}, quantity)
    figure, cells = panel_cells(len(forks), 2.25, margin=0.4)
    for (fork, each), cell in zip(forks.items(), cells, strict=True):
        axes = figure.add_subplot(cell, projection="3d")
        axes.set(xlim=(0, 1), ylim=in_depth, zlim=limits[fork])
        _dress(axes, metric if quantity == "value" else "barrier")
        # The upper left corner of the panel is empty.
        heading(axes, fork_title(fork), _detail(each, quantity), lift=-10.0)
        # It is wider than the box of the axes, for which the layout would make the panel small.
        axes.texts[0].set_in_layout(False)
        if quantity == "barrier":
            _draw_chord(axes)
        _draw_curves(axes, each, quantity, Normalize(*epochs))
    named = "error, a share of examples" if metric == "error" else metric
    what = named if quantity == "value" else f"barrier of the {named}"
    space = " " if figure.get_figwidth() >= TEXT_WIDTH else "\n"
    title = f"{split} {what},{space}between siblings at α of their segment"
    if len(set(limits.values())) > 1:
        title += f";{space}each panel has its own scale"
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium")
    # The layout does not see how far the labels of the heights reach.
    figure.set_layout_engine("constrained", rect=(0, 0, 1 - 0.2 / figure.get_figwidth(), 1))
    return figure


def _panel_limits(heights: Mapping[int, np.ndarray], quantity: Quantity) -> dict[int, tuple[float, float]]:
    """Fork to the ends of its axis of heights: one scale for values that are alike, otherwise a scale each."""
    limits = {fork: _limits(each, quantity) for fork, each in heights.items()}
    tops = [top for _, top in limits.values()]
    if quantity == "barrier" or max(tops) > _ALIKE * min(tops):
        return limits
    return dict.fromkeys(heights, _limits(np.hstack([*heights.values()]), quantity))


def _limits(heights: np.ndarray, quantity: Quantity) -> tuple[float, float]:
    """From the lowest to the highest, zero among them; of a valley of barriers beside a ridge, a part."""
    low, top = _without_noise(min(heights.min(), 0.0)), _without_noise(max(heights.max(), 0.0))
    if quantity == "barrier" and heights.max() > 1e-12:
        low = max(low, -_VALLEY * top)
    return low, top if top > low else low + 1


def _detail(rows: pd.DataFrame, quantity: Quantity) -> str:
    """The highest point at the last epoch, and how deep a valley is of which the panel shows a part."""
    last = numbers(rows, "epoch").max()
    highest = _without_noise(numbers(having(rows, "epoch", last), quantity).max())
    lowest = _without_noise(numbers(rows, quantity).min())
    detail = f"highest at epoch {last:.0f}: {short_number(highest)}"
    cut = lowest < _limits(numbers(rows, quantity), quantity)[0]
    return f"{detail}; lowest: {short_number(lowest)}" if cut else detail


def _without_noise(value: float) -> float:
    """A barrier is a difference: where it is zero, its last digits are not."""
    return round(float(value), 12)


def shown_epochs(epochs: np.ndarray) -> np.ndarray:
    """The epochs whose curves are drawn, in increasing order."""
    epochs = np.unique(epochs)
    return epochs[np.unique(np.linspace(0, len(epochs) - 1, min(len(epochs), _MOST_CURVES)).round().astype(int))]


def _draw_chord(axes: Axes3D) -> None:
    """A sheet at zero, behind all curves."""
    (near, far), ends = axes.get_xlim(), axes.get_ylim()
    corners = [(near, ends[0], 0.0), (far, ends[0], 0.0), (far, ends[1], 0.0), (near, ends[1], 0.0)]
    style: dict[str, Any] = {"facecolors": [(*to_rgb(GREY), 0.12)], "edgecolors": [GREY], "linewidths": 0.4}
    axes.add_collection3d(Poly3DCollection([corners], zorder=5, label="_chord", **style))


def _draw_curves(axes: Axes3D, rows: pd.DataFrame, quantity: Quantity, shade: Normalize) -> None:
    """The curves from the back to the front, each with a face between it and zero that covers those behind it."""
    epochs = shown_epochs(numbers(rows, "epoch"))
    from_back = epochs if axes.yaxis_inverted() else epochs[::-1]
    floor = axes.get_zlim()[0]
    for depth, epoch in enumerate(from_back):
        curve = having(rows, "epoch", epoch, by="alpha")
        alphas, values = numbers(curve, "alpha"), numbers(curve, quantity)
        if values.min() < floor:
            # Finely, or it would end at the last point that is above the floor.
            fine = np.linspace(alphas[0], alphas[-1], 301)
            alphas, values = fine, np.interp(fine, alphas, values)
        color = mpl.colormaps["viridis"](0.9 * float(shade(epoch)))
        pale = tuple(_WHITENED + (1 - _WHITENED) * part for part in to_rgb(color))
        corners = [alphas[0], *alphas, alphas[-1]], repeat(epoch), [0.0, *np.maximum(values, floor), 0.0]
        style: dict[str, Any] = {"facecolors": [(*pale, 0.8)], "edgecolors": "none", "zorder": 10 + 2 * depth}
        axes.add_collection3d(Poly3DCollection([[*zip(*corners, strict=False)]], **style))
        shown = np.where(values >= floor, values, np.nan)
        axes.plot(alphas, np.full_like(alphas, epoch), shown, color=color, linewidth=1, zorder=11 + 2 * depth)


def _dress(axes: Axes3D, height_label: str) -> None:
    """View, ticks and labels."""
    # What lies in front is known here; matplotlib would guess it from the middle of each curve.
    axes.computed_zorder = False
    # The labels of the panel on the left reach into this one.
    axes.patch.set_visible(False)
    axes.view_init(elev=26, azim=-62)
    # matplotlib takes any number, and says that it takes whole ones.
    zoom: Any = 0.92
    axes.set_box_aspect((1, 1.1, 0.75), zoom=zoom)
    axes.set_xlabel("α", labelpad=-9)
    axes.set_ylabel(EPOCH_LABEL, labelpad=-6)
    axes.set_xticks([0, 0.5, 1], ["0", "½", "1"])
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.tick_params(labelsize=SMALL - 0.5)
    axes.tick_params("x", pad=-4)
    axes.tick_params("y", pad=-1)
    # Numbers are centred on a line, which lies as far out as the longest of them asks for.
    locator = MaxNLocator(nbins=4)
    axes.zaxis.set_major_locator(locator)
    axes.zaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}".replace("-", "−")))
    longest = max(len(f"{value:.6g}") for value in locator.tick_values(*axes.get_zlim()))
    axes.zaxis.set_tick_params(pad=max(longest - 5, -1))
    # Or a long word stands upright, and a short one lies.
    axes.zaxis.set_rotate_label(False)
    axes.set_zlabel(height_label, labelpad=max(2.5 * longest - 14, -6), rotation=90)
