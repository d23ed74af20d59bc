"""Draw the pictures of the pages on concepts, each from a computation on siblings that are trained first.

python scripts/site_pictures.py [cube.png …]    # a minute or two on two cores; writes docs/pictures/
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from lmc_curvature import LayerPartition, measure_barrier, predict_barrier
from lmc_curvature.barrier.drawing import (
    ALPHA_LABEL,
    ALPHAS,
    ANCHOR,
    EXPANSION_PENS,
    alpha_axis,
)
from lmc_curvature.figures.files import write_figure
from lmc_curvature.forking import TrainingConfig, train
from lmc_curvature.plotting.axes import heading, plain_ticks, zero_line
from lmc_curvature.plotting.style import (
    BLUE,
    COLUMN_WIDTH,
    GREEN,
    GREY,
    INK,
    PALE,
    SMALL,
    TEXT_WIDTH,
    VERMILION,
    look,
    new_figure,
    sequential_colors,
)
from lmc_curvature.sources import Batches, ImageDataset, digits_resnet, load_digits

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"
LOSS_LABEL = "loss (nats)"
_MEASURED = {"color": INK, "marker": "o", "markersize": 3, "linewidth": 1}


@dataclass(frozen=True)
class Siblings:
    """Two networks that were forked from one parent, and the data they were trained on."""

    a: nn.Module
    b: nn.Module
    digits: ImageDataset

    @property
    def loader(self) -> Batches:
        """The training images, in batches of about 180."""
        return self.digits.batches(180)


def train_siblings() -> Siblings:
    """Two children of a parent of one epoch, trained for nine more."""
    torch.manual_seed(0)
    digits, parent = load_digits(), digits_resnet(width=4)
    train(
        parent,
        digits,
        TrainingConfig(epochs=1, learning_rate=0.3, batch_size=32),
        order_seed=9,
    )
    children = [copy.deepcopy(parent) for _ in range(2)]
    schedule = TrainingConfig(epochs=9, learning_rate=0.3, milestones=(7,), weight_decay=0.001, batch_size=32)
    for order_seed, child in enumerate(children):
        train(child, digits, schedule, order_seed=order_seed)
    return Siblings(*children, digits)


def draw_prediction(siblings: Siblings) -> Figure:
    """The barrier curve: by three anchors, by the two ends alone, and measured."""
    prediction = predict_barrier(siblings.a, siblings.b, siblings.loader)
    measurement = measure_barrier(siblings.a, siblings.b, siblings.loader, alphas=21)
    figure = new_figure(TEXT_WIDTH * 0.75, 2.6)
    axes = figure.add_subplot()
    alpha_axis(axes)
    zero_line(axes)
    for expansion, label in (
        ("second-order", "predicted from the two ends alone"),
        ("anchored", "from three anchors"),
    ):
        axes.plot(
            ALPHAS,
            prediction.curve(ALPHAS, None, expansion),
            label=label,
            **EXPANSION_PENS[expansion].style,
        )
    alphas = [anchor.alpha for anchor in prediction.anchors]
    axes.plot(
        alphas,
        prediction.curve(alphas),
        color=EXPANSION_PENS["anchored"].color,
        label="anchors",
        **ANCHOR,
    )
    axes.plot(
        measurement.alphas,
        measurement.curve(),
        label="measured",
        **{**_MEASURED, "linestyle": "none"},
    )
    axes.set(xlabel=ALPHA_LABEL, ylabel="loss above the chord (nats)")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_cube(siblings: Siblings) -> Figure:
    """The loss over a cube of two layers: measured, and predicted from three anchors on its diagonal."""
    halves = {
        "first half": [r"^conv", r"^norm", r"^stage1", r"^stage2"],
        "second half": [".*"],
    }
    side = np.linspace(0, 1, 17)
    grid = np.array([(x, y) for y in side for x in side])
    prediction = predict_barrier(siblings.a, siblings.b, siblings.loader, layers=halves)
    points = [dict(zip(prediction.layers, map(float, each), strict=True)) for each in grid]
    measurement = measure_barrier(siblings.a, siblings.b, siblings.loader, layers=halves, points=points, alphas=3)
    measured = measurement.rises() + np.mean(measurement.ends())
    figure = new_figure(TEXT_WIDTH, 3.7)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    levels = np.linspace(0, measured.max(), 11)
    for axes, title, detail, losses in (
        (panels[0], "measured", f"{len(grid)} networks evaluated", measured),
        (
            panels[1],
            "predicted",
            "from what is known at the three anchors",
            prediction.loss_at(grid),
        ),
    ):
        shown = axes.contourf(
            side,
            side,
            np.clip(losses, 0, None).reshape(17, 17),
            levels,
            cmap="cividis",
            extend="max",
        )
        _draw_ways(axes)
        heading(axes, title, detail)
        axes.set_xlabel("x₁: how far the first half has moved")
    panels[0].set_ylabel("x₂: how far the second half has moved")
    bar = figure.colorbar(shown, ax=panels, label=LOSS_LABEL, shrink=0.85)
    plain_ticks(bar.ax.yaxis)
    return figure


def _draw_ways(axes: Axes) -> None:
    """The diagonal with its anchors, and the edges along which the first half alone moves."""
    axes.set_aspect("equal")
    axes.plot([0, 1], [0, 1], color="white", linewidth=1)
    axes.plot([0, 0.5, 1], [0, 0.5, 1], color=BLUE, clip_on=False, zorder=3, **ANCHOR)
    for ends in ([0, 0.5], [1, 0.5]):
        height = ends[0]
        axes.annotate(
            "",
            (0.5, height),
            (ends[0], height),
            arrowprops={"color": VERMILION, "arrowstyle": "->", "lw": 1.6},
        )
    for x, y, text, across in ((0.03, 0.06, "A", "left"), (0.97, 0.9, "B", "right")):
        axes.text(x, y, text, color="white", fontsize=11, weight="bold", ha=across)
    axes.set_xticks([0, 0.5, 1], ["0", "½", "1"])
    axes.set_yticks([0, 0.5, 1], ["0", "½", "1"])


def draw_barrier(siblings: Siblings) -> Figure:
    """What a barrier is: the loss along the segment, the chord, and the way up from one to the other."""
    measurement = measure_barrier(siblings.a, siblings.b, siblings.loader, alphas=21)
    values, ends = measurement.values(), measurement.ends()
    chord = np.interp(measurement.alphas, [0, 1], ends)
    top = int(measurement.curve().argmax())
    figure = new_figure(COLUMN_WIDTH * 1.3, 2.4)
    axes = figure.add_subplot()
    alpha_axis(axes)
    axes.plot(measurement.alphas, values, **_MEASURED)
    axes.plot([0, 1], ends, color=GREY, linestyle="--", linewidth=1)
    at = measurement.alphas[top]
    axes.annotate(
        "",
        (at, values[top]),
        (at, chord[top]),
        arrowprops={"color": VERMILION, "arrowstyle": "<->", "lw": 1.4},
    )
    axes.text(at + 0.02, (values[top] + chord[top]) / 2, "barrier", color=VERMILION)
    axes.annotate("L(θ(α))", (0.25, values[5]), (-8, 8), textcoords="offset points", ha="right")
    axes.annotate("chord", (0.15, chord[3]), (0, 5), textcoords="offset points", color=GREY)
    axes.set(xlabel=ALPHA_LABEL, ylabel=LOSS_LABEL)
    return figure


def draw_layers(siblings: Siblings) -> Figure:
    """Which entries of a residual network belong to which layer, by four rules."""
    rules = {
        "fused": "fused",
        "module": "module",
        "block:2": "block:2",
        "own": {"early": ["^conv", "^norm", "stage1"], "late": [".*"]},
    }
    network = digits_resnet(width=4)
    entries = [name for name, _ in network.named_parameters() if "stage3" not in name]
    figure = new_figure(TEXT_WIDTH, 4.3)
    axes = figure.add_subplot()
    for column, (title, rule) in enumerate(rules.items()):
        partition = LayerPartition.of(network, rule)
        owners = [partition.layer_of(entry) for entry in entries]
        shades = {layer: (BLUE, PALE, GREEN)[number % 3] for number, layer in enumerate(dict.fromkeys(owners))}
        for row, owner in enumerate(owners):
            axes.barh(
                row,
                0.9,
                left=column,
                height=1.02,
                color=shades[owner],
                alpha=0.75 if shades[owner] != PALE else 1,
            )
        for layer in dict.fromkeys(owners):
            rows = [row for row, owner in enumerate(owners) if owner == layer]
            axes.text(
                column + 0.45,
                np.mean(rows),
                layer,
                ha="center",
                va="center",
                fontsize=SMALL,
            )
        axes.text(column + 0.45, -1, title, ha="center", va="center", weight="bold")
    axes.set_ylim(len(entries) - 0.4, -1.6)
    axes.set_yticks(range(len(entries)), entries, fontsize=SMALL)
    axes.set_xticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    return figure


def draw_batch_norm(siblings: Siblings) -> Figure:
    """The loss along the segment by three policies for batch normalisation."""
    figure = new_figure(COLUMN_WIDTH * 1.5, 2.5)
    axes = figure.add_subplot()
    alpha_axis(axes)
    names = {
        "interpolate": "interpolate: running statistics move along",
        "batch": "batch: statistics of the batch at hand",
        "recalibrate": "recalibrate: estimated anew at every α",
    }
    for (policy, label), style, color in zip(names.items(), ("-", "--", ":"), (BLUE, VERMILION, GREEN), strict=True):
        found = measure_barrier(siblings.a, siblings.b, siblings.loader, alphas=21, batch_norm=policy)
        axes.plot(found.alphas, found.values(), linestyle=style, color=color, label=label)
    axes.set(xlabel=ALPHA_LABEL, ylabel=LOSS_LABEL)
    figure.legend(loc="outside lower left")
    return figure


def draw_anchors(siblings: Siblings) -> Figure:
    """The predicted curve of the whole network by two, three and five anchors, beside what is measured."""
    measurement = measure_barrier(siblings.a, siblings.b, siblings.loader, alphas=21)
    figure = new_figure(TEXT_WIDTH, 2.5)
    panels = figure.subplots(1, 3, sharey=True)
    for axes, count in zip(panels, (2, 3, 5), strict=True):
        prediction = predict_barrier(siblings.a, siblings.b, siblings.loader, anchors=count)
        alpha_axis(axes)
        zero_line(axes)
        axes.plot(
            measurement.alphas,
            measurement.curve(),
            label="measured",
            **{**_MEASURED, "linestyle": "none"},
        )
        axes.plot(ALPHAS, prediction.curve(ALPHAS), color=BLUE, label="predicted")
        alphas = [anchor.alpha for anchor in prediction.anchors]
        axes.plot(
            alphas,
            prediction.curve(alphas),
            color=BLUE,
            label="anchors",
            clip_on=False,
            **ANCHOR,
        )
        heading(axes, f"{count} anchors", "second order" if count == 2 else "anchored")
    panels[1].set_xlabel(ALPHA_LABEL)
    panels[0].set_ylabel("loss above the chord (nats)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=3)
    return figure


def draw_errors(siblings: Siblings) -> Figure:
    """Predicted against measured barriers of random sets of layers, with the two errors of each."""
    loader = siblings.loader
    prediction = predict_barrier(siblings.a, siblings.b, loader)
    generator = np.random.default_rng(0)
    members = generator.random((40, len(prediction.layers))) < generator.uniform(0.2, 0.8, (40, 1))
    sets = [[name for name, chosen in zip(prediction.layers, row, strict=True) if chosen] for row in members]
    sets = [each for each in sets if 1 < len(each) < len(prediction.layers)]
    measured = measure_barrier(siblings.a, siblings.b, loader, sets=sets, alphas=[0, 0.5, 1]).layer_curves()[:, 1]
    predicted, expansion = (
        prediction.set_barriers(sets),
        prediction.set_expansion_errors(sets),
    )
    sampling = [prediction.standard_error(each, alpha=0.5) for each in sets]
    figure = new_figure(COLUMN_WIDTH * 1.3, 3.6)
    axes = figure.add_subplot()
    top = 1.1 * max(measured.max(), predicted.max())
    axes.plot([0, top], [0, top], color=GREY, linewidth=0.8, label="predicted = measured")
    axes.errorbar(
        measured,
        predicted,
        expansion,
        fmt="none",
        ecolor=BLUE,
        alpha=0.3,
        elinewidth=3,
        label="± expansion error",
    )
    axes.errorbar(
        measured,
        predicted,
        sampling,
        fmt="o",
        color=INK,
        markersize=3,
        elinewidth=1,
        label="± sampling error",
    )
    plain_ticks(axes.xaxis)
    plain_ticks(axes.yaxis)
    axes.set(xlabel="measured at α = ½ (nats)", ylabel="predicted (nats)")
    figure.legend(loc="outside lower left", ncols=2)
    return figure


def draw_sweep(siblings: Siblings) -> Figure:
    """Which directions have reached which layer, and the matrix that comes of them."""
    prediction = predict_barrier(siblings.a, siblings.b, siblings.loader)
    layers, matrix = prediction.layers, prediction.interactions
    figure = new_figure(TEXT_WIDTH, 2.9)
    stacks, energies = figure.subplots(1, 2, width_ratios=[1.25, 1])
    colors = list(sequential_colors(range(len(layers))).values())
    for row in range(len(layers)):
        stacks.barh(row, len(layers) - row, left=row, height=0.75, color=colors[row])
    stacks.set_ylim(len(layers) - 0.5, -0.5)
    stacks.set_yticks(range(len(layers)), layers, fontsize=SMALL)
    stacks.set_xticks([])
    stacks.set_xlabel("from the input to the loss →")
    heading(stacks, "tangents", "a direction joins where its layer is")
    extent = np.abs(matrix).max()
    shown = energies.imshow(matrix, cmap="PuOr", vmin=-extent, vmax=extent)
    energies.set_xticks([])
    energies.set_yticks([])
    heading(energies, "UᵀHU / 8", "layer by layer, at A")
    bar = figure.colorbar(shown, ax=energies, shrink=0.8)
    plain_ticks(bar.ax.yaxis)
    return figure


PICTURES: dict[str, Callable[[Siblings], Figure]] = {
    "prediction.svg": draw_prediction,
    "cube.png": draw_cube,
    "barrier.svg": draw_barrier,
    "layers.svg": draw_layers,
    "batch-norm.svg": draw_batch_norm,
    "anchors.svg": draw_anchors,
    "errors.svg": draw_errors,
    "sweep.svg": draw_sweep,
}


def main() -> None:
    """Train, and draw every picture, or those that were named."""
    siblings = train_siblings()
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or PICTURES:
        with look():
            figure = PICTURES[name](siblings)
        write_figure(figure, FOLDER / name)
        print(FOLDER / name)


if __name__ == "__main__":
    main()
