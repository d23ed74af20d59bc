"""The tables of a pair of networks, beside its charts: every number that they show, for whoever does not see them."""

from typing import NamedTuple

import numpy as np

from lmc_curvature.averages import with_error
from lmc_curvature.barrier import BarrierPrediction
from lmc_curvature.report.charts import measured_alone
from lmc_curvature.report.contents import Pair, compare, highest_places


class Table(NamedTuple):
    """A caption, headings, and rows of texts, the first of which names the row."""

    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def pair_tables(pair: Pair) -> list[Table]:
    """The tables of a pair: layers, the strongest interactions, and measured sets."""
    prediction = pair.prediction
    found = [] if prediction is None else [_layers(pair, prediction), _interactions(prediction)]
    return [*found, *_measured_sets(pair)]


def _layers(pair: Pair, prediction: BarrierPrediction) -> Table:
    eye = np.eye(len(prediction.layers), dtype=bool)
    alone, error = prediction.set_barriers(eye), prediction.set_expansion_errors(eye)
    without, second = prediction.set_barriers(~eye), prediction.set_barriers(eye, expansion="second-order")
    measured, averaged = measured_alone(pair, prediction), pair.selection.members if pair.selection else ()
    parameters = prediction.parameters
    rows = []
    for index, name in enumerate(prediction.layers):
        rows.append(
            (
                name,
                "–" if parameters is None else f"{parameters[index]:,}",
                _short(prediction.distances[index]),
                with_error(alone[index], prediction.standard_error([name], alpha=0.5), 3),
                _short(error[index]) if prediction.expansion == "anchored" else "–",
                _short(second[index]),
                with_error(*measured[name], 3) if name in measured else "–",
                _short(without[index]),
                "yes" if name in averaged else "no",
            )
        )
    headings = ("layer", "parameters", "distance", "moved alone, predicted ± sampling", "expansion error")
    headings += ("second order", "measured ± sampling", "barrier of all others", "in the largest set")
    return Table("Layers: barriers of the loss at α = ½", headings, tuple(rows))


def _interactions(prediction: BarrierPrediction, most: int = 8) -> Table:
    names, pairs = prediction.layers, prediction.interactions
    first, second = np.triu_indices(len(names), 1)
    order = np.argsort(-np.abs(pairs[first, second]), kind="stable")[:most]
    rows = [(f"{names[first[k]]} and {names[second[k]]}", f"{2 * pairs[first[k], second[k]]:+.3g}") for k in order]
    headings = ("layers", "what moving both adds to the sum of both alone (shared Hessian, at A)")
    return Table("The strongest interactions between two layers", headings, tuple(rows))


def _measured_sets(pair: Pair) -> list[Table]:
    found = []
    for name, measurement in pair.loss_measurements.items():
        if not measurement.sets:
            continue
        compared, place = compare(pair.prediction, measurement), highest_places(measurement)
        barriers, errors = measurement.layer_curves()[place], measurement.curve_errors()[1:][place]
        rows = []
        for row, (title, barrier, error) in enumerate(zip(measurement.layers, barriers, errors, strict=True)):
            numbers = ("–", "–") if compared is None else (compared.predicted[row], compared.expansion[row])
            rows.append((title, with_error(barrier, error, 3), *map(_short, numbers)))
        headings = ("layers moved", "measured ± sampling", "predicted", "expansion error")
        found.append(Table(f"Barriers of sets of layers, {name}, at their highest", headings, tuple(rows)))
    return found


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"
