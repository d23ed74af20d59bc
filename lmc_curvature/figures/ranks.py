"""The ranks of layers by predicted barrier, by curvature and by distance, compared with those by measured barrier."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lmc_curvature.averages import rank_correlation
from lmc_curvature.barrier.drawing import EXPANSION_PENS
from lmc_curvature.figures.frames import any_known, at_epoch, by_fork, checked, known, numbers
from lmc_curvature.plotting.axes import legend_line, zero_line
from lmc_curvature.plotting.style import GREY, PURPLE, SKY, TEXT_WIDTH, look, new_figure
from lmc_curvature.plotting.text import correlation_text

# Ways to rank layers: the name in the legend, the colour and the marker.
_RANKINGS = {
    "predicted_anchored": ("anchored", EXPANSION_PENS["anchored"].color, "P"),
    "predicted": ("second order", EXPANSION_PENS["second-order"].color, "s"),
    "predicted_with_slopes": ("with slopes", EXPANSION_PENS["with-slopes"].color, "D"),
    "hessian_energy": ("Hessian energy ΔᵀHΔ", GREY, "o"),
    "distance": ("distance ‖Δ‖ alone", PURPLE, "^"),
    "curvature": ("curvature ΔᵀHΔ / ‖Δ‖² alone", SKY, "v"),
}


@look()
def draw_rank_correlations(layers: pd.DataFrame) -> Figure:
    """Draw how well the measured barriers of single layers are ranked, by fork: Spearman's ρ over the layers.

    Compared are the predicted barriers, and what they are made of: the Hessian energy ΔᵀHΔ, the distance ‖Δ‖ alone, and
    the curvature along Δ alone. Each fork is taken at the last epoch at which its layers were measured. Fewer than
    three layers have no ranks, and then there is no point. On the right, and in the legend, stand the means.

    Args:
        layers: A row a fork, epoch and layer, with the columns `measured`, `predicted`, `predicted_with_slopes`,
            `hessian_energy` and `distance`, and `predicted_anchored` where that is known.

    Raises:
        OptionError: A column is missing, or no layer was measured.
    """
    correlations = pd.DataFrame(rank_correlations(layers)).T
    # Over the forks that have a value.
    means = correlations.mean().to_dict()
    forks = list(correlations.index)
    figure = new_figure(min(0.45 * len(forks) + 3.6, TEXT_WIDTH), 2.6)
    axes = figure.add_subplot()
    handles = []
    offsets = np.linspace(-0.34, 0.34, correlations.shape[1])
    for offset, name in zip(offsets, correlations.columns, strict=True):
        label, color, marker = _RANKINGS[name]
        pen: dict[str, Any] = {"color": color, "marker": marker, "markersize": 4.5, "linestyle": "none"}
        axes.plot(np.arange(len(forks)) + offset, correlations[name], label=f"_{name}", **pen)
        axes.plot([len(forks) + offset], [means[name]], label=f"_{name}, mean", **pen)
        handles.append(legend_line(f"{label}: {correlation_text(means[name])}", **pen))
    lowest = np.fmin(0.0, correlations.min().min())
    zero_line(axes)
    axes.axvline(len(forks) - 0.5, color=GREY, linewidth=0.6, linestyle=":", label="_forks and their mean")
    axes.grid(axis="y")
    axes.set_xticks(range(len(forks) + 1), [*(str(fork) for fork in forks), "mean"])
    axes.set(xlim=(-0.5, len(forks) + 0.5), ylim=(lowest - 0.05, 1.04))
    axes.set(xlabel="fork at epoch", ylabel="Spearman's ρ over layers\nwith the measured barrier")
    figure.legend(handles=handles, title="ranked by: mean ρ", loc="outside right upper", alignment="left")
    return figure


def rank_correlations(layers: pd.DataFrame) -> dict[int, dict[str, float]]:
    """Fork to way of ranking to Spearman's ρ with the measured barriers; NaN where it is undefined."""
    columns = [column for column in _RANKINGS if column not in ("curvature", "predicted_anchored")]
    rows = known(checked(layers, "layers", ["measured", *columns]), "layers", "measured")
    # Tables of earlier versions, and predictions from the two ends alone, have none that are anchored.
    rankings = [name for name in _RANKINGS if name != "predicted_anchored" or any_known(rows, name)]
    squares, energy = numbers(rows, "distance") ** 2, numbers(rows, "hessian_energy")
    # A layer that does not move has no barrier, and no curvature along its way.
    rows = rows.assign(curvature=np.divide(energy, squares, out=np.zeros_like(energy), where=squares > 0))
    return {
        fork: {name: rank_correlation(numbers(each, "measured"), numbers(each, name)) for name in rankings}
        for fork, each in by_fork(at_epoch(rows, "layers", None)).items()
    }
