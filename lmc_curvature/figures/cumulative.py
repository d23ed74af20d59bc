"""Barriers that grow layer by layer: of the first k layers, and of the last k."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from lmc_curvature.barrier.drawing import BARRIER_LABEL
from lmc_curvature.figures.frames import any_known, at_epoch, by_fork, checked, having, numbers
from lmc_curvature.figures.panels import fork_title
from lmc_curvature.plotting.axes import count_axis, heading, legend_line, plain_ticks, zero_line
from lmc_curvature.plotting.grids import label_panels, panel_cells, share_scale
from lmc_curvature.plotting.style import BLUE, INK, VERMILION, look

_SIDES = {"first": BLUE, "last": VERMILION}
_MEASURED: dict[str, Any] = {"marker": "o", "markersize": 2.5, "linewidth": 1}
# Where the first is not known, the second takes its place.
_ANCHORED = {"predicted_anchored": ("predicted, anchored", "--")}
_SHARED = {"predicted_shared": ("predicted, shared Hessian", "--")}
_SECOND_ORDER = {"predicted": ("predicted, second order", ":")}


@look()
def draw_cumulative_barriers(cumulative: pd.DataFrame, *, epoch: int | None = None) -> Figure:
    """Draw the barrier of the first k layers and of the last k layers together, for every k, a panel a fork.

    Measured as by Adilova et al. 2023, and predicted: anchored, or, where nothing is, from the curvature at one end
    (Singh et al. 2024, equation 21); and from the curvature at both ends (second order). Panels have one scale when
    they are of one order of magnitude, and a scale each otherwise.

    Args:
        cumulative: A row a fork, epoch, side (`"first"` or `"last"`) and count of layers, with the columns `measured`,
            `predicted`, `predicted_shared`, and `predicted_anchored` where that is known.
        epoch: The siblings' epoch; by default the last that each fork has.

    Raises:
        OptionError: A column is missing, or no fork has this epoch.
    """
    columns = ["side", "count", "measured", *_SHARED, *_SECOND_ORDER]
    rows = at_epoch(checked(cumulative, "cumulative barriers", columns), "cumulative barriers", epoch)
    predicted = (_ANCHORED if any_known(rows, *_ANCHORED) else _SHARED) | _SECOND_ORDER
    forks = by_fork(rows)
    figure, cells = panel_cells(len(forks), 1.9, margin=0.85)
    panels = [figure.add_subplot(cell) for cell in cells]
    for axes, (fork, each) in zip(panels, forks.items(), strict=True):
        zero_line(axes)
        for side, color in _SIDES.items():
            side_rows = having(each, "side", side, by="count")
            counts = numbers(side_rows, "count")
            for column, (_, style) in predicted.items():
                axes.plot(counts, numbers(side_rows, column), style, color=color, label=f"_{side}, {column}")
            axes.plot(counts, numbers(side_rows, "measured"), color=color, label=f"_{side}, measured", **_MEASURED)
        count_axis(axes, "")
        plain_ticks(axes.yaxis)
        heading(axes, fork_title(fork), f"siblings at epoch {int(numbers(each, 'epoch')[0])}")
    share_scale(panels)
    label_panels(figure, "number of layers k", BARRIER_LABEL)
    # Colours for the sides, and line styles for where the barriers come from.
    handles = [legend_line(f"{side} k layers", color=color, linewidth=3) for side, color in _SIDES.items()]
    handles.append(legend_line("measured", color=INK, **_MEASURED))
    handles += [legend_line(label, color=INK, linestyle=style) for label, style in predicted.values()]
    figure.legend(handles=handles, loc="outside upper left", ncols=5 if figure.get_figwidth() > 6 else 2)
    return figure
