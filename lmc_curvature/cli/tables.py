"""Results as terminal tables, and as plain records for JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from rich.table import Column, Table

from lmc_curvature import BarrierMeasurement, BarrierPrediction
from lmc_curvature.averages import with_error
from lmc_curvature.barrier.expansions import EXPANSIONS, Expansion
from lmc_curvature.barrier.verdict import verdict
from lmc_curvature.cli.demo import BUDGET, DemoResult, layer_rank_correlations, layer_sets, median_errors
from lmc_curvature.figures.frames import at_epoch, numbers
from lmc_curvature.figures.ranks import rank_correlations
from lmc_curvature.merging import Selection, Verification
from lmc_curvature.merging.trials import SetTrial
from lmc_curvature.tracing import Traces

LayerSets = Sequence[Sequence[str]]

_RANKINGS = {
    "predicted_anchored": "predicted (anchored)",
    "predicted": "predicted (second order)",
    "predicted_with_slopes": "predicted (with slopes)",
    "distance": "distance alone",
    "curvature": "curvature alone",
}


def prediction_record(prediction: BarrierPrediction, sets: LayerSets) -> dict[str, Any]:
    """A prediction, its layers and the given sets of layers, as what JSON can hold."""
    first, second = prediction.endpoints
    return plain(
        {
            "examples": prediction.examples,
            "batch_norm": prediction.batch_norm,
            "notes": list(prediction.notes),
            "losses": [first.loss, second.loss],
            "distance": prediction.distance,
            "anchors": [{"alpha": alpha, "loss": projection.loss} for alpha, projection in prediction.anchors],
            "expansion": prediction.expansion,
            "barrier": {expansion: _barrier_record(prediction, None, expansion) for expansion in EXPANSIONS},
            "layers": prediction.to_dataframe().to_dict("records"),
            "sets": [
                {
                    "layers": list(members),
                    **_barrier_record(prediction, members, prediction.expansion, "barrier"),
                    "barrier_second_order": prediction.barrier(members, "second-order"),
                    "barrier_with_slopes": prediction.barrier(members, "with-slopes"),
                }
                for members in sets
            ],
            "verdict": verdict(prediction),
        }
    )


def measurement_record(measurement: BarrierMeasurement) -> dict[str, Any]:
    """A measurement, with its curves, as what JSON can hold."""
    return plain(
        {
            "examples": measurement.examples,
            "batch_norm": measurement.batch_norm,
            "notes": list(measurement.notes),
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


def selection_record(selection: Selection, verification: Verification | None) -> dict[str, Any]:
    """A selection, every measurement of its verification, and its prediction, as what JSON can hold.

    `selection` is the set in the end, `predicted_selection` the one that the prediction alone selects.
    """
    final, choice = verification.selection if verification else selection, selection.choice
    trials = [_trial_record(trial, choice.total) for trial in (verification.trials if verification else ())]
    measured, held_out = (verification.chosen, verification.held_out) if verification else (None, None)
    return plain(
        {
            "budget": selection.budget,
            "selection": _selection_fields(final),
            "predicted_selection": _selection_fields(selection),
            "measurements": trials,
            "measured": measured and _trial_record(measured, choice.total),
            "held_out": held_out and _trial_record(held_out, choice.total),
            "holds": verification.holds if verification else None,
            "prediction": prediction_record(choice.prediction, [final.members] if final.members else []),
        }
    )


def _selection_fields(selection: Selection) -> dict[str, Any]:
    names = ("base", "rise", "standard_error", "expansion_error", "weight", "share", "exact")
    return {"layers": list(selection.members)} | {name: getattr(selection, name) for name in names}


def _trial_record(trial: SetTrial, total: float) -> dict[str, Any]:
    names = ("base", "weight", "predicted", "expected", "rise", "standard_error")
    fields = {name: getattr(trial, name) for name in names}
    return {"layers": list(trial.members), "share": trial.weight / total} | fields


def _barrier_record(
    prediction: BarrierPrediction, members: Sequence[str] | None, expansion: Expansion, name: str = "value"
) -> dict[str, float]:
    """The highest point of a curve with its errors, and its value in the middle, which keeps its sign."""
    record = {
        name: prediction.barrier(members, expansion),
        "standard_error": prediction.standard_error(members, expansion),
        "at_half": _middle(prediction, members, expansion),
        "standard_error_at_half": prediction.standard_error(members, expansion, alpha=0.5),
    }
    if expansion == "anchored":
        record["expansion_error"] = prediction.expansion_error(members)
        record["expansion_error_at_half"] = prediction.expansion_error(members, alpha=0.5)
    return record


def prediction_table(prediction: BarrierPrediction, sets: LayerSets) -> Table:
    """A row a layer, then a row a set: distance, Hessian energy, and predicted barriers at α = 1/2 with their signs.

    Sampling and expansion errors have a column each: the spread between batches, and what blending anchors may miss.
    """
    anchored = prediction.expansion == "anchored"
    columns = ("anchored", "± sampling", "± expansion", "second order") if anchored else ("second order", "± sampling")
    table = Table(
        "layers",
        *right_columns("distance", "ΔᵀHΔ", *columns, "with slopes"),
        title="Barriers at α = 1/2 (below zero: convex)",
    )
    for members in [*([name] for name in prediction.layers), *sets]:
        inside = np.isin(prediction.layers, members)
        energies = [float(end.curvature[np.ix_(inside, inside)].sum()) for end in prediction.endpoints]
        table.add_row(
            " + ".join(members),
            cell(float(np.linalg.norm(prediction.distances[inside]))),
            cell(sum(energies) / 2),
            cell(_middle(prediction, members, prediction.expansion)),
            cell(prediction.standard_error(members, alpha=0.5), ".2g"),
            *(
                (
                    cell(prediction.expansion_error(members, alpha=0.5), ".2g"),
                    cell(_middle(prediction, members, "second-order")),
                )
                if anchored
                else ()
            ),
            cell(_middle(prediction, members, "with-slopes")),
            end_section=members == [prediction.layers[-1]],
        )
    return table


def _middle(prediction: BarrierPrediction, members: Sequence[str] | None, expansion: Expansion) -> float:
    return float(prediction.curve([0.5], members, expansion)[0])


def measurement_table(measurement: BarrierMeasurement) -> Table:
    """A row a measured set of layers: its barrier in every metric."""
    table = Table("layers", *right_columns(*(f"{metric} barrier" for metric in measurement.metrics)))
    barriers = [measurement.layer_barriers(metric) for metric in measurement.metrics]
    for label, *values in zip(measurement.layers, *barriers, strict=True):
        table.add_row(label, *map(cell, values))
    return table


def trial_table(verification: Verification) -> Table:
    """A row a measured set: what was predicted of its rise, expected after the rows above, and measured.

    The last row but that of held-out data is, or repeats, the selected set.
    """
    choice, chosen = verification.selection.choice, verification.chosen
    table = Table(
        *right_columns("", "base", "layers", "weight", "predicted", "expected", "measured"),
        f"budget {choice.budget:.3g}",
        title="Measured rises of the loss above the mean of the two (mean ± standard error over batches)",
        caption=verification.legend,
    )
    rows = [(str(number), trial) for number, trial in enumerate(verification.trials, 1)]
    rows += [("selected", chosen), *([("held-out", verification.held_out)] if verification.held_out else [])]
    for name, trial in rows:
        table.add_row(
            name,
            trial.base,
            f"{len(trial.members)} of {len(choice.weights)}",
            f"{trial.weight / choice.total:.1%}",
            cell(trial.predicted),
            cell(trial.expected),
            _with_error(trial.rise, trial.standard_error),
            verification.against_budget(trial),
            end_section=name == str(len(verification.trials)),
        )
    return table


def demo_tables(result: DemoResult) -> list[Table]:
    """The demo's barriers, predicted beside measured, their errors and ranks, and what can be averaged."""
    pairs = {fork: (prediction, result.measurements[fork]) for fork, prediction in result.predictions.items()}
    whole = _whole_table("Barrier between the two children of each fork", "error barrier")
    whole.add_column("kind")
    for fork, (predicted, measured) in pairs.items():
        whole.add_row(
            str(fork),
            cell(predicted.distance),
            _with_error(measured.barrier(), measured.standard_error()),
            _with_error(predicted.barrier(None, "anchored"), predicted.standard_error(None, "anchored")),
            cell(predicted.expansion_error(), ".2g"),
            _with_error(predicted.barrier(None, "second-order"), predicted.standard_error(None, "second-order")),
            cell(measured.barrier("error"), ".1%"),
            measured.kind,
        )
    sets = Table(
        "layers moved",
        *right_columns(*(f"fork {fork}" for fork in pairs)),
        title="Barriers of single layers and of sets, measured | predicted (anchored)",
    )
    names = next(iter(result.predictions.values())).layers
    for row, label in enumerate([*names, *layer_sets(names)]):
        barriers = ((m.layer_barriers()[row], p.barrier(m.sets[row], "anchored")) for p, m in pairs.values())
        cells = (f"{cell(measured, '.2g')} | {cell(predicted, '.2g')}" for measured, predicted in barriers)
        sets.add_row(label, *cells, end_section=label == names[-1])
    errors = Table(
        "predicted", *right_columns("layers", "sets"), title="Median error, as a part of the measured barrier"
    )
    for expansion in ("anchored", "second-order", "with-slopes"):
        errors.add_row(expansion, *(cell(error, ".0%") for error in median_errors(result, expansion)))
    ranks = _rank_table({fork: layer_rank_correlations(*pair) for fork, pair in pairs.items()})
    return [whole, sets, errors, ranks, _selections_table(result.selections)]


