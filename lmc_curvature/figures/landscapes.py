"""Landscapes in closed form, where barriers and their prediction can be seen; and the kinds of barrier curves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator
from torch import Tensor

from lmc_curvature.barrier.kinds import CurveKind, classify_curve
from lmc_curvature.barrier.measurement import BarrierMeasurement, measure_barrier
from lmc_curvature.barrier.prediction import BarrierPrediction, predict_barrier
from lmc_curvature.figures.panels import (
    ALPHA_LABEL,
    ALPHAS,
    BARRIER_LABEL,
    alpha_axis,
    heading,
    plain_ticks,
    short_number,
    zero_line,
)
from lmc_curvature.landscapes import QuadraticProduct, landscape_loss, origin
from lmc_curvature.plotting.style import BLUE, GREEN, INK, PALE, TEXT_WIDTH, VERMILION, look, new_figure

_FAINT = LinearSegmentedColormap.from_list("faint", ["white", "#8a8a8a"])


class MinimaPair(NamedTuple):
    """Two minima of a toy, by their number, and the colour of the segment between them."""

    first: int
    second: int
    color: str


@dataclass(frozen=True)
class Toy:
    """A product of quadratics, and the segments between its minima to look at.

    Attributes:
        title: What the figure calls it.
        minima: (minima, d), with d of 1 or 2.
        hessian: Of each factor, (d, d).
        pairs: The segments. Two of one colour are mirror images.
    """

    title: str
    minima: Float[Tensor, "minima d"]
    hessian: Float[Tensor, "d d"]
    pairs: tuple[MinimaPair, ...]

    def at(self, position: Float[Tensor, " d"]) -> QuadraticProduct:
        """The landscape as a network that stands at a position."""
        return QuadraticProduct(self.minima, hessians=self.hessian.expand(len(self.minima), -1, -1), position=position)

    def losses(self, positions: Float[Tensor, "n d"]) -> Float[np.ndarray, " n"]:
        """The loss at many positions."""
        with torch.no_grad():
            # A landscape at the origin, shifted by −x, stands at x.
            return self.at(torch.zeros_like(positions[0]))(-positions.double()).numpy()

    def barriers(self, pair: MinimaPair) -> tuple[BarrierPrediction, BarrierMeasurement]:
        """Prediction and measurement between two of the minima."""
        networks = self.at(self.minima[pair.first]), self.at(self.minima[pair.second])
        loader = origin(self.minima.shape[1])
        return (
            predict_barrier(*networks, loader, loss_fn=landscape_loss, progress=False),
            measure_barrier(*networks, loader, loss_fn=landscape_loss, metrics=("loss",), alphas=101, progress=False),
        )


def toys() -> tuple[Toy, ...]:
    """The toys of `draw_toy_landscapes`."""
    line = torch.tensor([[-1.5], [-1.0], [1.0], [1.5]], dtype=torch.float64)
    square = torch.tensor([[-1, -1], [-1, 1], [1, -1], [1, 1]], dtype=torch.float64)
    one = torch.eye(1, dtype=torch.float64)
    flat = torch.diag(torch.tensor([1.0, 0.3], dtype=torch.float64))
    between, outer, within = BLUE, VERMILION, GREEN
    four = (MinimaPair(0, 1, within), MinimaPair(2, 3, within), MinimaPair(1, 2, between), MinimaPair(0, 3, outer))
    corners = (MinimaPair(0, 1, within), MinimaPair(0, 2, between), MinimaPair(0, 3, outer))
    return (
        Toy("minima at ±1", line[1:3], one, (MinimaPair(0, 1, between),)),
        Toy("minima at ±1 and ±1.5", line, one, four),
        Toy("minima at (±1, ±1)", square, flat, corners),
    )


@look()
def draw_toy_landscapes() -> Figure:
    """Draw the toy of Singh et al. 2024: landscapes with known minima, and the barriers between these.

    Above, products of quadratics in one and in two dimensions, with the segments between some minima. Below, the
    barrier curve of each segment, measured and by Proposition 1. The proposition sees the curvature at the minima
    only, and overestimates the ridge between two of them: fourfold in the first landscape.
    """
    figure = new_figure(TEXT_WIDTH, 4.7)
    grid = figure.add_gridspec(2, 3)
    for column, toy in enumerate(toys()):
        above, below = figure.add_subplot(grid[0, column]), figure.add_subplot(grid[1, column])
        barriers = [toy.barriers(pair) for pair in toy.pairs]
        highest = max(measurement.barrier() for _, measurement in barriers)
        if toy.minima.shape[1] == 1:
            _draw_line(above, toy, highest)
            heading(above, toy.title, "in one dimension")
        else:
            _draw_plane(above, toy)
            heading(above, toy.title, "in two dimensions")
        _draw_curves(below, [pair.color for pair in toy.pairs], barriers)
    solid, dashed = Line2D([], [], color=INK), Line2D([], [], color=INK, linestyle="--")
    figure.legend(
        [solid, dashed], ["barrier curve, measured", "barrier curve, Proposition 1"], loc="outside lower left", ncols=2
    )
    return figure


@look()
def draw_barrier_kinds() -> Figure:
    """Draw a schematic barrier curve of each kind that `classify_curve` tells apart, under the name it gives it.

    The grey band is the tolerance t, what counts as zero.
    """
    figure = new_figure(TEXT_WIDTH, 3.6)
    grid = figure.add_gridspec(2, 3)
    for number, curve in enumerate(_SCHEMATIC):
        axes = figure.add_subplot(grid[divmod(number, 3)])
        values = curve(ALPHAS)
        kind = classify_curve(ALPHAS, values, tolerance=_TOLERANCE)
        alpha_axis(axes)
        zero_line(axes)
        axes.axhspan(-_TOLERANCE, _TOLERANCE, color=PALE, linewidth=0, zorder=0)
        axes.plot(ALPHAS, values, color=BLUE)
        axes.set_ylim(-0.3, 0.3)
        axes.set_yticks([-_TOLERANCE, _TOLERANCE], ["−t", "t"])
        heading(axes, kind, _DESCRIPTIONS[kind])
    figure.supxlabel(ALPHA_LABEL, fontsize="medium")
    figure.supylabel("barrier curve B(α)", fontsize="medium")
    return figure


_TOLERANCE = 0.03
_SCHEMATIC: tuple[Callable[[Float[np.ndarray, " n"]], Float[np.ndarray, " n"]], ...] = (
    lambda a: 0.015 * np.sin(3 * np.pi * a),
    lambda a: -0.9 * a * (1 - a),
    lambda a: 0.18 * np.sin(2 * np.pi * a),
    lambda a: 0.25 * np.exp(-(((a - 0.5) / 0.11) ** 2)),
    lambda a: a * (1 - a),
    lambda a: 0.25 * np.sin(2 * np.pi * a) ** 2,
)
_DESCRIPTIONS: dict[CurveKind, str] = {
    "flat": "within t of zero everywhere",
    "convex": "below −t, nowhere above t",
    "mixed": "above t here, below −t there",
    "bump": "one peak, ≤ 0.5 wide at half height",
    "ridge": "one peak, > 0.5 wide at half height",
    "several peaks": "peaks parted by a dip deeper than t",
}


def _draw_line(axes: Axes, toy: Toy, highest: float) -> None:
    """The loss on a line, and under it the segments between minima."""
    minima = toy.minima[:, 0]
    places = torch.linspace(float(minima.min()) - 0.3, float(minima.max()) + 0.3, 401, dtype=torch.float64)
    axes.plot(places.numpy(), toy.losses(places[:, None]), color=INK)
    for pair in toy.pairs:
        # A segment over other minima passes below those between neighbours.
        level = -0.13 * highest * min(pair.second - pair.first, 2)
        ends = minima[[pair.first, pair.second]].numpy()
        axes.plot(ends, [level, level], color=pair.color, marker="|", markersize=5, label="_segment")
    axes.plot(minima.numpy(), np.zeros(len(minima)), "o", color=INK, markersize=4, label="_minima")
    axes.set(xlabel="θ", ylabel="loss", xticks=[-1, 0, 1], ylim=(-0.4 * highest, 1.5 * highest))
    plain_ticks(axes.yaxis)
    # Below zero there is no loss, only the segments.
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in axes.get_yticks() if tick >= 0]))


def _draw_plane(axes: Axes, toy: Toy) -> None:
    """The loss in the plane as filled contours, with the segments between minima."""
    side = torch.linspace(-1.7, 1.7, 171, dtype=torch.float64)
    x, y = torch.meshgrid(side, side, indexing="xy")
    losses = toy.losses(torch.stack([x.ravel(), y.ravel()], dim=1)).reshape(x.shape)
    levels = np.linspace(0, 0.45, 10)
    filled = axes.contourf(x.numpy(), y.numpy(), losses, levels=levels, cmap=_FAINT, extend="max")
    for pair in toy.pairs:
        axes.plot(*toy.minima[[pair.first, pair.second]].T.numpy(), color=pair.color, linewidth=2, label="_segment")
    axes.plot(*toy.minima.T.numpy(), "o", color=INK, markersize=4, label="_minima")
    axes.set(xlabel="first coordinate of θ", ylabel="second coordinate", xticks=[-1, 0, 1], yticks=[-1, 0, 1])
    axes.figure.colorbar(filled, ax=axes, label="loss", ticks=levels[::3])


def _draw_curves(
    axes: Axes, colors: Sequence[str], barriers: Sequence[tuple[BarrierPrediction, BarrierMeasurement]]
) -> None:
    """The measured and the predicted barrier curve of each segment, on a logarithmic scale."""
    for color, (prediction, measurement) in dict(zip(colors, barriers, strict=True)).items():
        label = f"{short_number(measurement.barrier())}, predicted {short_number(prediction.barrier())}"
        # The logarithm of the zeros at the ends is left out.
        inside = slice(1, -1)
        axes.plot(measurement.alphas[inside], measurement.curve()[inside], color=color, label=label)
        curve = prediction.curve(ALPHAS)
        axes.plot(ALPHAS[inside], curve[inside], color=color, linestyle="--", label="_Proposition 1")
    alpha_axis(axes)
    axes.set(xlabel=ALPHA_LABEL, ylabel=BARRIER_LABEL, yscale="log")
    axes.set_ylim(bottom=min(measurement.barrier() for _, measurement in barriers) / 10)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.legend(loc="lower left", bbox_to_anchor=(-0.03, 1.0), borderaxespad=0)
