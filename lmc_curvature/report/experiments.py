"""What a report shows of an experiment: ridges, maps of layers, barriers and geometry over epochs."""

from typing import Any

import numpy as np
import pandas as pd

from lmc_curvature.figures.frames import by_fork, having, numbers
from lmc_curvature.plotting.style import GREEN, PURPLE, VERMILION
from lmc_curvature.report.charts import BLUE, SYMBOLS, Chart, compact, plain
from lmc_curvature.tracing import Traces

_HUES = (BLUE, VERMILION, GREEN, PURPLE)
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_GEOMETRY = {
    "distance": "distance between siblings",
    "cosine_origin": "cosine, seen from the origin",
    "cosine_fork": "cosine, seen from the fork",
    "cosine_final": "cosine with the final difference",
}
_MAPS = {
    "predicted_anchored": "predicted barrier (anchored)",
    "measured": "measured barrier",
    "expansion_error": "expansion error",
    "predicted": "predicted barrier (second order)",
    "hessian_energy": "Hessian energy ΔᵀHΔ",
    "distance": "distance",
}


def experiment_record(traces: Traces) -> dict[str, Any]:
    """Ridges and maps by fork and epoch, for the page to choose from."""
    return {"ridges": _ridges(traces.curves), "maps": _maps(traces.layers)}


def experiment_charts(traces: Traces) -> dict[str, Chart]:
    """The charts of an experiment by their names."""
    charts = {"growth": _growth(traces), "geometry": _geometry(traces.geometry)}
    return {name: chart for name, chart in charts.items() if chart["data"]}


def _ridges(curves: pd.DataFrame) -> list[dict[str, Any]]:
    """For each metric, split and quantity, the curves of every fork: α, epochs, and heights (epochs, α)."""
    found = []
    for metric in ("loss", "error"):
        for split in sorted(set(curves["split"]), reverse=True):
            rows = having(having(curves, "metric", metric), "split", split)
            for quantity in ("barrier", "value"):
                forks = [_ridge(fork, each, quantity) for fork, each in by_fork(rows).items()]
                if forks:
                    title = f"{'barrier of the ' if quantity == 'barrier' else ''}{metric}, {split} data"
                    found.append({"title": title, "value": quantity == "value", "forks": forks})
    return found


def _ridge(fork: int, rows: pd.DataFrame, quantity: str) -> dict[str, Any]:
    table = rows.pivot_table(index="epoch", columns="alpha", values=quantity)
    alphas, epochs = (np.asarray(axis, dtype=float).tolist() for axis in (table.columns, table.index))
    return {"fork": fork, "alphas": alphas, "epochs": epochs, "heights": compact(table.to_numpy())}


def _maps(layers: pd.DataFrame) -> list[dict[str, Any]]:
    """For each quantity, the map of every fork: layers, epochs, and values (layers, epochs)."""
    found = []
    for column, title in _MAPS.items():
        if column not in layers or not np.isfinite(numbers(layers, column)).any():
            continue
        forks = []
        for fork, rows in by_fork(layers).items():
            names = rows.sort_values(["position"], kind="stable")["layer"].drop_duplicates()
            table = rows.pivot_table(index="layer", columns="epoch", values=column, dropna=False).reindex(names)
            epochs = np.asarray(table.columns, dtype=float).tolist()
            values = compact(table.to_numpy())
            forks.append({"fork": fork, "layers": [plain(str(n)) for n in names], "epochs": epochs, "values": values})
        found.append({"title": title, "forks": forks})
    return found


def _growth(traces: Traces) -> Chart:
    """Barriers of the training loss over epochs: measured, and anchored predictions with their expansion errors."""
    measured = having(having(traces.barriers, "split", "train"), "metric", "loss")
    expansions = set(traces.predictions["expansion"])
    expansion = "anchored" if "anchored" in expansions else "second-order"
    predicted = having(traces.predictions, "expansion", expansion)
    data = []
    for number, (fork, rows) in enumerate(by_fork(measured).items()):
        bars = {"error_y": _errors(rows, "standard_error")}
        data.append(_series(number, rows, "barrier", f"fork {fork}, measured") | bars)
    for number, (fork, rows) in enumerate(by_fork(predicted).items()):
        line = _series(number, rows, "barrier", f"fork {fork}, predicted ({expansion})", dash="dot")
        line["marker"]["symbol"] += "-open"
        data.append(line | ({"error_y": _errors(rows, "expansion_error")} if expansion == "anchored" else {}))
    # Barriers of later forks are lower by orders of magnitude; those of zero have no place.
    axis = {"type": "log", "dtick": 1, "title": {"text": "barrier, log scale"}}
    layout = {"xaxis": {"title": {"text": "epoch"}}, "yaxis": axis}
    last = having(measured, "epoch", measured["epoch"].max())
    said = (f"fork {fork:.0f}: {value:.3g}" for fork, value in zip(last["fork"], last["barrier"], strict=True))
    return {"data": data, "layout": layout, "label": f"Barriers over epochs; measured at the end: {', '.join(said)}"}


def _geometry(geometry: pd.DataFrame) -> Chart:
    data: list[Chart] = []
    layout: Chart = {"grid": {"rows": 2, "columns": 2, "pattern": "independent", "ygap": 0.35, "xgap": 0.16}}
    layout |= {"height": 560, "annotations": []}
    for place, (column, title) in enumerate(_GEOMETRY.items(), 1):
        axis = "" if place == 1 else str(place)
        layout[f"xaxis{axis}"] = {"title": {"text": "epoch" if place > len(_GEOMETRY) - 2 else ""}}
        layout[f"yaxis{axis}"] = {"rangemode": "tozero"} if column == "distance" else {}
        heading = {"text": title, "xref": f"x{axis} domain", "yref": f"y{axis} domain", "x": 0, "y": 1.0}
        layout["annotations"].append(heading | {"xanchor": "left", "yanchor": "bottom", "showarrow": False})
        for number, (fork, rows) in enumerate(by_fork(geometry).items()):
            line = _series(number, rows, column, f"fork {fork}")
            line |= {"xaxis": f"x{axis}", "yaxis": f"y{axis}", "legendgroup": str(fork), "showlegend": place == 1}
            data.append(line)
    return {"data": data, "layout": layout, "label": "Distances and angles between siblings over epochs"}


def _series(number: int, rows: pd.DataFrame, column: str, name: str, dash: str | None = None) -> Chart:
    hue = _HUES[number % len(_HUES)]
    style = {"color": hue, "width": 1.8, "dash": dash or _DASHES[number // len(_HUES) % len(_DASHES)]}
    marker = {"color": hue, "symbol": SYMBOLS[(number + number // len(_HUES)) % len(SYMBOLS)], "size": 7}
    points = {"x": compact(_column(rows, "epoch")), "y": compact(_column(rows, column)), "name": name}
    return {"type": "scatter", "mode": "lines+markers", "line": style, "marker": marker} | points


def _errors(rows: pd.DataFrame, column: str) -> Chart:
    return {"type": "data", "array": compact(np.nan_to_num(_column(rows, column))), "thickness": 1}


def _column(rows: pd.DataFrame, column: str) -> np.ndarray:
    return numbers(rows.sort_values(["epoch"], kind="stable"), column)
