"""Layer by epoch: where in a network, and when, the barrier between siblings arises."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm, Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lmc_curvature.figures.frames import checked, numbers, of_fork
from lmc_curvature.figures.panels import fork_title, rows_height, short_number
from lmc_curvature.plotting.grids import EPOCH_LABEL
from lmc_curvature.plotting.style import GREY, PALE, SMALL, TEXT_WIDTH, look, new_figure

Values = Float64[np.ndarray, " rows"]
Cells = Float64[np.ndarray, "layers epochs"]

_TITLES = {
    "measured": "measured barrier",
    "predicted": "predicted barrier",
    "hessian_energy": "Hessian energy",
    "distance": "distance",
}
_DETAILS = {
    "measured": "of the layer alone",
    "predicted": "second order",
    "hessian_energy": "ΔᵀHΔ of the layer",
    "distance": "‖Δ‖ of the layer",
}
# A signed scale is logarithmic over this many decades on either side of zero, and linear between them. The linear part
# takes as much room as this share of a decade: little, so that colours tell orders of magnitude apart.
_SIGNED_DECADES = 3
_LINEAR_SHARE = 0.3
# From this ratio of the largest to the smallest on, distances have a logarithmic scale, of at most these decades.
_WIDE = 30.0
_MOST_DECADES = 4
_MOST_EPOCHS = 6
_MOST_NAMES = 60
_LONGEST_NAME = 24


@look()
def draw_layer_heatmaps(layers: pd.DataFrame, *, fork: int) -> Figure:
    """Draw what is known of every layer over training, a row a layer and a column an epoch, side by side.

    Figures 5 and 15 to 20 of Singh et al. 2024: the barrier of the layer alone, measured and predicted to second order,
    on one scale; its Hessian energy; and its distance. The first layer is on top. Columns are the epochs in the table,
    all of one width. Hatched cells are not known.

    Barriers and energies have signed scales, which are logarithmic but for their middle: white is zero, and red is
    above it. Where a curve nowhere rises above the chord, blue says how far it sinks below: measured at its lowest
    point, predicted at α = ½. Distances that span more than a factor of 30 have a logarithmic scale over at most four
    decades, and cells below it are white.

    Args:
        layers: A row a fork, epoch and layer, with the columns `position`, `layer`, `measured`, `measured_lowest`,
            `predicted`, `hessian_energy` and `distance`.
        fork: Whose siblings.

    Raises:
        OptionError: A column is missing, or the table does not have this fork.
    """
    columns = ["position", "layer", "measured_lowest", *_TITLES]
    rows = of_fork(checked(layers, "layers", columns), "layers", fork)
    positions, epochs = np.unique(numbers(rows, "position")), np.unique(numbers(rows, "epoch"))
    shown = {
        "measured": _signed(numbers(rows, "measured"), numbers(rows, "measured_lowest")),
        # At α = ½ the second-order curve is an eighth of the mean energy of both ends.
        "predicted": _signed(numbers(rows, "predicted"), numbers(rows, "hessian_energy") / 8),
        "hessian_energy": numbers(rows, "hessian_energy"),
        "distance": numbers(rows, "distance"),
    }
    cells = {column: _cells(rows, values, positions, epochs) for column, values in shown.items()}
    barriers = _signed_scale(np.concatenate([cells["measured"], cells["predicted"]]))
    scales: dict[str, Normalize] = {
        "measured": barriers,
        "predicted": barriers,
        "hessian_energy": _signed_scale(cells["hessian_energy"]),
        "distance": _positive_scale(cells["distance"]),
    }
    names = dict(zip(numbers(rows, "position"), rows["layer"], strict=True))
    figure = new_figure(TEXT_WIDTH, rows_height(len(positions), 0.15) + 1.75)
    panels = dict(zip(cells, figure.subplots(1, len(cells), sharey=True), strict=True))
    meshes = {column: _draw_cells(axes, cells[column], scales[column]) for column, axes in panels.items()}
    for column, axes in panels.items():
        _label_epochs(axes, epochs)
        axes.set_title(f"{_TITLES[column]}\n{_DETAILS[column]}", loc="left", fontsize=SMALL + 0.5)
    _draw_signed_bar(figure, [panels["measured"], panels["predicted"]], meshes["predicted"], powers=2)
    _draw_signed_bar(figure, [panels["hessian_energy"]], meshes["hessian_energy"], powers=1)
    _draw_positive_bar(
        figure, panels["distance"], meshes["distance"], _has_below(cells["distance"], scales["distance"])
    )
    step = math.ceil(len(positions) / _MOST_NAMES)
    named = range(0, len(positions), step)
    panels["measured"].set_yticks(list(named), [_shorten(str(names[positions[row]])) for row in named])
    figure.suptitle(fork_title(fork), x=0.01, ha="left", fontsize="medium")
    _draw_legend(figure, cells, below=_has_below(cells["distance"], scales["distance"]))
    return figure


def _signed(barriers: Values, sunken: Values) -> Values:
    """Barriers, and where there are none, how far the curve sinks below the chord."""
    return np.where(barriers <= 0, np.minimum(sunken, 0.0), barriers)


def _cells(rows: pd.DataFrame, values: Values, positions: np.ndarray, epochs: np.ndarray) -> Cells:
    """Values of the rows as a matrix, NaN where the table has nothing."""
    cells = np.full((len(positions), len(epochs)), np.nan)
    at = np.searchsorted(positions, numbers(rows, "position")), np.searchsorted(epochs, numbers(rows, "epoch"))
    cells[at] = values
    return cells


def _signed_scale(values: Cells) -> SymLogNorm:
    """Symmetric about zero, so that the middle of the colours means zero whatever the values."""
    largest = float(np.abs(values[np.isfinite(values)]).max(initial=0.0)) or 1.0
    return SymLogNorm(largest * 10.0**-_SIGNED_DECADES, linscale=_LINEAR_SHARE, vmin=-largest, vmax=largest)


def _positive_scale(values: Cells) -> Normalize:
    finite = values[np.isfinite(values)]
    positive = finite[finite > 0]
    if len(positive) and positive.max() > _WIDE * positive.min():
        return LogNorm(max(positive.min(), positive.max() * 10.0**-_MOST_DECADES), positive.max())
    return Normalize(0.0, float(finite.max(initial=0)) or 1.0)


def _floor(scale: Normalize) -> float:
    """Where a logarithmic scale begins; a linear one holds all values."""
    return float(scale.vmin or 0.0) if isinstance(scale, LogNorm) else -math.inf


def _has_below(values: Cells, scale: Normalize) -> bool:
    return bool((values < _floor(scale)).any())


def _draw_cells(axes: Axes, values: Cells, scale: Normalize) -> QuadMesh:
    rows, columns = values.shape
    # Cells that are not known are left out, and show what is behind them.
    hatch = Rectangle((-0.5, -0.5), columns, rows, facecolor=PALE, edgecolor=GREY, hatch="/////", linewidth=0, zorder=0)
    axes.add_patch(hatch)
    # Zero has no logarithm, and would be left out too.
    shown = np.where(values <= 0, _floor(scale) / 10, values) if isinstance(scale, LogNorm) else values
    colors = mpl.colormaps["RdBu_r" if isinstance(scale, SymLogNorm) else "viridis"]
    edges = np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5
    colors = colors.with_extremes(under="white", bad=(0, 0, 0, 0))
    mesh = axes.pcolormesh(*edges, np.ma.masked_invalid(shown), norm=scale, cmap=colors)
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    axes.tick_params(axis="y", length=0)
    return mesh


def _label_epochs(axes: Axes, epochs: np.ndarray) -> None:
    shown = range(0, len(epochs), math.ceil(len(epochs) / _MOST_EPOCHS))
    axes.set_xticks(list(shown), [str(int(epochs[column])) for column in shown])
    axes.set_xlabel(EPOCH_LABEL)


def _draw_signed_bar(figure: Figure, panels: Sequence[Axes], mesh: QuadMesh, *, powers: int) -> None:
    """A bar under the panels, with numbers at zero and at the largest powers of ten on either side of it."""
    bar = _draw_bar(figure, panels, mesh)
    top = math.floor(math.log10(mesh.get_clim()[1] or 1.0) + 1e-9)
    ticks = 10.0 ** np.arange(top - powers + 1, top + 1)
    bar.ax.xaxis.set_major_locator(FixedLocator([*-ticks[::-1], 0, *ticks]))
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value, 1)))


def _draw_positive_bar(figure: Figure, axes: Axes, mesh: QuadMesh, below: bool) -> None:
    logarithmic = isinstance(mesh.norm, LogNorm)
    bar = _draw_bar(figure, [axes], mesh, extend="min" if below else "neither")
    bar.ax.xaxis.set_major_locator(LogLocator(numticks=4) if logarithmic else MaxNLocator(nbins=3))
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value, 1 if logarithmic else 2)))


def _draw_bar(figure: Figure, panels: Sequence[Axes], mesh: QuadMesh, **options: Any) -> Colorbar:
    # One height for all, however many panels a bar is for.
    options |= {"location": "bottom", "aspect": 14 * len(panels), "pad": 0.02}
    bar = figure.colorbar(mesh, ax=list(panels), **options)
    bar.ax.xaxis.set_minor_locator(NullLocator())
    bar.outline.set_linewidth(0.4)
    return bar


def _draw_legend(figure: Figure, cells: Mapping[str, Cells], *, below: bool) -> None:
    """What the signs mean, and hatched and white cells, where there are such."""
    red, blue = (mpl.colormaps["RdBu_r"](share) for share in (0.85, 0.15))
    handles = [
        Patch(facecolor=red, label="above the chord"),
        Patch(facecolor=blue, label="below the chord (no barrier)"),
    ]
    if any(np.isnan(values).any() for values in cells.values()):
        handles.append(Patch(facecolor=PALE, edgecolor=GREY, hatch="/////", linewidth=0, label="not measured"))
    if below:
        label = f"distance of zero, or over 1e{_MOST_DECADES} times below the largest"
        handles.append(Patch(facecolor="white", edgecolor=GREY, linewidth=0.5, label=label))
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles))


def _shorten(name: str) -> str:
    """The end of a long name, which tells layers apart."""
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"
