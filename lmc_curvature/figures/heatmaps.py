"""Barriers, Hessian energies and distances of every layer at every epoch."""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm, Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, Locator, LogLocator, MaxNLocator, NullLocator

from lmc_curvature.figures.frames import any_known, checked, of_fork
from lmc_curvature.figures.panels import EPOCH_LABEL, fork_title
from lmc_curvature.plotting.axes import plain_numbers
from lmc_curvature.plotting.rows import name_rows, rows_height
from lmc_curvature.plotting.style import GREY, PALE, SMALL, TEXT_WIDTH, look, new_figure
from lmc_curvature.plotting.text import short_number

Cells = Float64[np.ndarray, "layers epochs"]

_TITLES = {
    "measured": "measured barrier\nof the layer alone",
    "predicted_anchored": "predicted barrier\nanchored",
    "predicted": "predicted barrier\nsecond order",
    "hessian_energy": "Hessian energy\nΔᵀHΔ of the layer",
    "distance": "distance\n‖Δ‖ of the layer",
}
_BARRIERS = ("measured", "predicted_anchored", "predicted")
# A signed scale is logarithmic over this many decades on either side of zero, and linear between them. The linear part
# takes as much room as this share of a decade: little, so that colours tell orders of magnitude apart.
_SIGNED_DECADES = 3
_LINEAR_SHARE = 0.3
# From this ratio of the largest to the smallest on, distances have a logarithmic scale, of at most these decades.
_WIDE = 30.0
_MOST_DECADES = 4
_MOST_EPOCHS = 6
_UNKNOWN: dict[str, Any] = {"facecolor": PALE, "edgecolor": GREY, "hatch": "/////", "linewidth": 0}


@look()
def draw_layer_heatmaps(layers: pd.DataFrame, *, fork: int) -> Figure:
    """Draw what is known of every layer over training, a row a layer and a column an epoch, side by side.

    Figures 5 and 15 to 20 of Singh et al. 2024: the barrier of the layer alone, measured, predicted by anchors where
    that is known, and predicted to second order, on one scale; its Hessian energy; and its distance. The first layer is
    on top. Columns are the epochs in the table, all of one width. Hatched cells are not known.

    Barriers and energies have signed scales, which are logarithmic but for their middle: white is zero, and red is
    above it. Where a curve nowhere rises above the chord, blue says how far it sinks below: measured at its lowest
    point, predicted to second order at α = ½; anchored barriers are then white. Distances that span more than a factor
    of 30 have a logarithmic scale over at most four decades, and cells below it are white.

    Args:
        layers: A row a fork, epoch and layer, with the columns `position`, `layer`, `measured`, `measured_lowest`,
            `predicted`, `hessian_energy` and `distance`, and `predicted_anchored` where that is known.
        fork: The fork of the siblings.

    Raises:
        OptionError: A column is missing, or the table does not have this fork.
    """
    always = [column for column in _TITLES if column != "predicted_anchored"]
    rows = of_fork(checked(layers, "layers", ["position", "layer", "measured_lowest", *always]), "layers", fork)
    shown = [*_TITLES] if any_known(rows, "predicted_anchored") else always
    # At α = ½ the second-order curve is an eighth of the mean energy of both ends.
    lowest = {"measured": rows["measured_lowest"], "predicted": rows["hessian_energy"] / 8}
    # Where there is no barrier, how far the curve sinks below the chord.
    signed = {column: rows[column].mask(rows[column] <= 0, low.clip(upper=0.0)) for column, low in lowest.items()}
    table = rows.assign(**signed).pivot(index="position", columns="epoch", values=shown)
    cells = {column: table[column].to_numpy(np.float64) for column in shown}
    of_barriers = [column for column in shown if column in _BARRIERS]
    barriers = _signed_scale(np.concatenate([cells[column] for column in of_barriers]))
    energies, distances = _signed_scale(cells["hessian_energy"]), _positive_scale(cells["distance"])
    logarithmic, floor = isinstance(distances, LogNorm), distances.vmin or 0.0
    below = bool((cells["distance"] < floor).any())
    # Zero has no logarithm, and would be left out as if it were not known.
    cells["distance"] = np.maximum(cells["distance"], floor / 10)

    figure = new_figure(TEXT_WIDTH, rows_height(len(table), 0.15) + 2.0)
    panels = list(figure.subplots(1, len(cells), sharey=True))
    meshes = []
    epochs = [f"{epoch:.0f}" for epoch in table["measured"].columns]
    scales = {**dict.fromkeys(of_barriers, barriers), "hessian_energy": energies, "distance": distances}
    for axes, (column, scale) in zip(panels, scales.items(), strict=True):
        meshes.append(_draw_cells(axes, cells[column], scale))
        axes.set_title(_TITLES[column], loc="left", fontsize=SMALL + 0.5)
        step = math.ceil(len(epochs) / _MOST_EPOCHS)
        axes.set_xticks(range(0, len(epochs), step), epochs[::step])
        axes.set_xlabel(EPOCH_LABEL)
    _draw_bar(panels[:-2], meshes[-3], _signed_ticks(barriers, powers=2), _signed_label(barriers, "units of the loss"))
    _draw_bar(panels[-2:-1], meshes[-2], _signed_ticks(energies, powers=1), _signed_label(energies))
    ticks = LogLocator(numticks=4) if logarithmic else MaxNLocator(nbins=3)
    name = "log scale" if logarithmic else "linear scale"
    _draw_bar(panels[-1:], meshes[-1], ticks, name, extend="min" if below else "neither")
    names = dict(zip(rows["position"], rows["layer"], strict=True))
    name_rows(panels[0], [str(names[position]) for position in table.index], longest=24)
    figure.suptitle(fork_title(fork), x=0.01, ha="left", fontsize="medium")
    handles = _legend_patches(unknown=any(np.isnan(values).any() for values in cells.values()), below=below)
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles))
    return figure


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


