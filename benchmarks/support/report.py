"""The report of a benchmark: its tables and promises, printed, and written as JSON, Markdown and figures."""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.support.environment import environment
from benchmarks.support.tables import markdown_table
from benchmarks.support.timing import Spread
from lmc_curvature.figures import save_figure
from lmc_curvature.storage import write_atomically

Record = Mapping[str, Any]
"""A report as its JSON file holds it."""


@dataclass(frozen=True)
class Table:
    """Rows of results.

    Attributes:
        name: Key in the JSON file.
        title: Caption.
        rows: Values by column (see `tables.COLUMNS`; others are written and not shown). A `Spread` is shown with its
            quartiles.
    """

    name: str
    title: str
    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Bar:
    """A promise of the project about a quantity, and its measured value.

    Attributes:
        what: The quantity.
        measured: Its value; a number stands for a spread without width.
        kind: The side on which the bound lies.
        bound: The promise.
    """

    what: str
    measured: Spread | float
    kind: Literal["at most", "at least"]
    bound: float

    @property
    def spread(self) -> Spread:
        """The measured value and its quartiles."""
        return self.measured if isinstance(self.measured, Spread) else Spread.exactly(self.measured)

    @property
    def verdict(self) -> str:
        """`"yes"`, `"no"`, or `"within the spread"` where a quartile reaches the bound and the median does not."""
        sign, nearest = (1, self.spread.low) if self.kind == "at most" else (-1, self.spread.high)
        if sign * self.spread.median <= sign * self.bound:
            return "yes"
        return "within the spread" if sign * nearest <= sign * self.bound else "no"

    def row(self) -> dict[str, Any]:
        """The row of a table."""
        return {
            "what": self.what,
            "measured": self.spread,
            "bar": f"{'≤' if self.kind == 'at most' else '≥'} {self.bound:g}",
            "bound": self.bound,
            "kind": self.kind,
            "met": self.verdict,
        }


@dataclass
class Report:
    """The findings of a benchmark.

    Attributes:
        name: Stem of the files.
        question: The question that they answer.
        setting: Sizes of what was measured, and the command.
        environment: Machine, versions and commit.
        tables: Results.
        bars: Promises that were checked.
        notes: Remarks for readers.
    """

    name: str
    question: str
    setting: dict[str, Any]
    environment: dict[str, Any]
    tables: list[Table] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add a table."""
        self.tables.append(Table(name, title, rows))

    def record(self) -> dict[str, Any]:
        """The contents of the JSON file."""
        return {
            "benchmark": self.name,
            "question": self.question,
            "environment": self.environment,
            "setting": self.setting,
            "tables": {
                table.name: {"title": table.title, "rows": [_plain(row) for row in table.rows]} for table in self.tables
            },
            "bars": [_plain(bar.row()) for bar in self.bars],
            "notes": self.notes,
        }


def new_report(options: argparse.Namespace, question: str, notes: Sequence[str] = (), **setting: Any) -> Report:
    """An empty report, named after the script and the network that the command line asks for.

    Args:
        options: The command line; see `options.parse_options`.
        question: The question that the benchmark answers.
        notes: Remarks for readers.
        setting: Sizes of what is measured.
    """
    name = "-".join(filter(None, [options.script, getattr(options, "network", None)]))
    setting |= {"size": options.size, "command": options.command}
    return Report(name, question, setting, environment(options.device), notes=list(notes))


def markdown(record: Record) -> list[str]:
    """The lines of a report: where it was measured, its tables, its promises and remarks."""
    tables = [*record["tables"].values(), *([{"title": "Bars", "rows": record["bars"]}] if record["bars"] else [])]
    lines = [measured_at(record), ""]
    for table in (table for table in tables if table["rows"]):
        lines += [f"{table['title']}:", "", *markdown_table(table["rows"]), ""]
    return [*lines, *(f"- {note}" for note in record["notes"])]


def measured_at(record: Record) -> str:
    """A sentence with the command, the commit and the setting."""
    where, setting = record["environment"], record["setting"]
    commit = where["commit"] or "an unknown commit"
    changed = ", with files changed" if where["dirty"] else ""
    words = {**setting, **where}
    listed = ", ".join(
        f"{key} {value}" for key, value in words.items() if key not in ("command", "size", "commit", "dirty")
    )
    return f"`{setting['command']}` at {commit}{changed}: {listed}."


def publish(report: Report, options: argparse.Namespace, figure: Figure | None = None) -> Report:
    """Print a report, and write it as JSON and Markdown, with its figure as PNG and PDF; returns it."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(Markdown(text_of(report)))
    base = write(report, options.out, figure)
    console.print(f"written: {base}.json, .md" + (", .png, .pdf" if figure is not None else ""))
    return report


def text_of(report: Report) -> str:
    """A report as Markdown."""
    return "\n".join(markdown(report.record())).rstrip() + "\n"


def write(report: Report, folder: Path, figure: Figure | None = None) -> Path:
    """Write a report and its figure, each file whole or not at all; returns their path without a suffix."""
    base = folder / report.name
    for suffix, text in (
        (".json", json.dumps(report.record(), indent=2, ensure_ascii=False) + "\n"),
        (".md", text_of(report)),
    ):
        with write_atomically(base.with_suffix(suffix)) as path:
            path.write_text(text)
    if figure is not None:
        save_figure(figure, base)
    return base


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as JSON can hold it: spreads as their medians, with the quartiles beside them."""
    plain: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Spread):
            plain[key] = _finite(value.median)
            plain[f"{key}_quartiles"] = [_finite(value.low), _finite(value.high)]
        else:
            plain[key] = _finite(value) if isinstance(value, float) else value
    return plain


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
