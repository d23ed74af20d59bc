"""The ridge between siblings while they train: barrier curves, one behind the other."""

from collections.abc import Mapping
from itertools import repeat
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d import Axes3D
from mpl_toolkits.mplot3d.art3d import Poly3DCollection

from lmc_curvature.errors import check_choice
from lmc_curvature.figures.frames import by_fork, checked, having, known, numbers
from lmc_curvature.figures.heights import Heights
from lmc_curvature.figures.panels import EPOCH_LABEL, fork_title
from lmc_curvature.plotting.axes import heading, legend_line, thinned, ticks_among
from lmc_curvature.plotting.grids import panel_cells, panel_legend
from lmc_curvature.plotting.style import GREY, SMALL, TEXT_WIDTH, look, sequential_color
from lmc_curvature.plotting.text import short_number

Quantity = Literal["value", "barrier"]

# More curves than this hide each other, and more epochs do not fit into the legend.
_MOST_CURVES, _MOST_ENTRIES = 24, 12
# Faces are pale, and curves behind them are seen through them.
_WHITENED, _OPACITY = 0.6, 0.6
# Panels of values have one scale while the highest is at most this many times as high as the lowest.
_ALIKE = 3.0
# Losses have a logarithmic scale from this ratio of the highest to the lowest on.
_WIDE = 3.0


