"""Put the claims of "Landscaping Linear Mode Connectivity" (Singh et al. 2024) in numbers, from a traced experiment.

    python scripts/claims.py runs/cifar10-small

Prints Markdown tables, a row a fork: the ridge between siblings, how siblings lie to each other, and how well barriers
of whole networks, of layers and of growing sets of layers are predicted, at the end and before. Losses are in nats, of
the training data but where a column says otherwise.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from jaxtyping import Float64

from lmc_curvature.averages import rank_correlation
from lmc_curvature.barrier.measurement import BarrierMeasurement
from lmc_curvature.figures.frames import any_known, at_epoch, by_fork, checked, having, known, numbers
from lmc_curvature.figures.ranks import rank_correlations
from lmc_curvature.forking import open_directory
from lmc_curvature.tracing import Traces, read_traces

Row = dict[str, Any]
Claim = Callable[[Traces], list[Row]]

# A ridge is there once it is this share of its highest, and the plane is fixed from this cosine on.
RIDGE_SHARE = 0.1
PLANE_COSINE = 0.9
# Barriers of layers below this share of the largest are too near zero for a ratio.
RATIO_SHARE = 0.01


def main(directory: Annotated[Path, typer.Argument(help="A directory that lmc-curvature trace has traced.")]) -> None:
    """Print the tables."""
    traces = read_traces(directory)
    print(f"{standard_errors(directory, traces)}\n")
    for title, claim in CLAIMS.items():
        rows = claim(traces)
        print(f"**{title}**\n\n{markdown(rows)}\n" if rows else f"**{title}**: not traced.\n")


def standard_errors(directory: Path, traces: Traces) -> str:
    """From how many batches standard errors are estimated: of few, they are themselves uncertain."""
    fork, epoch = (int(traces.barriers[column].iloc[0]) for column in ("fork", "epoch"))
    path = open_directory(directory).trace_path(fork, epoch) / "train.safetensors"
    sizes = BarrierMeasurement.load(path).batch_sizes
    return f"Standard errors are estimated from the spread between {len(sizes)} batches of {int(sizes.max())} examples."


def ridges(traces: Traces) -> list[Row]:
    """The ridge between siblings: its beginning, its height and width, and its rest at the end."""
    barriers = by_fork(checked(traces.barriers, "barriers", ["barrier"], split="train", metric="loss"))
    curves = by_fork(at_epoch(checked(traces.curves, "curves", ["barrier"], split="train", metric="loss"), "", None))
    errors = {
        split: by_fork(at_epoch(checked(traces.barriers, "barriers", [], split=split, metric="error"), "", None))
        for split in sorted(set(traces.barriers["split"]))
    }
    rows = []
    for fork, each in barriers.items():
        epochs, values = numbers(each, "epoch"), numbers(each, "barrier")
        highest = int(np.argmax(values))
        seen = np.flatnonzero(values >= RIDGE_SHARE * values[highest]) if values[highest] > 0 else []
        rows.append(
            {
                "fork": fork,
                "first traced": _at(values[0], epochs[0]),
                "a tenth of the highest, epochs after the fork": int(epochs[seen[0]]) - fork if len(seen) else "never",
                "highest": _at(values[highest], epochs[highest]),
                "at the end": values[-1],
                "width at half height": half_width(numbers(curves[fork], "alpha"), numbers(curves[fork], "barrier")),
                **{
                    f"barrier of the {split} error": float(numbers(errors[split][fork], "barrier")[0])
                    for split in errors
                },
            }
        )
    return rows


def half_width(alphas: Float64[np.ndarray, " n"], curve: Float64[np.ndarray, " n"]) -> float:
    """Share of the segment on which a barrier curve, joined by straight lines, is over half its maximum."""
    if curve.max() <= 0:
        return math.nan
    fine = np.linspace(0, 1, 10_001)
    return float((np.interp(fine, alphas, curve) >= curve.max() / 2).mean())


def siblings(traces: Traces) -> list[Row]:
    """Distances and angles of siblings at the end, and the epoch at which they fixed the plane of their solutions."""
    rows = []
    for fork, each in by_fork(checked(traces.geometry, "geometry", [])).items():
        last = each.iloc[-1]
        epochs, cosines = numbers(each, "epoch"), numbers(each, "cosine_final")
        # From where on it stays so.
        fixed = epochs[np.flatnonzero(cosines < PLANE_COSINE)[-1] + 1] if (cosines < PLANE_COSINE).any() else epochs[0]
        middle = fork + (epochs[-1] - fork) / 2
        rows.append(
            {
                "fork": fork,
                "distance": last["distance"],
                "angle from the origin, degrees": _degrees(last["cosine_origin"]),
                "angle from the fork, degrees": _degrees(last["cosine_fork"]),
                "cosine with the final difference, half-way to the end": float(np.interp(middle, epochs, cosines)),
                f"that cosine is over {PLANE_COSINE}, epochs after the fork": int(fixed) - fork,
                "as a share of the way": float((fixed - fork) / (epochs[-1] - fork)),
            }
        )
    return rows


def whole_networks(traces: Traces) -> list[Row]:
    """Proposition 1: predicted and measured barriers at the end, and their rank correlation over forks."""
    of_loss = {
        split: at_epoch(checked(traces.barriers, "barriers", ["barrier"], split=split, metric="loss"), "", None)
        for split in sorted(set(traces.barriers["split"]), reverse=True)
    }
    predicted = {
        expansion: at_epoch(checked(traces.predictions, "predictions", ["barrier"], expansion=expansion), "", None)
        for expansion in _expansions(traces)
    }
    measured = numbers(of_loss["train"], "barrier")
    values = {expansion: numbers(rows, "barrier") for expansion, rows in predicted.items()}
    found: list[Row] = [
        {
            "fork": int(fork),
            **{f"measured, {split}": _with_error(rows, k) for split, rows in of_loss.items()},
            **{expansion: _with_error(rows, k) for expansion, rows in predicted.items()},
            **{
                f"{expansion} / measured": values[expansion][k] / measured[k] if measured[k] > 0 else math.nan
                for expansion in ("second-order", _expansions(traces)[-1])
            },
        }
        for k, fork in enumerate(of_loss["train"]["fork"])
    ]
    ranks = {expansion: rank_correlation(measured, each) for expansion, each in values.items()}
    return [*found, {"fork": "Spearman over forks", **ranks}]


def _expansions(traces: Traces) -> tuple[str, ...]:
    """Those of whole networks; with anchors between the ends, Hermite's is the anchored one."""
    anchored = (traces.predictions["expansion"] == "anchored").any()
    return ("second-order", "with-slopes", "anchored" if anchored else "hermite")


