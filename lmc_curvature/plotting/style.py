"""The common look of the figures: sizes, colours, pens and matplotlib's settings."""

import contextlib
import io
import threading
from collections.abc import Iterable, Iterator, Mapping
from itertools import cycle
from typing import Any, NamedTuple, TypeVar

import matplotlib as mpl
from matplotlib import style
from matplotlib.figure import Figure

Color = tuple[float, float, float, float]
Name = TypeVar("Name")

# Inches: the text and a column of a two-column page.
TEXT_WIDTH = 6.75
COLUMN_WIDTH = 3.3

SMALL = 7.0
PALE = "#e6e6e6"
GREY = "#777777"
INK = "#222222"
# How a figure says that it is drawn by hand or by a formula, and holds nothing that was measured.
SKETCH: dict[str, Any] = {"fontsize": 8.0, "color": GREY, "style": "italic"}
# The end of the colours of sequences, as a share of their map.
_LIGHTEST = 0.62
# Hues of Okabe and Ito, told apart with every common colour blindness.
_HUES = BLUE, VERMILION, GREEN, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"

# As matplotlib writes it: a name, or where it begins and the lengths of strokes and gaps.
LineStyle = str | tuple[float, tuple[float, ...]]
_STYLES: tuple[LineStyle, ...] = ("-", "--", "-.", ":", (0.0, (7, 1.5, 1, 1.5, 1, 1.5)))


class Pen(NamedTuple):
    """A kind of curve: its name in the legend, its colour, and its line style."""

    label: str
    color: str | Color
    linestyle: LineStyle

    @property
    def style(self) -> dict[str, Any]:
        """Colour and line style as options of matplotlib."""
        return {"color": self.color, "linestyle": self.linestyle}


_LOOK = {
    **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize"), 8.0),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), SMALL),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), GREY),
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **{f"axes3d.{name}axis.panecolor": (1, 1, 1, 0) for name in "xyz"},
    "grid.color": PALE,
    "grid.linewidth": 0.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "legend.columnspacing": 1.5,
    "lines.linewidth": 1.4,
    "hatch.linewidth": 0.5,
    # Letters stay letters in the PDF: they can be searched, and journals ask for it.
    "pdf.fonttype": 42,
}

# matplotlib's settings are global: two threads inside `look` at once would restore each other's.
_LOCK = threading.RLock()


class NotebookFigure(Figure):
    """A figure that notebooks show when it is the value of a cell, without pyplot."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        with look():
            self.savefig(file, format="png", dpi=150)
        return file.getvalue()


@contextlib.contextmanager
def look() -> Iterator[None]:
    """The common look, while the block or the decorated function runs; the caller's settings come back after it."""
    with _LOCK, style.context(_LOOK, after_reset=True):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure with constrained layout, of a size in inches. pyplot does not know of it."""
    return NotebookFigure(figsize=(width, height), layout="constrained")


def sequential_color(share: float) -> Color:
    """The colour at a share of the way from dark to light, in the darker part of the map plasma.

    The lightest has a contrast of over 3 : 1 with white, as guidelines ask of lines (WCAG 2.1, 1.4.11).
    """
    return mpl.colormaps["plasma"](_LIGHTEST * share)


def sequential_colors(names: Iterable[Name]) -> dict[Name, Color]:
    """A colour a name, from dark for the first to light for the last, each legible on white."""
    names = list(names)
    steps = max(len(names) - 1, 1)
    return {name: sequential_color(number / steps) for number, name in enumerate(names)}


def pens(labels: Mapping[Name, str]) -> dict[Name, Pen]:
    """A pen for each kind of curve, from its name in the legend; line styles tell up to five apart in grey."""
    colors = _HUES if len(labels) <= len(_HUES) else sequential_colors(labels).values()
    styled = zip(labels, colors, cycle(_STYLES), strict=False)
    return {name: Pen(labels[name], color, style) for name, color, style in styled}