def _draw_cells(axes: Axes, values: Cells, scale: Normalize) -> QuadMesh:
    rows, columns = values.shape
    # Cells that are not known are left out, and show what is behind them.
    axes.add_patch(Rectangle((-0.5, -0.5), columns, rows, zorder=0, **_UNKNOWN))
    colors = mpl.colormaps["RdBu_r" if isinstance(scale, SymLogNorm) else "viridis"]
    colors = colors.with_extremes(under="white", bad=(0, 0, 0, 0))
    edges = np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5
    mesh = axes.pcolormesh(*edges, np.ma.masked_invalid(values), norm=scale, cmap=colors)
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    axes.tick_params(axis="y", length=0)
    return mesh


def _signed_ticks(scale: SymLogNorm, *, powers: int) -> FixedLocator:
    """Ticks at zero, and at the largest powers of ten on either side of it."""
    top = math.floor(math.log10(scale.vmax or 1.0) + 1e-9)
    ticks = 10.0 ** np.arange(top - powers + 1, top + 1)
    return FixedLocator([*-ticks[::-1], 0, *ticks])


def _signed_label(scale: SymLogNorm, unit: str = "") -> str:
    """That a scale is logarithmic on either side of zero, and where it is not."""
    linear = f"linear within ±{short_number(scale.linthresh)}"
    return f"{unit}, symlog scale: {linear}" if unit else f"symlog scale:\n{linear}"


def _draw_bar(panels: Sequence[Axes], mesh: QuadMesh, ticks: Locator, label: str, **options: Any) -> None:
    """The colours of a mesh under the panels that have them, with plain numbers, and what scale it is."""
    # One height for all, however many panels a bar is for.
    options |= {"location": "bottom", "aspect": 14 * len(panels), "pad": 0.02}
    bar = panels[0].figure.colorbar(mesh, ax=panels, **options)
    bar.ax.xaxis.set_major_locator(ticks)
    bar.ax.xaxis.set_minor_locator(NullLocator())
    plain_numbers(bar.ax.xaxis)
    bar.set_label(label, fontsize=SMALL)
    bar.outline.set_linewidth(0.4)


def _legend_patches(*, unknown: bool, below: bool) -> list[Patch]:
    """The meaning of the signs, and of hatched and white cells, where there are such."""
    signs = {"above the chord": 0.85, "below the chord (no barrier)": 0.15}
    patches = [Patch(facecolor=mpl.colormaps["RdBu_r"](share), label=label) for label, share in signs.items()]
    if unknown:
        patches.append(Patch(label="not measured", **_UNKNOWN))
    if below:
        label = f"distance of zero, or over 1e{_MOST_DECADES} times below the largest"
        patches.append(Patch(facecolor="white", edgecolor=GREY, linewidth=0.5, label=label))
    return patches