def _with_error(rows: pd.DataFrame, k: int) -> str:
    barrier, error = (float(numbers(rows, column)[k]) for column in ("barrier", "standard_error"))
    # A curve that nowhere lies above the chord has its maximum at the ends, where there is no spread.
    return "0" if barrier == 0 else f"{_text(barrier)} ± {_text(error, 2)}"


def under_way(traces: Traces) -> list[Row]:
    """Predictions before the end: where no point of the segment lies above the chord, and where they are worst."""
    measured = checked(traces.barriers, "barriers", ["barrier"], split="train", metric="loss")
    curves = by_fork(checked(traces.curves, "curves", ["barrier"], split="train", metric="loss"))
    tables = {
        name: by_fork(checked(traces.predictions, "predictions", ["barrier"], expansion=name))
        for name in _expansions(traces)
    }
    rows = []
    for fork, each in by_fork(measured).items():
        barriers, epochs = numbers(each, "barrier"), numbers(each, "epoch")
        predicted = {name: numbers(table[fork], "barrier") for name, table in tables.items()}
        none = barriers <= 0
        ratios = np.divide(predicted["second-order"], barriers, out=np.zeros_like(barriers), where=~none)
        worst = int(np.argmax(ratios))
        at_worst = f"{_text(float(predicted['second-order'][worst]))} / {_at(float(barriers[worst]), epochs[worst])}"
        rows.append(
            {
                "fork": fork,
                "epochs without a barrier": f"{int(none.sum())} of {len(none)}",
                **{f"{name} there": _range(values[none]) for name, values in predicted.items()},
                "lowest point of a curve": float(numbers(curves[fork], "barrier").min()),
                "worst second-order / measured": "–" if none.all() else at_worst,
            }
        )
    return rows


def _range(values: Float64[np.ndarray, " n"]) -> str:
    return f"{_text(float(values.min()))} to {_text(float(values.max()))}" if len(values) else "–"


