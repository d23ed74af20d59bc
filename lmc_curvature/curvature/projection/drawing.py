"""The picture of a projection: the curvature between all pairs of directions."""

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lmc_curvature.plotting.axes import heading
from lmc_curvature.plotting.style import COLUMN_WIDTH, SMALL, look, new_figure
from lmc_curvature.plotting.text import short_number

if TYPE_CHECKING:
    from lmc_curvature.curvature.projection.projection import Projection

# Logarithmic over this many decades on either side of zero.
_DECADES = 3


@look()
def draw_projection(projection: "Projection") -> Figure:
    """Draw the curvature between all pairs of directions: red is above zero, blue below it, and white is zero.

    Args:
        projection: A result of `project_hessian`.
    """
    largest = float(np.abs(projection.curvature).max(initial=0.0)) or 1.0
    scale = SymLogNorm(largest * 10.0**-_DECADES, linscale=0.3, vmin=-largest, vmax=largest)
    figure = new_figure(COLUMN_WIDTH, 2.8)
    axes = figure.add_subplot()
    image = axes.imshow(projection.curvature, norm=scale, cmap="RdBu_r", interpolation="nearest")
    axes.set(xlabel="direction", ylabel="direction")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    heading(axes, "curvature UᵀHU", f"at a loss of {short_number(projection.loss)}")
    bar = figure.colorbar(image, ax=axes, ticks=[-largest, 0, largest])
    bar.ax.set_yticklabels([short_number(value) for value in (-largest, 0.0, largest)])
    bar.ax.minorticks_off()
    bar.set_label(f"symlog scale: linear within ±{short_number(scale.linthresh)}", fontsize=SMALL)
    return figure
