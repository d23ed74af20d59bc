"""Layer by epoch: where in a network, and when, the barrier between siblings arises."""

import math
from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
import pandas as pd
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lmc_curvature.figures.frames import checked, numbers, of_fork
from lmc_curvature.figures.grids import EPOCH_LABEL
from lmc_curvature.figures.panels import fork_title, rows_height, short_number
from lmc_curvature.figures.style import GREY, PALE, SMALL, TEXT_WIDTH, look, new_figure

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
# From this ratio of the largest to the smallest on, a scale is logarithmic; and it spans at most these decades.
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
    all of one width. Hatched cells are not known. Where values span more than a factor of 30 the scale is logarithmic,
    over at most four decades, and cells below it are white.

    Args:
        layers: A row a fork, epoch and layer, with the columns `position`, `layer`, `measured`, `predicted`,
            `hessian_energy` and `distance`.
        fork: Whose siblings.

    Raises:
        OptionError: A column is missing, or the table does not have this fork.
    """
    rows = of_fork(checked(layers, "layers", ["position", "layer", *_TITLES]), "layers", fork)
    positions, epochs = np.unique(numbers(rows, "position")), np.unique(numbers(rows, "epoch"))
    cells = {column: _cells(rows, column, positions, epochs) for column in _TITLES}
    scales = _scales(cells)
    names = dict(zip(numbers(rows, "position"), rows["layer"], strict=True))
    figure = new_figure(TEXT_WIDTH, rows_height(len(positions), 0.15) + 1.75)
    panels = figure.subplots(1, len(cells), sharey=True)
    for axes, (column, values) in zip(panels, cells.items(), strict=True):
        mesh = _draw_cells(axes, values, scales[column])
        _label_epochs(axes, epochs)
        axes.set_title(f"{_TITLES[column]}\n{_DETAILS[column]}", loc="left", fontsize=SMALL + 0.5)
        _draw_scale(figure, axes, mesh, below=bool((values < _floor(scales[column])).any()))
    step = math.ceil(len(positions) / _MOST_NAMES)
    shown = range(0, len(positions), step)
    panels[0].set_yticks(list(shown), [_shorten(str(names[positions[row]])) for row in shown])
    figure.suptitle(fork_title(fork), x=0.01, ha="left", fontsize="medium")
    _draw_legend(figure, cells, scales)
    return figure


def _cells(rows: pd.DataFrame, column: str, positions: np.ndarray, epochs: np.ndarray) -> Cells:
    """A column of the table as a matrix, NaN where the table has nothing."""
    values = np.full((len(positions), len(epochs)), np.nan)
    at = np.searchsorted(positions, numbers(rows, "position")), np.searchsorted(epochs, numbers(rows, "epoch"))
    values[at] = numbers(rows, column)
    return values


def _scales(cells: Mapping[str, Cells]) -> dict[str, Normalize]:
    """A scale a panel, but one for the two barriers, which are to be compared."""
    barriers = np.concatenate([cells["measured"], cells["predicted"]])
    alike = {"measured": barriers, "predicted": barriers}
    return {column: _scale(alike.get(column, values)) for column, values in cells.items()}


def _scale(values: Cells) -> Normalize:
    finite = values[np.isfinite(values)]
    positive = finite[finite > 0]
    if len(positive) and positive.max() > _WIDE * positive.min():
        return LogNorm(max(positive.min(), positive.max() * 10.0**-_MOST_DECADES), positive.max())
    low, high = float(finite.min(initial=0)), float(finite.max(initial=0))
    return Normalize(low, high if high > low else low + 1)


def _floor(scale: Normalize) -> float:
    """Where a logarithmic scale begins; a linear one holds all values."""
    return float(scale.vmin or 0.0) if isinstance(scale, LogNorm) else -math.inf


def _draw_cells(axes: Axes, values: Cells, scale: Normalize) -> QuadMesh:
    rows, columns = values.shape
    # Cells that are not known are left out, and show what is behind them.
    hatch = Rectangle((-0.5, -0.5), columns, rows, facecolor=PALE, edgecolor=GREY, hatch="/////", linewidth=0, zorder=0)
    axes.add_patch(hatch)
    # Zero has no logarithm, and would be left out too.
    shown = np.where(values <= 0, _floor(scale) / 10, values) if isinstance(scale, LogNorm) else values
    colors = mpl.colormaps["viridis"].with_extremes(under="white", bad=(0, 0, 0, 0))
    edges = np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5
    mesh = axes.pcolormesh(*edges, np.ma.masked_invalid(shown), norm=scale, cmap=colors)
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    axes.tick_params(axis="y", length=0)
    return mesh


def _label_epochs(axes: Axes, epochs: np.ndarray) -> None:
    shown = range(0, len(epochs), math.ceil(len(epochs) / _MOST_EPOCHS))
    axes.set_xticks(list(shown), [str(int(epochs[column])) for column in shown])
    axes.set_xlabel(EPOCH_LABEL)


def _draw_scale(figure: Figure, axes: Axes, mesh: QuadMesh, *, below: bool) -> None:
    logarithmic = isinstance(mesh.norm, LogNorm)
    bar = figure.colorbar(mesh, ax=axes, location="bottom", extend="min" if below else "neither", aspect=14, pad=0.02)
    bar.ax.xaxis.set_major_locator(LogLocator(numticks=4) if logarithmic else MaxNLocator(nbins=3))
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value, 1 if logarithmic else 2)))
    bar.ax.xaxis.set_minor_locator(NullLocator())
    bar.outline.set_linewidth(0.4)


def _draw_legend(figure: Figure, cells: Mapping[str, Cells], scales: Mapping[str, Normalize]) -> None:
    """What hatched and white cells mean, where there are such."""
    handles = []
    if any(np.isnan(values).any() for values in cells.values()):
        handles.append(Patch(facecolor=PALE, edgecolor=GREY, hatch="/////", linewidth=0, label="not measured"))
    if any((values < _floor(scales[column])).any() for column, values in cells.items()):
        label = f"zero or below, or over 1e{_MOST_DECADES} times below the largest"
        handles.append(Patch(facecolor="white", edgecolor=GREY, linewidth=0.5, label=label))
    if handles:
        figure.legend(handles=handles, loc="outside lower left", ncols=2)


def _shorten(name: str) -> str:
    """The end of a long name, which tells layers apart."""
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"
