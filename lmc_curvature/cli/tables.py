"""Results as terminal tables, and as plain records for JSON."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from rich.table import Column, Table

from lmc_curvature.barrier.expansions import EXPANSIONS
from lmc_curvature.barrier.measurement import BarrierMeasurement
from lmc_curvature.barrier.prediction import BarrierPrediction
from lmc_curvature.cli.demo import DemoResult, layer_rank_correlations, layer_sets
from lmc_curvature.figures.frames import at_epoch, numbers
from lmc_curvature.figures.ranks import rank_correlations
from lmc_curvature.tracing import Traces

LayerSets = Sequence[Sequence[str]]


def prediction_record(prediction: BarrierPrediction, sets: LayerSets) -> dict[str, Any]:
    """A prediction, its layers and the given sets of layers, as what JSON can hold."""
    first, second = prediction.endpoints
    return _plain(
        {
            "examples": prediction.examples,
            "batch_norm": prediction.batch_norm,
            "losses": [first.loss, second.loss],
            "distance": prediction.distance,
            "barrier": {
                expansion: {
                    "value": prediction.barrier(None, expansion),
                    "standard_error": prediction.standard_error(None, expansion),
                }
                for expansion in EXPANSIONS
            },
            "layers": prediction.to_dataframe().to_dict("records"),
            "sets": [_predicted_set(prediction, members) for members in sets],
        }
    )


def _predicted_set(prediction: BarrierPrediction, members: Sequence[str]) -> dict[str, Any]:
    return {
        "layers": list(members),
        "barrier": prediction.barrier(members),
        "standard_error": prediction.standard_error(members),
        "barrier_with_slopes": prediction.barrier(members, "with-slopes"),
    }


def measurement_record(measurement: BarrierMeasurement) -> dict[str, Any]:
    """A measurement, with its curves, as what JSON can hold."""
    return _plain(
        {
            "examples": measurement.examples,
            "batch_norm": measurement.batch_norm,
            "kind": measurement.kind if "loss" in measurement.metrics else None,
            "alphas": measurement.alphas.tolist(),
            "metrics": {
                metric: {
                    "ends": list(measurement.ends(metric)),
                    "barrier": measurement.barrier(metric),
                    "standard_error": measurement.standard_error(metric),
                    "values": measurement.values(metric).tolist(),
                    "curve": measurement.curve(metric).tolist(),
                    "sets": [
                        {"layers": list(members), "barrier": float(curve.max()), "curve": curve.tolist()}
                        for members, curve in zip(measurement.sets, measurement.layer_curves(metric), strict=True)
                    ],
                }
                for metric in measurement.metrics
            },
        }
    )


def prediction_table(prediction: BarrierPrediction, sets: LayerSets) -> Table:
    """A row a layer, then a row a set: distance, Hessian energy, predicted barriers."""
    table = Table("layers", *_right("distance", "ΔᵀHΔ", "barrier", "±", "with slopes"))
    rows = [(name, [name]) for name in prediction.layers] + [(" + ".join(members), list(members)) for members in sets]
    for label, members in rows:
        inside = np.isin(prediction.layers, members)
        energies = [float(p.curvature[np.ix_(inside, inside)].sum()) for p in prediction.endpoints]
        table.add_row(
            label,
            _number(float(np.linalg.norm(prediction.distances[inside]))),
            _number(sum(energies) / 2),
            _number(prediction.barrier(members)),
            _number(prediction.standard_error(members), 2),
            _number(prediction.barrier(members, "with-slopes")),
            end_section=label == prediction.layers[-1],
        )
    return table


def measurement_table(measurement: BarrierMeasurement) -> Table:
    """A row a measured set of layers: its barrier in every metric."""
    table = Table("layers", *_right(*(f"{metric} barrier" for metric in measurement.metrics)))
    barriers = [measurement.layer_barriers(metric) for metric in measurement.metrics]
    for label, *values in zip(measurement.layers, *barriers, strict=True):
        table.add_row(label, *(_number(value) for value in values))
    return table


def demo_tables(result: DemoResult) -> list[Table]:
    """Predicted beside measured barriers of the demo: of whole networks, of layers and of sets, and their ranks."""
    return [_demo_whole(result), _demo_layers(result), _demo_ranks(result)]


def _demo_whole(result: DemoResult) -> Table:
    table = Table(
        "fork at epoch",
        *_right("distance", "measured", "predicted", "with slopes", "error barrier"),
        "kind",
        title="Barrier between the two children of each fork (nats; mean ± standard error over batches)",
    )
    for fork, prediction in result.predictions.items():
        measurement = result.measurements[fork]
        table.add_row(
            str(fork),
            _number(prediction.distance),
            f"{_number(measurement.barrier())} ± {_number(measurement.standard_error(), 2)}",
            f"{_number(prediction.barrier())} ± {_number(prediction.standard_error(), 2)}",
            _number(prediction.barrier(None, "with-slopes")),
            f"{measurement.barrier('error'):.1%}",
            measurement.kind,
        )
    return table


def _demo_layers(result: DemoResult) -> Table:
    table = Table(
        "layers moved",
        *_right(*(f"fork {fork}" for fork in result.predictions)),
        title="Barriers of single layers and of sets, measured | predicted",
    )
    names = next(iter(result.predictions.values())).layers
    labels = [*names, *layer_sets(names)]
    for row, label in enumerate(labels):
        cells = []
        for fork, prediction in result.predictions.items():
            measurement = result.measurements[fork]
            measured = measurement.layer_barriers()[row]
            cells.append(f"{_number(measured, 2)} | {_number(prediction.barrier(measurement.sets[row]), 2)}")
        table.add_row(label, *cells, end_section=label == names[-1])
    return table


def _demo_ranks(result: DemoResult) -> Table:
    ranks = {
        fork: layer_rank_correlations(prediction, result.measurements[fork])
        for fork, prediction in result.predictions.items()
    }
    return _rank_table(
        ranks,
        {
            "second-order": "predicted (second order)",
            "with-slopes": "predicted (with slopes)",
            "distance": "distance alone",
        },
    )


def trace_tables(traces: Traces) -> list[Table]:
    """What lies between siblings at the end, by fork: barriers, and how well layers are ranked."""
    ranked = bool(np.isfinite(numbers(traces.layers, "measured")).any())
    return [_trace_whole(traces), *([_trace_ranks(traces)] if ranked else [])]


def _trace_whole(traces: Traces) -> Table:
    table = Table(
        "fork at epoch",
        *_right("distance", "measured", "predicted", "with slopes", "error barrier", "test error barrier"),
        title="Barrier between the siblings of each fork at the end (nats; mean ± standard error over batches)",
    )
    barriers = _last_by(traces.barriers, "fork", "split", "metric")
    predictions = _last_by(traces.predictions, "fork", "expansion")
    for (fork,), geometry in _last_by(traces.geometry, "fork").items():
        errors = (barriers.get((fork, split, "error")) for split in ("train", "test"))
        table.add_row(
            str(fork),
            _number(geometry["distance"]),
            _with_error(barriers[fork, "train", "loss"]),
            _with_error(predictions[fork, "second-order"]),
            _number(predictions[fork, "with-slopes"]["barrier"]),
            *("–" if row is None else f"{row['barrier']:.1%}" for row in errors),
        )
    return table


def _last_by(rows: pd.DataFrame, *columns: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The rows of each fork's last epoch, by the values in some columns."""
    records = at_epoch(rows, "traces", None).to_dict("records")
    return {tuple(row[column] for column in columns): {str(key): row[key] for key in row} for row in records}


