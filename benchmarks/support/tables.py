"""Tables of results as Markdown: which columns exist, and how a number is written."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
"""Values by column, as JSON holds them: numbers, text, and quartiles of a column under its name and `_quartiles`."""


@dataclass(frozen=True)
class Column:
    """The heading of a column, and significant digits of its numbers."""

    heading: str
    digits: int = 3


# By key, in the order in which tables show them.
COLUMNS = {
    "benchmark": Column("benchmark"),
    "section": Column("section"),
    "what": Column("what"),
    "step": Column("step"),
    "check": Column("check"),
    "operation": Column("operation"),
    "command": Column("command"),
    "quantity": Column("of"),
    "parameters": Column("parameters"),
    "network": Column("network"),
    "at": Column("at"),
    "layers": Column("layers"),
    "siblings": Column("siblings"),
    "processes": Column("processes"),
    "threads": Column("threads each"),
    "dtype": Column("precision"),
    "road": Column("road"),
    "calls": Column("calls"),
    "ms": Column("ms"),
    "seconds": Column("seconds"),
    "F": Column("F"),
    "later_F": Column("F, later"),
    "operations_F": Column("operations, F"),
    "share": Column("share"),
    "kernel_seconds": Column("seconds in kernels"),
    "budget_mib": Column("budget, MiB"),
    "ratio": Column("times as fast as the first"),
    "multiple": Column("in units"),
    "over_other": Column("over the other's"),
    "calls_over_other": Column("calls over the other's"),
    "rate": Column("images a second"),
    "in_products": Column("in products"),
    "residual": Column("worst residual", 2),
    "accuracy": Column("Wasserstein-1 / width", 2),
    "effort": Column("probes × steps"),
    "products": Column("products"),
    "peak_mib": Column("peak, MiB"),
    "peak_gradients": Column("peak / gradient's", 2),
    "error": Column("error", 2),
    "exponent": Column("exponent"),
    "samples": Column("samples"),
    "measured": Column("measured"),
    "bar": Column("bar"),
    "met": Column("met"),
    "note": Column("note"),
}


def markdown_table(rows: Sequence[Row]) -> list[str]:
    """The lines of a table, without the columns in which no row has a value."""
    cells = {key: [cell(row, key) for row in rows] for key in COLUMNS}
    shown = {key: column for key, column in cells.items() if any(column)}
    lines = [[COLUMNS[key].heading for key in shown], ["---"] * len(shown), *zip(*shown.values(), strict=True)]
    return ["| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines]


def cell(row: Row, key: str) -> str:
    """The text of a value in a row, with its quartiles in brackets where they are known and differ."""
    digits = COLUMNS[key].digits
    text = number_text(row.get(key), digits)
    low, high = row.get(f"{key}_quartiles") or (None, None)
    if not text or low == high:
        return text
    return f"{text} [{number_text(low, digits)}, {number_text(high, digits)}]"


def number_text(value: Any, digits: int = 3) -> str:
    """A number to some significant digits, without an exponent unless it is tiny or huge; other values as they are."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    power = math.floor(math.log10(abs(value)))
    if not -4 < power < 7:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(digits - 1 - power, 0)}f}"