def _selections_table(selections: Mapping[int, Verification]) -> Table:
    """A row a pair: the heaviest set of layers that was found to stay within the budget."""
    table = Table(
        "fork at epoch",
        *right_columns("base", "layers", "parameters", "predicted rise", "measured", "on test images", "sets measured"),
        title=f"What can be averaged at a rise of the loss of at most {BUDGET} nats",
    )
    for fork, verified in selections.items():
        final, held_out = verified.selection, verified.held_out
        table.add_row(
            str(fork),
            final.base,
            f"{len(final.members)} of {len(final.choice.weights)}",
            f"{final.share:.1%}",
            cell(final.rise),
            _with_error(verified.chosen.rise, verified.chosen.standard_error),
            "–" if held_out is None else _with_error(held_out.rise, held_out.standard_error),
            str(len(verified.trials)),
        )
    return table


def trace_tables(traces: Traces) -> list[Table]:
    """Barriers between the siblings of each fork at the end, and rank correlations of their layers."""
    whole = _whole_table("Barrier between the siblings of each fork at the end", "error barrier", "test error barrier")
    measured = _last_by(traces.barriers, "fork", "split", "metric")
    predicted = _last_by(traces.predictions, "fork", "expansion")
    for (fork,), geometry in _last_by(traces.geometry, "fork").items():
        loss, second_order = measured[fork, "train", "loss"], predicted[fork, "second-order"]
        # Tables of earlier versions have none.
        anchored = predicted.get((fork, "anchored"), dict.fromkeys(second_order, math.nan))
        errors = (measured.get((fork, split, "error"), {}) for split in ("train", "test"))
        whole.add_row(
            str(fork),
            cell(geometry["distance"]),
            _with_error(loss["barrier"], loss["standard_error"]),
            _with_error(anchored["barrier"], anchored["standard_error"]),
            cell(anchored["expansion_error"], ".2g"),
            _with_error(second_order["barrier"], second_order["standard_error"]),
            *(cell(row.get("barrier", math.nan), ".1%") for row in errors),
        )
    ranked = bool(np.isfinite(numbers(traces.layers, "measured")).any())
    return [whole, *([_rank_table(rank_correlations(traces.layers))] if ranked else [])]


