"""Figures as files."""

import os
from pathlib import Path

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
    with look(), write_atomically(png) as temporary:
        figure.savefig(temporary, format="png", dpi=200)
    with look(), write_atomically(pdf) as temporary:
        # Without a date the same figure is the same file.
        figure.savefig(temporary, format="pdf", metadata={"CreationDate": None})
    return png, pdf