def layers(traces: Traces) -> list[Row]:
    """Proposition 2: Spearman's ρ over layers with the measured barriers, and how far predictions are off."""
    correlations = rank_correlations(traces.layers)
    rows = at_epoch(known(checked(traces.layers, "layers", []), "layers", "measured"), "layers", None)
    found: list[Row] = [
        {
            "fork": fork,
            **correlations[fork],
            **{f"median of {name} / measured": _median_ratio(each, name) for name in _predicted(rows)},
        }
        for fork, each in by_fork(rows).items()
    ]
    means = {name: _mean([row[name] for row in found]) for name in found[0] if name != "fork"}
    return [*found, {"fork": "mean", **means}]


def sunken_layers(traces: Traces) -> list[Row]:
    """Layers without a barrier, over training: how many, until when, and for how many one is predicted."""
    rows = known(checked(traces.layers, "layers", ["measured", "predicted"]), "layers", "measured")
    found = []
    for fork, each in by_fork(rows).items():
        epochs, none = numbers(each, "epoch"), numbers(each, "measured") <= 0
        until = epochs[none].max() if none.any() else math.nan
        wrong = none & (numbers(each, "predicted") > 0)
        found.append(
            {
                "fork": fork,
                "last epoch with a layer without a barrier": int(until) if none.any() else "–",
                "layers without a barrier, up to it": f"{int(none.sum())} of {int((epochs <= until).sum())}",
                "of these, predicted to have one": int(wrong.sum()),
                "deepest below the chord": float(numbers(each, "measured_lowest").min()),
            }
        )
    return found


def _mean(values: Sequence[float]) -> float:
    """Over the forks that have a value."""
    finite = [value for value in values if math.isfinite(value)]
    return float(np.mean(finite)) if finite else math.nan


def _predicted(rows: pd.DataFrame) -> list[str]:
    """Columns of predictions: to second order, and the anchored ones where there are some."""
    return ["predicted", *(["predicted_anchored"] if any_known(rows, "predicted_anchored") else [])]


def _median_ratio(rows: pd.DataFrame, column: str) -> float:
    measured, predicted = numbers(rows, "measured"), numbers(rows, column)
    clear = measured > RATIO_SHARE * measured.max()
    return float(np.median(predicted[clear] / measured[clear])) if clear.any() else math.nan


def growing_sets(traces: Traces) -> list[Row]:
    """Cumulative barriers of the first and of the last k layers: Spearman's ρ over k, and the ratio for all layers."""
    if traces.cumulative.empty:
        return []
    names = {"predicted_shared": "eq. 21", "predicted": "second order", "predicted_anchored": "anchored"}
    names = {column: name for column, name in names.items() if any_known(traces.cumulative, column)}
    rows = []
    for fork, each in by_fork(at_epoch(checked(traces.cumulative, "cumulative barriers", []), "", None)).items():
        row: Row = {"fork": fork}
        for side in ("first", "last"):
            part = each[each["side"] == side]
            for column, name in names.items():
                row[f"ρ, {side} k, {name}"] = rank_correlation(numbers(part, "measured"), numbers(part, column))
        whole = having(each, "count", numbers(each, "count").max())
        row["all layers, second order / measured"] = _ratio(whole)
        rows.append(row)
    return rows


def _ratio(rows: pd.DataFrame) -> float:
    measured = numbers(rows, "measured")[0]
    return float(numbers(rows, "predicted")[0] / measured) if measured > 0 else math.nan


CLAIMS: dict[str, Claim] = {
    "The ridge between siblings": ridges,
    "How siblings lie to each other": siblings,
    "Barriers of whole networks (Proposition 1)": whole_networks,
    "Barriers of whole networks while training is under way": under_way,
    "Barriers of layers (Proposition 2): Spearman's ρ over layers with the measured barrier": layers,
    "Layers without a barrier": sunken_layers,
    "Barriers of the first and of the last k layers": growing_sets,
}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table; the columns are those of the first row."""
    columns = list(rows[0])
    cells = [[_text(row.get(column, "")) for column in columns] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _at(value: float, epoch: float) -> str:
    return f"{_text(value)} (epoch {int(epoch)})"


def _degrees(cosine: float) -> float:
    return math.degrees(math.acos(min(max(cosine, -1.0), 1.0)))


def _text(value: Any, digits: int = 3) -> str:
    if not isinstance(value, float):
        return str(value)
    return "–" if math.isnan(value) else f"{value:.{digits}g}"


if __name__ == "__main__":
    typer.run(main)
