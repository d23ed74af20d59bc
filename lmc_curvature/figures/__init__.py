"""Pictures of barriers and landscapes, a function a figure."""

from lmc_curvature.barrier.drawing import draw_measurement, draw_prediction
from lmc_curvature.curvature.spectra.drawing import draw_spectral_density
from lmc_curvature.figures.agreement import draw_predicted_against_measured
from lmc_curvature.figures.barriers import draw_barrier_curves, draw_layer_bars
from lmc_curvature.figures.cumulative import draw_cumulative_barriers
from lmc_curvature.figures.files import save_figure
from lmc_curvature.figures.forks import draw_barrier_growth, draw_barriers_by_fork
from lmc_curvature.figures.heatmaps import draw_layer_heatmaps
from lmc_curvature.figures.kinds import draw_barrier_kinds
from lmc_curvature.figures.landscapes import draw_toy_landscapes
from lmc_curvature.figures.mountainside import draw_mountainside
from lmc_curvature.figures.ranks import draw_rank_correlations
from lmc_curvature.figures.ridges import draw_ridges
from lmc_curvature.figures.siblings import draw_sibling_angles, draw_sibling_distances, draw_solution_planes

__all__ = [
    "draw_barrier_curves",
    "draw_barrier_growth",
    "draw_barrier_kinds",
    "draw_barriers_by_fork",
    "draw_cumulative_barriers",
    "draw_layer_bars",
    "draw_layer_heatmaps",
    "draw_measurement",
    "draw_mountainside",
    "draw_predicted_against_measured",
    "draw_prediction",
    "draw_rank_correlations",
    "draw_ridges",
    "draw_sibling_angles",
    "draw_sibling_distances",
    "draw_solution_planes",
    "draw_spectral_density",
    "draw_toy_landscapes",
    "save_figure",
]
