"""Spectra of curvature: how the eigenvalues of a Hessian, or of a Gauss-Newton matrix, are distributed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from lmc_curvature.curvature.spectra.density import WIDTH_SHARE, SpectralDensity
from lmc_curvature.curvature.spectra.eigenpairs import Eigenpairs
from lmc_curvature.errors import OptionError, suggest
from lmc_curvature.figures.panels import heading, plain_ticks, short_number
from lmc_curvature.plotting.style import (
    BLUE,
    GREEN,
    GREY,
    PALE,
    PURPLE,
    SMALL,
    TEXT_WIDTH,
    VERMILION,
    Pen,
    fork_colors,
    look,
    new_figure,
)

_COLORS = (BLUE, VERMILION, GREEN, PURPLE)
_LINESTYLES = ("-", "--", "-.", ":")
_POINTS = 2001
# How far below the height of a single eigenvalue the axis begins.
_FLOOR = 0.03


@look()
def draw_spectral_density(
    densities: SpectralDensity | Mapping[str, SpectralDensity],
    *,
    eigenpairs: Eigenpairs | Mapping[str, Eigenpairs] | None = None,
    width: float | None = None,
    title: str = "spectral density",
    axes: Axes | None = None,
) -> Figure | SubFigure:
    """Draw spectral densities over one another, on a logarithmic scale, all smoothed with the same kernel.

    On that scale a single eigenvalue far from the others is as visible as the thousands near zero: a dotted line shows
    how high one alone stands. Triangles below mark eigenvalues that are known exactly.

    Args:
        densities: One density, or a name for each: Hessian and Gauss-Newton matrix, parent and child.
        eigenpairs: Eigenvalues to mark; where several densities have them, under the densities' names.
        width: Standard deviation of the kernel; by default `WIDTH_SHARE` of what is drawn.
        title: Of the panel.
        axes: Where to draw, instead of a new figure.

    Returns:
        The figure, which is that of `axes` where they are given.

    Raises:
        OptionError: There is no density, the width is not positive, or eigenpairs have a name that no density has.
    """
    named = {"": densities} if isinstance(densities, SpectralDensity) else dict(densities)
    if not named:
        raise OptionError("There is no density to draw; expected at least one.")
    marked = _marked(named, eigenpairs)
    grid, width = _shared_grid(list(named.values()), list(marked.values()), width)
    if axes is None:
        axes = new_figure(TEXT_WIDTH, 2.8).add_subplot()
    pens = _pens(list(named))
    curves = {name: density.curve(grid, width=width) for name, density in named.items()}
    single = {name: 1 / (density.dimension * width * math.sqrt(2 * math.pi)) for name, density in named.items()}
    floor = _FLOOR * min(single.values())

    axes.axvline(0, color=PALE, linewidth=0.8, zorder=0, label="_zero")
    for name, curve in curves.items():
        _draw_curve(axes, grid, curve, pens[name], floor)
    for height in sorted(set(single.values())):
        axes.axhline(height, color=GREY, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1, label="_one eigenvalue")
    for row, (name, pairs) in enumerate(marked.items()):
        _draw_marks(axes, pairs.values.cpu().numpy(), pens[name], row)
    _finish(axes, grid, floor, max(curve.max() for curve in curves.values()))
    heading(axes, title, f"Gaussian kernel of width {short_number(width)}; {_sizes_text(named)}")
    _draw_legend(axes, pens, marked=bool(marked))
    return axes.figure


def _marked(
    named: Mapping[str, SpectralDensity], eigenpairs: Eigenpairs | Mapping[str, Eigenpairs] | None
) -> dict[str, Eigenpairs]:
    if eigenpairs is None:
        return {}
    marked = {next(iter(named)): eigenpairs} if isinstance(eigenpairs, Eigenpairs) else dict(eigenpairs)
    for name in marked:
        if name not in named:
            raise OptionError(f"eigenpairs has {name!r}, which is not among the densities: {suggest(name, named)}")
    if isinstance(eigenpairs, Eigenpairs) and len(named) > 1:
        raise OptionError(f"Whose are the eigenpairs? Pass them under a name: {suggest('', named)}")
    return marked


def _shared_grid(
    densities: Sequence[SpectralDensity], eigenpairs: Sequence[Eigenpairs], width: float | None
) -> tuple[Float64[np.ndarray, " points"], float]:
    """Points that cover all densities and eigenvalues with a margin, and a kernel width that suits them together."""
    ends = [density.support for density in densities]
    ends += [(float(pairs.values.min()), float(pairs.values.max())) for pairs in eigenpairs]
    low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    if width is None:
        width = WIDTH_SHARE * (high - low) or densities[0].default_width
    if not 0 < width < math.inf:
        raise OptionError(f"width={width!r}: expected a positive standard deviation of the kernel.")
    return np.linspace(low - 4 * width, high + 4 * width, _POINTS), width


def _pens(names: Sequence[str]) -> dict[str, Pen]:
    if len(names) <= len(_COLORS):
        colors: Sequence[Any] = _COLORS
    else:
        colors = list(fork_colors(names).values())
    return {name: Pen(name, colors[i], _LINESTYLES[i % len(_LINESTYLES)]) for i, name in enumerate(names)}


def _draw_curve(
    axes: Axes,
    grid: Float64[np.ndarray, " points"],
    curve: Float64[np.ndarray, " points"],
    pen: Pen,
    floor: float,
) -> None:
    axes.fill_between(grid, floor, np.maximum(curve, floor), color=pen.color, alpha=0.12, linewidth=0)
    # Zeros have no logarithm; far below the axis, the curve leaves the panel where it should.
    axes.plot(
        grid, np.maximum(curve, 1e-3 * floor), color=pen.color, linestyle=pen.linestyle, label=pen.label or "_density"
    )


def _draw_marks(axes: Axes, values: Float64[np.ndarray, " k"], pen: Pen, row: int) -> None:
    """Triangles just above the axis, a row for each density."""
    axes.plot(
        values,
        np.full_like(values, 0.03 + 0.05 * row),
        marker="^",
        markersize=3.5,
        linestyle="none",
        color=pen.color,
        markeredgewidth=0,
        transform=axes.get_xaxis_transform(),
        label="_eigenvalues",
    )


def _finish(axes: Axes, grid: Float64[np.ndarray, " points"], floor: float, top: float) -> None:
    axes.set(yscale="log", xlim=(grid[0], grid[-1]), ylim=(floor, 3 * top))
    axes.set(xlabel="eigenvalue λ", ylabel="share of eigenvalues per unit of λ")
    plain_ticks(axes.xaxis, most=8)
    axes.yaxis.set_major_locator(LogLocator(numticks=8))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _sizes_text(named: Mapping[str, SpectralDensity]) -> str:
    sizes = sorted({density.dimension for density in named.values()})
    return " and ".join(f"{size:,}".replace(",", " ") for size in sizes) + " eigenvalues"


def _draw_legend(axes: Axes, pens: Mapping[str, Pen], *, marked: bool) -> None:
    handles = [
        Line2D([], [], color=pen.color, linestyle=pen.linestyle, label=name) for name, pen in pens.items() if name
    ]
    handles.append(Line2D([], [], color=GREY, linewidth=0.8, linestyle=(0, (1, 2)), label="height of one eigenvalue"))
    if marked:
        handles.append(
            Line2D([], [], color=GREY, marker="^", markersize=3.5, linestyle="none", label="eigenvalue found")
        )
    axes.legend(handles=handles, loc="upper right", fontsize=SMALL)
