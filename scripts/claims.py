"""Put the claims of "Landscaping Linear Mode Connectivity" (Singh et al. 2024) in numbers, from a traced experiment.

    python scripts/claims.py runs/cifar10-small

Prints Markdown tables, a row a fork: the ridge between siblings, how siblings lie to each other, and how well barriers
of whole networks, of layers and of growing sets of layers are predicted. Losses are in nats, of the training data.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from jaxtyping import Float64

from lmc_curvature.figures.agreement import Pairs
from lmc_curvature.figures.frames import at_epoch, by_fork, checked, having, known, numbers
from lmc_curvature.figures.ranks import rank_correlations
from lmc_curvature.forking import Traces, read_traces

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
    for title, claim in CLAIMS.items():
        rows = claim(traces)
        print(f"**{title}**\n\n{markdown(rows)}\n" if rows else f"**{title}**: not traced.\n")


def ridges(traces: Traces) -> list[Row]:
    """When the ridge between siblings appears, how high and wide it is, and what is left of it at the end."""
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
    """How far apart siblings end, at which angles, and when they fixed the plane of their solutions."""
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
    measured = checked(traces.barriers, "barriers", ["barrier", "standard_error"], split="train", metric="loss")
    measured = at_epoch(measured, "barriers", None)
    predicted = {
        expansion: numbers(
            at_epoch(checked(traces.predictions, "predictions", ["barrier"], expansion=expansion), "", None), "barrier"
        )
        for expansion in ("second-order", "with-slopes", "hermite")
    }
    barriers, errors = numbers(measured, "barrier"), numbers(measured, "standard_error")
    rows: list[Row] = [
        {
            "fork": int(fork),
            "measured": f"{_text(barriers[k])} ± {_text(errors[k], 2)}",
            **{expansion: values[k] for expansion, values in predicted.items()},
            "second-order / measured": predicted["second-order"][k] / barriers[k] if barriers[k] > 0 else math.nan,
        }
        for k, fork in enumerate(measured["fork"])
    ]
    ranks = {expansion: Pairs(barriers, values).rank_correlation() for expansion, values in predicted.items()}
    return [*rows, {"fork": "Spearman over forks", **ranks}]


def layers(traces: Traces) -> list[Row]:
    """Proposition 2: Spearman's ρ over layers with the measured barriers, and how far predictions are off."""
    correlations = rank_correlations(traces.layers)
    rows = at_epoch(known(checked(traces.layers, "layers", []), "layers", "measured"), "layers", None)
    found: list[Row] = [
        {"fork": fork, **correlations[fork], "median of predicted / measured": _median_ratio(each)}
        for fork, each in by_fork(rows).items()
    ]
    means = {name: _mean([row[name] for row in found]) for name in found[0] if name != "fork"}
    return [*found, {"fork": "mean", **means}]


def _mean(values: Sequence[float]) -> float:
    """Over the forks that have a value."""
    finite = [value for value in values if math.isfinite(value)]
    return float(np.mean(finite)) if finite else math.nan


def _median_ratio(rows: pd.DataFrame) -> float:
    measured, predicted = numbers(rows, "measured"), numbers(rows, "predicted")
    clear = measured > RATIO_SHARE * measured.max()
    return float(np.median(predicted[clear] / measured[clear])) if clear.any() else math.nan


def growing_sets(traces: Traces) -> list[Row]:
    """Cumulative barriers of the first and of the last k layers: Spearman's ρ over k, and the ratio for all layers."""
    if traces.cumulative.empty:
        return []
    rows = []
    for fork, each in by_fork(at_epoch(checked(traces.cumulative, "cumulative barriers", []), "", None)).items():
        row: Row = {"fork": fork}
        for side in ("first", "last"):
            part = each[each["side"] == side]
            for column, name in (("predicted_shared", "eq. 21"), ("predicted", "second order")):
                pairs = Pairs(numbers(part, "measured"), numbers(part, column))
                row[f"ρ, {side} k, {name}"] = pairs.rank_correlation()
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
    "Barriers of layers (Proposition 2): Spearman's ρ over layers with the measured barrier": layers,
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
