"""The common look of the figures, and how they are written to files."""

import contextlib
import io
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib as mpl
from matplotlib import style
from matplotlib.figure import Figure

from lmc_curvature.barrier.expansions import Expansion
from lmc_curvature.storage import write_atomically

# Inches: the text and a column of a two-column page.
TEXT_WIDTH = 6.75
COLUMN_WIDTH = 3.3

SMALL = 7.0
PALE = "#e6e6e6"
GREY = "#777777"
INK = "#222222"
# Hues of Okabe and Ito, told apart with every common colour blindness.
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"


class Pen(NamedTuple):
    """Colour and line style of one kind of curve, and what the legend calls it."""

    label: str
    color: str
    linestyle: Literal["-", "--", "-.", ":"]


# Line styles tell the expansions apart in grey.
EXPANSION_PENS: dict[Expansion, Pen] = {
    "second-order": Pen("second order", BLUE, "-"),
    "with-slopes": Pen("with slopes", VERMILION, "--"),
    "shared-hessian": Pen("shared Hessian", GREEN, "-."),
    "hermite": Pen("Hermite", PURPLE, ":"),
}

_LOOK = {
    "font.size": 8.0,
    "axes.titlesize": 8.0,
    "axes.labelsize": 8.0,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "axes.labelcolor": INK,
    "legend.fontsize": SMALL,
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


def fork_colors(forks: Iterable[int | str]) -> dict[int | str, tuple[float, float, float, float]]:
    """A colour a fork, from dark for the first to light for the last (viridis, without its palest end)."""
    forks = list(forks)
    steps = max(len(forks) - 1, 1)
    return {fork: mpl.colormaps["viridis"](0.9 * number / steps) for number, fork in enumerate(forks)}


def save_figure(figure: Figure, path_without_suffix: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write a figure as PNG, 200 dots an inch, and as PDF.

    Each file is written whole or not at all; parent directories are made.

    Args:
        figure: What to write.
        path_without_suffix: `"runs/barriers"` for `runs/barriers.png` and `runs/barriers.pdf`.

    Returns:
        The paths of the PNG and of the PDF.
    """
    png, pdf = (Path(f"{os.fspath(path_without_suffix)}.{kind}") for kind in ("png", "pdf"))
    with look(), write_atomically(png) as temporary:
        figure.savefig(temporary, format="png", dpi=200)
    with look(), write_atomically(pdf) as temporary:
        # Without a date the same figure is the same file.
        figure.savefig(temporary, format="pdf", metadata={"CreationDate": None})
    return png, pdf
