"""Pictures of barriers and landscapes, a function a figure.

Every function returns a matplotlib `Figure` that pyplot does not know of, so nothing has to be closed, and figures can
be drawn without a display and in threads. Notebooks show it; `save_figure` writes it.
"""

from lmc_curvature.figures.barriers import (
    draw_barrier_curves,
    draw_layer_bars,
    draw_measurement,
    draw_predicted_against_measured,
    draw_prediction,
)
from lmc_curvature.figures.landscapes import draw_barrier_kinds, draw_toy_landscapes
from lmc_curvature.figures.spectra import draw_spectral_density
from lmc_curvature.figures.style import save_figure

__all__ = [
    "draw_barrier_curves",
    "draw_barrier_kinds",
    "draw_layer_bars",
    "draw_measurement",
    "draw_predicted_against_measured",
    "draw_prediction",
    "draw_spectral_density",
    "draw_toy_landscapes",
    "save_figure",
]