@look()
def draw_ridges(
    curves: pd.DataFrame, *, metric: str = "error", quantity: Quantity = "value", split: str = "train"
) -> Figure:
    """Draw the metric along the segment between siblings in three dimensions, a curve an epoch and a panel a fork.

    Figures 1 and 8 to 12 of Singh et al. 2024. All panels have the same epochs and the same colours, from the first
    epoch in dark to the last in light, which stands in front. Of many epochs, 24 evenly chosen ones are drawn, the
    first and the last among them.

    Panels of losses have one logarithmic scale where the highest is over three times the lowest and none is zero or
    below; errors have one scale unless one panel is over three times as high as another. As later forks have barriers
    orders of magnitude lower, each panel of barriers has a scale of its own, and a grey sheet at zero, where the chord
    is. Where a valley is deeper than the ridge is high, it is logarithmic on either side of zero (symlog). Labels of
    the heights say which scale they have.

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
    shade = Normalize(first, last + (first == last))
    scales = _panel_scales({fork: numbers(each, quantity) for fork, each in forks.items()}, metric, quantity)
    panels = panel_cells(len(forks), 2.25, margin=0.4)
    figure, epochs = panels.figure, shown_epochs(numbers(rows, "epoch"))
    for (fork, each), cell in zip(forks.items(), panels.cells, strict=True):
        axes = figure.add_subplot(cell, projection="3d")
        axes.set(xlim=(0, 1), ylim=(shade.vmax, shade.vmin))
        _dress(axes, metric if quantity == "value" else "barrier", scales[fork], epochs)
        # The upper left corner of the panel is empty.
        heading(axes, fork_title(fork), _detail(each, quantity), lift=-10.0)
        # It is wider than the box of the axes, for which the layout would make the panel small.
        axes.texts[0].set_in_layout(False)
        if quantity == "barrier":
            _draw_chord(axes)
        _draw_curves(axes, each, quantity, scales[fork], shade)
    if panels.spare is not None:
        shown = thinned(epochs, _MOST_ENTRIES - 1)
        lines = [legend_line(f"{epoch:.0f}", color=sequential_color(float(shade(epoch)))) for epoch in shown]
        panel_legend(panels, lines, columns=1, title=EPOCH_LABEL, alignment="left")
    named = "error, a share of examples" if metric == "error" else metric
    what = named if quantity == "value" else f"barrier of the {named}"
    space = " " if figure.get_figwidth() >= TEXT_WIDTH else "\n"
    title = f"{split} {what},{space}between siblings at α of their segment"
    if len(set(scales.values())) > 1:
        title += f";{space}each panel has its own scale"
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium")
    # The layout does not see how far the labels of the heights reach.
    figure.set_layout_engine("constrained", rect=(0, 0, 1 - 0.2 / figure.get_figwidth(), 1))
    return figure


def _panel_scales(heights: Mapping[int, np.ndarray], metric: str, quantity: Quantity) -> dict[int, Heights]:
    """Fork to its scale of heights: one for values that are alike or logarithmic, otherwise a scale each."""
    if quantity == "barrier":
        return {fork: _of_barriers(each) for fork, each in heights.items()}
    everything = np.hstack([*heights.values()])
    low, top = float(everything.min()), float(everything.max())
    if metric == "loss" and low > 0 and top > _WIDE * low:
        # One early epoch would flatten all later ones.
        return dict.fromkeys(heights, Heights(low / 1.15, top * 1.05, "log"))
    scales = {fork: _linear(each) for fork, each in heights.items()}
    tops = [scale.high for scale in scales.values()]
    return scales if max(tops) > _ALIKE * min(tops) else dict.fromkeys(heights, _linear(everything))


def _linear(heights: np.ndarray) -> Heights:
    """From the lowest to the highest, zero among them."""
    low, top = _without_noise(min(heights.min(), 0.0)), _without_noise(max(heights.max(), 0.0))
    return Heights(low, top if top > low else low + 1)


def _of_barriers(heights: np.ndarray) -> Heights:
    """Logarithmic on either side of zero, where a valley is deeper than the ridge is high, which it would flatten."""
    scale = _linear(heights)
    if not heights.max() > 1e-12 or -scale.low <= scale.high:
        return scale
    return Heights(scale.low, scale.high, "symlog", scale.high / 3)


def _detail(rows: pd.DataFrame, quantity: Quantity) -> str:
    """The highest point at the last epoch, and of barriers how deep the deepest valley is."""
    last = numbers(rows, "epoch").max()
    highest = _without_noise(numbers(having(rows, "epoch", last), quantity).max())
    lowest = _without_noise(numbers(rows, quantity).min())
    detail = f"highest at epoch {last:.0f}: {short_number(highest)}"
    return f"{detail}; lowest: {short_number(lowest)}" if quantity == "barrier" and lowest < 0 else detail


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


def _draw_curves(axes: Axes3D, rows: pd.DataFrame, quantity: Quantity, scale: Heights, shade: Normalize) -> None:
    """The curves from the back to the front, each on a face that covers those behind it a little."""
    for depth, epoch in enumerate(shown_epochs(numbers(rows, "epoch"))):
        curve = having(rows, "epoch", epoch, by="alpha")
        alphas, places = numbers(curve, "alpha"), scale.places(numbers(curve, quantity))
        color = sequential_color(float(shade(epoch)))
        pale = tuple(_WHITENED + (1 - _WHITENED) * part for part in to_rgb(color))
        corners = [alphas[0], *alphas, alphas[-1]], repeat(epoch), [scale.base, *places, scale.base]
        style: dict[str, Any] = {"facecolors": [(*pale, _OPACITY)], "edgecolors": "none", "zorder": 10 + 2 * depth}
        axes.add_collection3d(Poly3DCollection([[*zip(*corners, strict=False)]], **style))
        axes.plot(alphas, np.full_like(alphas, epoch), places, color=color, linewidth=1, zorder=11 + 2 * depth)


def _dress(axes: Axes3D, height_label: str, scale: Heights, epochs: np.ndarray) -> None:
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
    ticks_among(axes.yaxis, epochs, most=4)
    axes.tick_params(labelsize=SMALL - 0.5)
    axes.tick_params("x", pad=-4)
    axes.tick_params("y", pad=-1)
    # Numbers are centred on a line, which lies as far out as the longest of them asks for.
    longest = max(map(len, scale.dress(axes)))
    axes.zaxis.set_tick_params(pad=max(longest - 5, -1))
    # Or a long word stands upright, and a short one lies.
    axes.zaxis.set_rotate_label(False)
    # Where it says the scale it is long, and would reach into the next panel.
    size = SMALL - 0.5 if scale.name else "medium"
    axes.set_zlabel(f"{height_label}{scale.name}", fontsize=size, labelpad=max(2.5 * longest - 14, -6), rotation=90)
