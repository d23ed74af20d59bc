"""Landscapes in closed form, where barriers and their prediction can be seen."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from torch import Tensor

from lmc_curvature.barrier.drawing import ALPHA_LABEL, ALPHAS, alpha_axis
from lmc_curvature.barrier.measure import measure_barrier
from lmc_curvature.barrier.measurement import BarrierMeasurement
from lmc_curvature.barrier.predict import predict_barrier
from lmc_curvature.barrier.prediction import BarrierPrediction
from lmc_curvature.landscapes import QuadraticProduct, landscape_loss, origin
from lmc_curvature.plotting.axes import heading, legend_line, plain_ticks
from lmc_curvature.plotting.style import BLUE, GREEN, INK, SMALL, TEXT_WIDTH, VERMILION, look, new_figure
from lmc_curvature.plotting.text import short_number

# The proposition knows the two minima alone.
_PROPOSITION = "second-order"
_ANCHORED: dict[str, Any] = {"linestyle": ":", "linewidth": 2.2}
_FAINT = LinearSegmentedColormap.from_list("faint", ["white", "#8a8a8a"])


@dataclass(frozen=True)
class Toy:
    """A product of quadratics, and the segments between its minima to look at.

    Attributes:
        title: Its title in the figure.
        minima: (minima, d), with d of 1 or 2.
        hessian: The Hessian of each factor, (d, d).
        segments: The numbers of two minima, and a colour, for each segment. Two of one colour are mirror images.
    """

    title: str
    minima: Float[Tensor, "minima d"]
    hessian: Float[Tensor, "d d"]
    segments: tuple[tuple[int, int, str], ...]

    def at(self, position: Float[Tensor, " d"]) -> QuadraticProduct:
        """The landscape as a network that stands at a position."""
        return QuadraticProduct(self.minima, hessians=self.hessian.expand(len(self.minima), -1, -1), position=position)

    def losses(self, positions: Float[Tensor, "n d"]) -> Float[np.ndarray, " n"]:
        """The loss at many positions."""
        with torch.no_grad():
            # A landscape at the origin, shifted by −x, stands at x.
            return self.at(torch.zeros_like(positions[0]))(-positions.double()).numpy()

    def barriers(self, first: int, second: int) -> tuple[BarrierPrediction, BarrierMeasurement]:
        """Prediction and measurement between two of the minima."""
        networks = self.at(self.minima[first]), self.at(self.minima[second])
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
    four = ((0, 1, within), (2, 3, within), (1, 2, between), (0, 3, outer))
    corners = ((0, 1, within), (0, 2, between), (0, 3, outer))
    return (
        Toy("minima at ±1", line[1:3], one, ((0, 1, between),)),
        Toy("minima at ±1 and ±1.5", line, one, four),
        Toy("minima at (±1, ±1)", square, flat, corners),
    )


@look()
def draw_toy_landscapes() -> Figure:
    """Draw the toy of Singh et al. 2024: landscapes with known minima, and the barriers between these.

    Above, products of quadratics in one and in two dimensions, with the segments between some minima. Below, the
    barrier curve of each segment, measured, by Proposition 1 (second order), and anchored. The proposition sees the
    curvature at the minima only, and overestimates the ridge between two of them: fourfold in the first landscape.
    An anchor in the middle sees the ridge.
    """
    figure = new_figure(TEXT_WIDTH, 4.7)
    for column, toy in enumerate(toys()):
        above, below = (figure.add_subplot(2, 3, row * 3 + column + 1) for row in (0, 1))
        barriers = {color: toy.barriers(first, second) for first, second, color in toy.segments}
        if toy.minima.shape[1] == 1:
            _draw_line(above, toy, max(measurement.barrier() for _, measurement in barriers.values()))
        else:
            _draw_plane(above, toy)
        heading(above, toy.title, "in one dimension" if toy.minima.shape[1] == 1 else "in two dimensions")
        _draw_curves(below, barriers)
    solid = legend_line("barrier curve, measured", color=INK)
    dashed = legend_line("barrier curve, Proposition 1 (second order)", color=INK, linestyle="--")
    dotted = legend_line("barrier curve, anchored", color=INK, **_ANCHORED)
    figure.legend(handles=[solid, dashed, dotted], loc="outside lower left", ncols=3)
    return figure


def _draw_line(axes: Axes, toy: Toy, highest: float) -> None:
    """The loss on a line, and under it the segments between minima."""
    minima = toy.minima[:, 0]
    places = torch.linspace(float(minima.min()) - 0.3, float(minima.max()) + 0.3, 401, dtype=torch.float64)
    axes.plot(places.numpy(), toy.losses(places[:, None]), color=INK)
    for first, second, color in toy.segments:
        # A segment over other minima passes below those between neighbours.
        level = -0.13 * highest * min(second - first, 2)
        axes.plot(minima[[first, second]].numpy(), [level] * 2, color=color, marker="|", markersize=5, label="_segment")
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
    filled = axes.contourf(side.numpy(), side.numpy(), losses, levels=levels, cmap=_FAINT, extend="max")
    for first, second, color in toy.segments:
        axes.plot(*toy.minima[[first, second]].T.numpy(), color=color, linewidth=2, label="_segment")
    axes.plot(*toy.minima.T.numpy(), "o", color=INK, markersize=4, label="_minima")
    axes.set(xlabel="first coordinate of θ", ylabel="second coordinate", xticks=[-1, 0, 1], yticks=[-1, 0, 1])
    axes.figure.colorbar(filled, ax=axes, label="loss", ticks=levels[::3])


def _draw_curves(axes: Axes, barriers: Mapping[str, tuple[BarrierPrediction, BarrierMeasurement]]) -> None:
    """The measured and the predicted barrier curve of each segment, on a logarithmic scale."""
    for color, (prediction, measurement) in barriers.items():
        expected = [short_number(prediction.barrier(None, expansion)) for expansion in (_PROPOSITION, "anchored")]
        label = f"{short_number(measurement.barrier())}; {expected[0]}; {expected[1]}"
        # The logarithm of the zeros at the ends is left out.
        inside = slice(1, -1)
        axes.plot(measurement.alphas[inside], measurement.curve()[inside], color=color, label=label)
        proposed, anchored = (prediction.curve(ALPHAS[inside], None, each) for each in (_PROPOSITION, "anchored"))
        axes.plot(ALPHAS[inside], proposed, color=color, linestyle="--", label="_Proposition 1")
        axes.plot(ALPHAS[inside], anchored, color=color, label="_anchored", **_ANCHORED)
    alpha_axis(axes)
    axes.set(xlabel=ALPHA_LABEL, ylabel="barrier\n(units of the loss, log scale)", yscale="log")
    axes.set_ylim(bottom=min(measurement.barrier() for _, measurement in barriers.values()) / 10)
    axes.yaxis.set_minor_locator(NullLocator())
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.03, 1.0), "alignment": "left"}
    axes.legend(title="measured; Prop. 1; anchored", title_fontsize=SMALL, borderaxespad=0, **place)
