"""The sketch of forks on a mountainside: early siblings are parted by a wide high ridge, late ones by a low one."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.colors import LightSource, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from mpl_toolkits.mplot3d import Axes3D

from lmc_curvature.plotting.axes import heading
from lmc_curvature.plotting.style import BLUE, GREY, INK, SKETCH, SMALL, TEXT_WIDTH, VERMILION, look, new_figure

Numbers = Float64[np.ndarray, "..."]

_SLOPE = LinearSegmentedColormap.from_list("slope", ["#dfe8dc", "#efe9dc", "#d9cbb8", "#f4f2ee"])
# The ground where the name of the ridge stands.
_CREST = "#f4f1e8"
# Training ends just above the foot of the mountain.
_END = 0.97
# Paths are drawn this far above the ground, or it would swallow them.
_LIFT = 0.004
_POINT: dict[str, Any] = {"marker": "o", "markersize": 4.5, "markeredgecolor": "white", "zorder": 6}


@dataclass(frozen=True)
class Ridge:
    """A ridge that runs straight down the mountain.

    Attributes:
        across: The position of its crest.
        start: The position down the mountain at which it begins.
        length: The way down over which it grows to its full height.
        width: Standard deviation of its cross-section, times √2.
        height: The full height above the ground beside it.
    """

    across: float
    start: float
    length: float
    width: float
    height: float

    def above_ground(self, across: Numbers, down: Numbers) -> Numbers:
        """The height by which it raises the ground."""
        crest = self.height * _smooth_step((down - self.start) / self.length)
        return crest * np.exp(-(((across - self.across) / self.width) ** 2))


@dataclass(frozen=True)
class Path:
    """A way down, which bends once to another line of descent.

    Attributes:
        start: Across and down.
        across: The line of descent in which it ends.
        over: The way down that the bend takes.
        straight: The way down before the bend.
        end: The position down the mountain at which it ends.
    """

    start: tuple[float, float]
    across: float
    over: float
    straight: float = 0.0
    end: float = _END

    def points(self) -> tuple[Numbers, Numbers]:
        """Positions across and down, (200,) each."""
        down = np.linspace(self.start[1], self.end, 200)
        turn = _smooth_step((down - self.start[1] - self.straight) / self.over)
        return self.start[0] + (self.across - self.start[0]) * turn, down


def _smooth_step(x: Numbers) -> Numbers:
    x = np.clip(x, 0.0, 1.0)
    return x**2 * (3 - 2 * x)


EARLY_FORK, LATE_FORK = (-0.33, 0.13), (0.64, 0.57)
# Each begins just below a fork, but for the one in the middle.
RIDGES = (
    Ridge(across=-0.33, start=0.16, length=0.50, width=0.20, height=0.36),
    Ridge(across=0.34, start=0.42, length=0.40, width=0.09, height=0.18),
    Ridge(across=0.64, start=0.60, length=0.35, width=0.05, height=0.08),
)
PARENT = Path((-0.33, 0.02), across=0.64, over=0.25, straight=0.11, end=0.57)
EARLY_SIBLINGS = Path(EARLY_FORK, across=-0.75, over=0.45), Path(EARLY_FORK, across=0.09, over=0.45)
LATE_SIBLINGS = Path(LATE_FORK, across=0.53, over=0.25), Path(LATE_FORK, across=0.75, over=0.25)
_PAIRS = ((EARLY_SIBLINGS, VERMILION, "early"), (LATE_SIBLINGS, BLUE, "late"))


def height(across: Numbers, down: Numbers) -> Numbers:
    """The mountainside: the loss at a position across, in [−1, 1], and down, from 0 at the top to 1 at the foot."""
    return (1 - down) ** 2 + sum(ridge.above_ground(across, down) for ridge in RIDGES)


def between(siblings: tuple[Path, Path], points: int = 301) -> tuple[Numbers, Numbers]:
    """The way from the middle of the segment between two siblings, and the height above its chord, (points,) each."""
    first, second = (np.array(path.points())[:, -1] for path in siblings)
    alphas = np.linspace(0, 1, points)
    across, down = np.outer(1 - alphas, first).T + np.outer(alphas, second).T
    heights = height(across, down)
    chord = (1 - alphas) * heights[0] + alphas * heights[-1]
    return (alphas - 0.5) * float(np.linalg.norm(second - first)), heights - chord


@look()
def draw_mountainside() -> Figure:
    """Draw the sketch of Singh et al. 2024, Figure 3: forks on a mountainside, and the ridges between siblings.

    A parent comes down a mountainside from which ridges stand out, some from high up, some from low down. Siblings that
    leave it early come down on either side of a ridge that begins high, and is wide and high where they end. Those that
    leave it late are close to each other, with a low narrow ridge between them. Beside the mountain stand both ridges,
    as they are met along the segments between the siblings. The mountain is a formula, not the loss of a network.
    """
    figure = new_figure(TEXT_WIDTH, 3.65)
    figure.suptitle("sketch: the mountain is a formula, not the loss of a network", x=0.01, ha="left", **SKETCH)
    grid = figure.add_gridspec(1, 2, width_ratios=[2.5, 1])
    mountain = figure.add_subplot(grid[0, 0], projection="3d")
    _draw_mountain(mountain)
    _draw_paths(mountain)
    _draw_labels(mountain)
    _draw_ridges(figure.add_subplot(grid[0, 1]))
    return figure


def _draw_mountain(axes: Axes3D) -> None:
    """The ground with level curves, seen from below the foot; the loss falls towards the reader."""
    across, down = np.meshgrid(np.linspace(-1, 1, 241), np.linspace(0, 1, 161))
    ground = height(across, down)
    # The sun stands in the upper left, so that every ridge has a dark right side.
    colors = LightSource(azdeg=300, altdeg=42).shade(
        ground, cmap=_SLOPE, vert_exag=90, blend_mode="soft", dx=1.0, dy=1.0, vmin=0, vmax=1
    )
    axes.computed_zorder = False
    surface: dict[str, Any] = {"rstride": 1, "cstride": 1, "linewidth": 0, "antialiased": False, "shade": False}
    # As outlines, its 38 400 facets would make a file of many megabytes.
    axes.plot_surface(across, 1 - down, ground, facecolors=colors, zorder=1, rasterized=True, **surface)
    levels = np.linspace(0.02, 0.98, 17) ** 1.5
    axes.contour(across, 1 - down, ground, levels=levels, colors=GREY, linewidths=0.35, alpha=0.6, zorder=2)
    axes.set(xlim=(-1, 1), ylim=(0, 1), zlim=(0, 1))
    # matplotlib takes any number, and says that it takes whole ones.
    zoom: Any = 1.45
    axes.set_box_aspect((2, 1.35, 0.85), zoom=zoom)
    axes.view_init(elev=36, azim=-84)
    axes.set_axis_off()


def _draw_paths(axes: Axes3D) -> None:
    _draw_on_ground(axes, *PARENT.points(), "parent", color=INK, linewidth=1.8)
    for siblings, color, name in _PAIRS:
        for number, path in enumerate(siblings, start=1):
            across, down = path.points()
            _draw_on_ground(axes, across, down, f"{name} sibling {number}", color=color, linewidth=1.8)
            _draw_on_ground(axes, across[-1:], down[-1:], "_end", color=color, **_POINT)
        # The segment is drawn where it runs: over the ground, whose height it meets.
        across, down = np.linspace(siblings[0].across, siblings[1].across, 101), np.full(101, _END)
        _draw_on_ground(axes, across, down, f"{name} segment", color=color, linestyle=(0, (2, 1.2)))
    for across, down in np.array([EARLY_FORK, LATE_FORK])[..., None]:
        _draw_on_ground(axes, across, down, "_fork", color=INK, **_POINT)


def _draw_on_ground(axes: Axes3D, across: Numbers, down: Numbers, label: str, **style: Any) -> None:
    axes.plot(across, 1 - down, height(across, down) + _LIFT, label=label, **{"zorder": 5, **style})


def _draw_labels(axes: Axes3D) -> None:
    """Names, each in the colour of what it names."""
    # The level curves run behind it.
    halo = {"ha": "center", "va": "bottom", "path_effects": [withStroke(linewidth=2.5, foreground=_CREST)]}
    labels: tuple[tuple[str, float, float, float, str, dict[str, Any]], ...] = (
        ("parent", -0.36, 0.04, 0.0, INK, {"ha": "right"}),
        ("early fork", -0.40, 0.13, 0.0, INK, {"ha": "right", "va": "center"}),
        ("late fork", 0.69, 0.56, 0.02, INK, {}),
        ("early siblings", -0.80, _END, 0.0, VERMILION, {"ha": "right", "va": "center"}),
        ("late siblings", 0.80, _END, 0.0, BLUE, {"va": "center"}),
        ("ridge", -0.33, 0.62, 0.0, GREY, halo),
    )
    for text, across, down, above, color, place in labels:
        ground = float(height(np.array([across]), np.array([down]))[0])
        axes.text(across, 1 - down, ground + above, text, color=color, zorder=9, fontsize=SMALL + 1, **place)


def _draw_ridges(axes: Axes) -> None:
    """The height along both segments above their chords, on one scale."""
    for siblings, color, name in _PAIRS:
        way, barrier = between(siblings)
        axes.fill_between(way, 0, barrier, color=color, alpha=0.15, linewidth=0)
        axes.plot(way, barrier, color=color, label=name)
        axes.plot(way[[0, -1]], barrier[[0, -1]], "o", color=color, markersize=4, label=f"_{name} siblings")
    (early_way, early), (_, late) = between(EARLY_SIBLINGS), between(LATE_SIBLINGS)
    axes.text(0, 1.03 * early.max(), "early fork:\nwide, high ridge", color=VERMILION, ha="center", va="bottom")
    # There is room for it within the other, where a leader from outside would cross that.
    axes.text(0, late.max() + 0.02 * early.max(), "late fork:\nlow ridge", color=BLUE, ha="center", va="bottom")
    axes.set(xlim=1.12 * early_way[[0, -1]], ylim=(-0.02, 1.3 * early.max()), xticks=[], yticks=[])
    axes.set(xlabel="way along the segment", ylabel="loss above the chord")
    heading(axes, "between the siblings", "")
