"""The kinds of barrier curves, a schematic curve of each."""

import numpy as np
from matplotlib.figure import Figure

from lmc_curvature.barrier.drawing import ALPHA_LABEL, ALPHAS, alpha_axis
from lmc_curvature.barrier.kinds import classify_curve
from lmc_curvature.plotting.axes import heading, zero_line
from lmc_curvature.plotting.grids import label_panels
from lmc_curvature.plotting.style import BLUE, PALE, SKETCH, TEXT_WIDTH, look, new_figure

_TOLERANCE = 0.03
# A curve of each kind, and how its kind is told.
_SCHEMATIC = (
    (0.015 * np.sin(3 * np.pi * ALPHAS), "within t of zero everywhere"),
    (-0.9 * ALPHAS * (1 - ALPHAS), "below −t, nowhere above t"),
    (0.18 * np.sin(2 * np.pi * ALPHAS), "above t here, below −t there"),
    (0.25 * np.exp(-(((ALPHAS - 0.5) / 0.11) ** 2)), "one peak, ≤ 0.5 wide at half height"),
    (ALPHAS * (1 - ALPHAS), "one peak, > 0.5 wide at half height"),
    (0.25 * np.sin(2 * np.pi * ALPHAS) ** 2, "peaks parted by a dip deeper than t"),
)


@look()
def draw_barrier_kinds() -> Figure:
    """Draw a schematic barrier curve of each kind that `classify_curve` tells apart, under the name it gives it.

    The grey band is the tolerance t, what counts as zero.
    """
    figure = new_figure(TEXT_WIDTH, 3.6)
    for axes, (curve, description) in zip(figure.subplots(2, 3).flat, _SCHEMATIC, strict=True):
        alpha_axis(axes)
        zero_line(axes)
        axes.axhspan(-_TOLERANCE, _TOLERANCE, color=PALE, linewidth=0, zorder=0)
        axes.plot(ALPHAS, curve, color=BLUE)
        axes.set_ylim(-0.3, 0.3)
        axes.set_yticks([-_TOLERANCE, _TOLERANCE], ["−t", "t"])
        heading(axes, classify_curve(ALPHAS, curve, tolerance=_TOLERANCE), description)
    figure.suptitle("schematic: curves drawn for each kind, not measured", x=0.01, ha="left", **SKETCH)
    label_panels(figure, ALPHA_LABEL, "barrier curve B(α)")
    return figure
