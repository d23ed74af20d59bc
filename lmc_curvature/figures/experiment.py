"""Every figure of a traced experiment, written to files."""

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from matplotlib.figure import Figure
from tqdm.auto import tqdm

from lmc_curvature.errors import OptionError
from lmc_curvature.figures.cumulative import draw_cumulative_barriers
from lmc_curvature.figures.forks import draw_barrier_growth, draw_barriers_by_fork
from lmc_curvature.figures.heatmaps import draw_layer_heatmaps
from lmc_curvature.figures.landscapes import draw_barrier_kinds, draw_toy_landscapes
from lmc_curvature.figures.mountainside import draw_mountainside
from lmc_curvature.figures.ranks import draw_rank_correlations
from lmc_curvature.figures.ridges import Quantity, draw_ridges
from lmc_curvature.figures.siblings import draw_sibling_angles, draw_sibling_distances, draw_solution_planes
from lmc_curvature.plotting.style import save_figure
from lmc_curvature.tracing import Traces, read_traces


def draw_all(
    out_dir: str | os.PathLike[str], figures_dir: str | os.PathLike[str], *, progress: bool = True
) -> tuple[Path, ...]:
    """Draw every figure of the paper for an experiment, as PNG and PDF.

    A figure for which nothing was traced is left out, with a warning that says what is missing.

    Args:
        out_dir: The directory of an experiment that was traced.
        figures_dir: Where figures go; made if need be.
        progress: Show a bar of figures.

    Returns:
        The files.

    Raises:
        CheckpointError: There are no traces. The message says what makes them.
    """
    figures = dict(_figures(read_traces(out_dir)))
    paths: list[Path] = []
    for name, draw in tqdm(figures.items(), desc="drawing", unit="figure", disable=not progress):
        try:
            paths += save_figure(draw(), Path(figures_dir) / name)
        except OptionError as error:
            warnings.warn(f"{name} is left out: {error}", stacklevel=2)
    return tuple(paths)


def _figures(traces: Traces) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """Name and drawing of each figure; the paper's number of it, if it has one, stands beside it."""
    # 1, 8 to 12
    drawn: list[tuple[str, Quantity]] = [
        ("error", "value"),
        ("loss", "value"),
        ("error", "barrier"),
        ("loss", "barrier"),
    ]
    for metric, quantity in drawn:
        for split in sorted(set(traces.curves["split"])):
            name = f"ridges-{metric}{'-barrier' if quantity == 'barrier' else ''}-{split}"
            yield name, lambda m=metric, q=quantity, s=split: draw_ridges(traces.curves, metric=m, quantity=q, split=s)
    # 2, 13
    yield "sibling-angles", lambda: draw_sibling_angles(traces.geometry)
    yield "solution-planes", lambda: draw_solution_planes(traces.geometry)
    # 3
    yield "mountainside", draw_mountainside
    # 4, 14
    yield "barriers-by-fork", lambda: draw_barriers_by_fork(traces.barriers, traces.predictions)
    yield "barrier-growth", lambda: draw_barrier_growth(traces.barriers, traces.predictions)
    yield "sibling-distances", lambda: draw_sibling_distances(traces.geometry)
    # 5, 15 to 20
    for fork in sorted(set(traces.layers["fork"])):
        yield f"layers-fork-{fork:04d}", lambda f=fork: draw_layer_heatmaps(traces.layers, fork=f)
    yield "layer-ranks", lambda: draw_rank_correlations(traces.layers)
    yield "cumulative-barriers", lambda: draw_cumulative_barriers(traces.cumulative)
    # 6, 7
    yield "toy-landscapes", draw_toy_landscapes
    yield "barrier-kinds", draw_barrier_kinds