def _with_error(row: Mapping[str, Any]) -> str:
    return f"{_number(row['barrier'])} ± {_number(row['standard_error'], 2)}"


def _trace_ranks(traces: Traces) -> Table:
    return _rank_table(
        rank_correlations(traces.layers),
        {
            "predicted": "predicted (second order)",
            "predicted_with_slopes": "predicted (with slopes)",
            "distance": "distance alone",
            "curvature": "curvature alone",
        },
    )


def _rank_table(ranks: Mapping[int, Mapping[str, float]], titles: Mapping[str, str]) -> Table:
    """A row a way of ranking layers, a column a fork, and the mean."""
    table = Table(
        "Spearman with the measured",
        *_right(*(f"fork {fork}" for fork in ranks), "mean"),
        title="How well layers are ranked before measuring",
    )
    for key, title in titles.items():
        values = np.array([rank[key] for rank in ranks.values()])
        # A fork without ranks has no part in the mean.
        mean = float(values[np.isfinite(values)].mean()) if np.isfinite(values).any() else math.nan
        table.add_row(title, *("–" if math.isnan(value) else f"{value:.2f}" for value in [*values.tolist(), mean]))
    return table


def _right(*titles: str) -> list[Any]:
    return [Column(title, justify="right") for title in titles]


def _number(value: float, digits: int = 3) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}g}"


def _plain(value: Any) -> Any:
    """The same nested value with JSON's null for what is not a number."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
