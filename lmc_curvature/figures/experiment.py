"""Every figure of a traced experiment, written to files."""

import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import get_args

from matplotlib.figure import Figure
from tqdm.auto import tqdm

from lmc_curvature import figures
from lmc_curvature.errors import OptionError
from lmc_curvature.figures.ridges import Quantity
from lmc_curvature.tracing import Traces, read_traces


def draw_all(
    out_dir: str | os.PathLike[str], figures_dir: str | os.PathLike[str], *, progress: bool | None = None
) -> tuple[Path, ...]:
    """Draw every figure of the paper for an experiment, as PNG and PDF.

    A figure for which nothing was traced is left out, with a warning that says what is missing.

    Args:
        out_dir: The directory of an experiment that was traced.
        figures_dir: The directory for the figures; made if need be.
        progress: Show a bar of figures; by default on a terminal and in notebooks.

    Returns:
        The files.

    Raises:
        CheckpointError: There are no traces. The message says what makes them.
    """
    drawn = draw_traces(read_traces(out_dir), progress=progress)
    return tuple(path for name, figure in drawn for path in figures.save_figure(figure, Path(figures_dir) / name))


def draw_traces(traces: Traces, *, progress: bool | None = None) -> Iterator[tuple[str, Figure]]:
    """Draw every figure for which there are traces, one after the other, and warn of the others.

    Args:
        traces: The tables of an experiment.
        progress: Show a bar of figures; by default on a terminal and in notebooks.

    Yields:
        Name and figure.
    """
    hidden = None if progress is None else not progress
    for name, draw in tqdm(_drawings(traces).items(), desc="drawing", unit="figure", disable=hidden):
        try:
            figure = draw()
        except OptionError as error:
            warnings.warn(f"{name} is left out: {error}", stacklevel=2)
        else:
            yield name, figure


def _drawings(traces: Traces) -> dict[str, Callable[[], Figure]]:
    """Name and drawing of each figure; its number in the paper, if it has one, stands above it."""
    ridges: dict[str, Callable[[], Figure]] = {}
    for quantity, metric, split in product(get_args(Quantity), ("error", "loss"), sorted(set(traces.curves["split"]))):
        name = f"ridges-{metric}{'-barrier' if quantity == 'barrier' else ''}-{split}"
        ridges[name] = partial(figures.draw_ridges, traces.curves, metric=metric, quantity=quantity, split=split)
    layers = traces.layers
    forks = sorted(set(layers["fork"]))
    return {
        # 1, 8 to 12
        **ridges,
        # 2, 13
        "sibling-angles": partial(figures.draw_sibling_angles, traces.geometry),
        "solution-planes": partial(figures.draw_solution_planes, traces.geometry),
        # 3
        "mountainside": figures.draw_mountainside,
        # 4, 14
        "barriers-by-fork": partial(figures.draw_barriers_by_fork, traces.barriers, traces.predictions),
        "barrier-growth": partial(figures.draw_barrier_growth, traces.barriers, traces.predictions),
        "sibling-distances": partial(figures.draw_sibling_distances, traces.geometry),
        # 5, 15 to 20
        **{f"layers-fork-{fork:04d}": partial(figures.draw_layer_heatmaps, layers, fork=fork) for fork in forks},
        "layer-ranks": partial(figures.draw_rank_correlations, layers),
        "cumulative-barriers": partial(figures.draw_cumulative_barriers, traces.cumulative),
        # 6, 7
        "toy-landscapes": figures.draw_toy_landscapes,
        "barrier-kinds": figures.draw_barrier_kinds,
    }
