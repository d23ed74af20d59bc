"""The figure of spectral densities: how the eigenvalues of a Hessian, or of a Gauss-Newton matrix, are distributed."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import LogLocator, NullFormatter

from lmc_curvature.curvature.spectra.density import WIDTH_SHARE, SpectralDensity, check_width
from lmc_curvature.curvature.spectra.eigenpairs import Eigenpairs
from lmc_curvature.errors import OptionError, suggest
from lmc_curvature.plotting.axes import count_axis, heading, legend_line, plain_ticks, zero_line
from lmc_curvature.plotting.style import BLUE, COLUMN_WIDTH, GREY, PALE, SMALL, TEXT_WIDTH, look, new_figure, pens
from lmc_curvature.plotting.text import short_number

_POINTS = 2001
# How far below the height of a single eigenvalue the axis begins.
_FLOOR = 0.03
_SINGLE: dict[str, Any] = {"color": GREY, "linewidth": 0.8, "linestyle": (0, (1, 2))}
_MARK: dict[str, Any] = {"marker": "^", "markersize": 3.5, "linestyle": "none"}


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
        title: The title of the panel.
        axes: The panel to draw into, instead of a new figure.

    Returns:
        The figure, which is that of `axes` where they are given.

    Raises:
        OptionError: There is no density, the width is not positive, or eigenpairs have a name that no density has.
    """
    by_name = {"": densities} if isinstance(densities, SpectralDensity) else dict(densities)
    if not by_name:
        raise OptionError("There is no density to draw; expected at least one.")
    marks = _named_eigenpairs(by_name, eigenpairs)
    grid, width = _shared_grid(by_name, marks, width)
    if axes is None:
        axes = new_figure(TEXT_WIDTH, 2.8).add_subplot()
    pen_of = pens({name: name for name in by_name})
    curves = {name: density.curve(grid, width=width) for name, density in by_name.items()}
    single = {1 / (density.dimension * width * math.sqrt(2 * math.pi)) for density in by_name.values()}
    floor = _FLOOR * min(single)

    axes.axvline(0, color=PALE, linewidth=0.8, zorder=0, label="_zero")
    for name, curve in curves.items():
        axes.fill_between(grid, floor, np.maximum(curve, floor), color=pen_of[name].color, alpha=0.12, linewidth=0)
        # Zeros have no logarithm; far below the axis, the curve leaves the panel where it should.
        axes.plot(grid, np.maximum(curve, 1e-3 * floor), label=name or "_density", **pen_of[name].style)
    for height in sorted(single):
        axes.axhline(height, zorder=1, label="_one eigenvalue", **_SINGLE)
    for row, (name, pairs) in enumerate(marks.items()):
        # Triangles just above the axis, a row for each density.
        values, place = pairs.values.cpu().numpy(), axes.get_xaxis_transform()
        style: dict[str, Any] = {"color": pen_of[name].color, "markeredgewidth": 0, **_MARK}
        axes.plot(values, np.full_like(values, 0.03 + 0.05 * row), transform=place, label="_eigenvalues", **style)
    axes.set(yscale="log", xlim=(grid[0], grid[-1]), ylim=(floor, 3 * max(curve.max() for curve in curves.values())))
    axes.set(xlabel="eigenvalue λ", ylabel="share of eigenvalues per unit of λ")
    plain_ticks(axes.xaxis, most=8)
    axes.yaxis.set_major_locator(LogLocator(numticks=8))
    axes.yaxis.set_minor_formatter(NullFormatter())
    counts = sorted({density.dimension for density in by_name.values()})
    sizes = " and ".join(f"{count:,}".replace(",", " ") for count in counts)
    heading(axes, title, f"Gaussian kernel of width {short_number(width)}; {sizes} eigenvalues")
    handles = [legend_line(name, **pen.style) for name, pen in pen_of.items() if name]
    handles.append(legend_line("height of one eigenvalue", **_SINGLE))
    if marks:
        handles.append(legend_line("eigenvalue found", color=GREY, **_MARK))
    axes.legend(handles=handles, loc="upper right", fontsize=SMALL)
    return axes.figure


@look()
def draw_small_density(density: SpectralDensity) -> Figure:
    """Draw one density, small.

    Args:
        density: A result of `spectral_density`.
    """
    figure = new_figure(1.4 * COLUMN_WIDTH, 2.4)
    draw_spectral_density(density, axes=figure.add_subplot())
    return figure


@look()
def draw_eigenvalues(values: Float64[np.ndarray, " k"], residuals: Float64[np.ndarray, " k"], title: str) -> Figure:
    """Draw eigenvalues that were found, in their order, with bars within which an eigenvalue lies.

    Args:
        values: The eigenvalues.
        residuals: ‖A v − λ v‖ of each, (k,).
        title: What they are.
    """
    figure = new_figure(COLUMN_WIDTH, 2.3)
    axes = figure.add_subplot()
    zero_line(axes)
    numbers = np.arange(1, len(values) + 1)
    style: dict[str, Any] = {"color": BLUE, "marker": "o", "markersize": 3, "linestyle": "none", "elinewidth": 0.8}
    axes.errorbar(numbers, values, yerr=residuals, label="_eigenvalues", **style)
    count_axis(axes, "number")
    plain_ticks(axes.yaxis)
    heading(axes, title, "bars: residuals, within which an eigenvalue lies")
    return figure


def _named_eigenpairs(
    by_name: Mapping[str, SpectralDensity], eigenpairs: Eigenpairs | Mapping[str, Eigenpairs] | None
) -> dict[str, Eigenpairs]:
    if eigenpairs is None:
        return {}
    if isinstance(eigenpairs, Eigenpairs) and len(by_name) > 1:
        raise OptionError(f"Whose are the eigenpairs? Pass them under a name: {suggest('', by_name)}")
    marks = {next(iter(by_name)): eigenpairs} if isinstance(eigenpairs, Eigenpairs) else dict(eigenpairs)
    for name in marks:
        if name not in by_name:
            raise OptionError(f"eigenpairs has {name!r}, which is not among the densities: {suggest(name, by_name)}")
    return marks


def _shared_grid(
    by_name: Mapping[str, SpectralDensity], marks: Mapping[str, Eigenpairs], width: float | None
) -> tuple[Float64[np.ndarray, " points"], float]:
    """Points that cover all densities and eigenvalues with a margin, and a kernel width that suits them together."""
    ends = [density.support for density in by_name.values()]
    ends += [(float(pairs.values.min()), float(pairs.values.max())) for pairs in marks.values()]
    low, high = np.min(ends), np.max(ends)
    if width is None:
        width = float(WIDTH_SHARE * (high - low)) or next(iter(by_name.values())).default_width
    check_width(width)
    return np.linspace(low - 4 * width, high + 4 * width, _POINTS), width
