"""Figures as files."""

import os
from pathlib import Path

from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

from lmc_curvature.plotting.style import look
from lmc_curvature.storage import write_atomically


def save_figure(figure: Figure, path_without_suffix: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write a figure as PNG, 200 dots an inch, and as PDF.

    Each file is written whole or not at all; parent directories are made.

    Args:
        figure: The figure to write.
        path_without_suffix: `"runs/barriers"` for `runs/barriers.png` and `runs/barriers.pdf`.

    Returns:
        The paths of the PNG and of the PDF.
    """
    png, pdf = (Path(f"{os.fspath(path_without_suffix)}.{kind}") for kind in ("png", "pdf"))
    write_figure(figure, png)
    write_figure(figure, pdf)
    return png, pdf


def write_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure in the format that the file's suffix names, whole or not at all, 200 dots an inch.

    Args:
        figure: The figure to write.
        path: The file; one of `figure_suffixes` ends its name.
    """
    kind = Path(path).suffix.removeprefix(".").lower()
    # Without a date the same figure is the same file.
    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
    with look(), write_atomically(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=200, metadata=undated)


def figure_suffixes() -> list[str]:
    """Suffixes of the formats that figures can be written in."""
    return [f".{kind}" for kind in FigureCanvasBase.get_supported_filetypes()]