def _last_by(rows: pd.DataFrame, *columns: str) -> dict[tuple[Any, ...], dict[Any, Any]]:
    """The rows of each fork's last epoch, by the values in some columns."""
    records = at_epoch(rows, "traces", None).to_dict("records")
    return {tuple(row[column] for column in columns): row for row in records}


def _whole_table(title: str, *more: str) -> Table:
    return Table(
        "fork at epoch",
        *right_columns("distance", "measured", "anchored", "± expansion", "second order", *more),
        title=f"{title} (nats; mean ± standard error over batches)",
    )


def _rank_table(ranks: Mapping[int, Mapping[str, float]]) -> Table:
    """A row a way of ranking layers, a column a fork, and the mean."""
    table = Table(
        "Spearman with the measured",
        *right_columns(*(f"fork {fork}" for fork in ranks), "mean"),
        title="How well layers are ranked before measuring",
    )
    frame = pd.DataFrame(ranks)
    # A fork without ranks has no part in the mean.
    frame["mean"] = frame.mean(axis="columns")
    for key, title in _RANKINGS.items():
        if key in frame.index:
            table.add_row(title, *(cell(value, ".2f") for value in frame.loc[key]))
    return table


def right_columns(*titles: str) -> list[Any]:
    """Columns of numbers."""
    return [Column(title, justify="right") for title in titles]


def cell(value: float, form: str = ".3g") -> str:
    """A number; a dash where there is none."""
    return "–" if math.isnan(value) else format(value, form)


def _with_error(value: float, error: float) -> str:
    return cell(value) if math.isnan(value) else with_error(value, error, digits=3)


def plain(record: dict[str, Any]) -> dict[str, Any]:
    """The same record with JSON's null for what is not a number."""
    return json.loads(json.dumps(record), parse_constant=lambda name: None)
