"""Growth of times with a size: curves through rows of roads, and fitted exponents."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.support.charts import Line, Panel


def growth_panel(title: str, size: str, rows: Sequence[dict[str, Any]], *, key: str | None = None) -> Panel:
    """A panel with a curve of milliseconds for each road.

    Args:
        title: The panel's title.
        size: Name of what grows.
        rows: Rows of roads; see `roads.road_row`.
        key: Column of the size; its name by default.
    """
    key = key or size
    lines = []
    for road in dict.fromkeys(row["road"] for row in rows):
        chosen = [row for row in rows if row["road"] == road and row["samples"]]
        xs, ys = [row[key] for row in chosen], [row["ms"] for row in chosen]
        exponent = fitted_exponent(xs, [y.median for y in ys]) if len(xs) > 1 else None
        lines.append(Line(road, xs, ys, exponent))
    return Panel(title, size, "milliseconds", lines)


def exponent_rows(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    """A row for each curve with a fitted exponent."""
    return [
        {"quantity": panel.title, "road": line.label, "exponent": line.exponent}
        for panel in panels
        for line in panel.lines
        if line.exponent is not None
    ]


def fitted_exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The p of y ∝ xᵖ, by least squares on the logarithms."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])
