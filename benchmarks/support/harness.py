"""What all benchmarks share: options, tables, bars, and how a report is printed and written."""

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.support.timing import PACES, Measurement, Pace, Spread
from lmc_curvature.figures.files import save_figure

Value = float | int | str | bool | Spread | None


@dataclass(frozen=True)
class Column:
    """A column of a table: the key in its rows, the heading, and digits of its numbers."""

    key: str
    heading: str
    digits: int = 3


ROAD_COLUMNS = (
    Column("road", "road"),
    Column("ms", "ms [quartiles]"),
    Column("F", "F [quartiles]"),
    Column("peak_mib", "peak, MiB"),
    Column("peak_gradients", "peak / gradient's", 2),
    Column("error", "error", 2),
    Column("samples", "samples"),
    Column("note", "note"),
)


@dataclass(frozen=True)
class Table:
    """Rows of numbers under named columns.

    Attributes:
        name: Key in the JSON file.
        title: Caption.
        columns: What is shown.
        rows: Values by key; `Spread` is shown with its quartiles. They may hold more than is shown.
    """

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]

    def cells(self) -> list[list[str]]:
        """The text of every shown cell, a list a row."""
        return [[_text(row.get(column.key), column.digits) for column in self.columns] for row in self.rows]

    def shown(self) -> "Table":
        """The same without columns that are empty."""
        columns = [column for column in self.columns if any(_text(row.get(column.key)) for row in self.rows)]
        return Table(self.name, self.title, columns, self.rows)


@dataclass(frozen=True)
class Bar:
    """A number that the project has promised, and what was measured.

    Attributes:
        what: The quantity.
        measured: Its value.
        kind: Whether the bound is an upper or a lower one.
        bound: The promise.
    """

    what: str
    measured: Spread
    kind: Literal["at most", "at least"]
    bound: float

    @property
    def verdict(self) -> str:
        """`"yes"`, `"no"`, or `"within the spread"` where a quartile reaches the bound and the median does not."""
        sign = 1 if self.kind == "at most" else -1
        nearest = self.measured.low if self.kind == "at most" else self.measured.high
        if sign * self.measured.median <= sign * self.bound:
            return "yes"
        return "within the spread" if sign * nearest <= sign * self.bound else "no"

    def row(self) -> dict[str, Any]:
        """As a row of a table."""
        sign = "≤" if self.kind == "at most" else "≥"
        return {
            "what": self.what,
            "measured": self.measured,
            "bar": f"{sign} {self.bound:g}",
            "bound": self.bound,
            "kind": self.kind,
            "met": self.verdict,
        }


@dataclass
class Report:
    """What a benchmark found.

    Attributes:
        name: Of the files.
        question: What it asks.
        setting: What it was measured on.
        tables: Results.
        bars: Promises it can check.
        notes: What a reader should know.
    """

    name: str
    question: str
    setting: dict[str, Any]
    tables: list[Table] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def all_tables(self) -> list[Table]:
        """The tables as they are shown, the bars last."""
        columns = (Column("what", "what"), Column("measured", "measured"), Column("bar", "bar"), Column("met", "met"))
        bars = [Table("bars", "Bars", columns, [bar.row() for bar in self.bars])] if self.bars else []
        return [table.shown() for table in (*self.tables, *bars)]

    def record(self) -> dict[str, Any]:
        """What the JSON file holds."""
        return {
            "benchmark": self.name,
            "question": self.question,
            "setting": self.setting,
            "tables": {table.name: [_plain(row) for row in table.rows] for table in self.tables},
            "bars": [_plain(bar.row()) for bar in self.bars],
            "notes": self.notes,
        }

    def markdown(self) -> str:
        """The tables for a page of documentation."""
        lines = [f"`{self.setting['command']}`", "", _sentence(self.setting), ""]
        for table in self.all_tables():
            lines += [
                f"{table.title}:",
                "",
                _markdown_row([column.heading for column in table.columns]),
                _markdown_row(["---"] * len(table.columns)),
                *(_markdown_row(cells) for cells in table.cells()),
                "",
            ]
        return "\n".join([*lines, *(f"- {note}" for note in self.notes)]).rstrip() + "\n"


def parse_options(
    script: str,
    description: str | None,
    argv: Sequence[str] | None,
    add: Callable[[argparse.ArgumentParser], Any] = lambda parser: None,
) -> argparse.Namespace:
    """Read the command line: options that all benchmarks have, and those that `add` adds.

    Args:
        script: Path of the script.
        description: Its docstring.
        argv: Words of the command line; None for the program's own.
        add: Adds options to the parser.

    Returns:
        The options; besides them `size` (`"full"`, `"quick"` or `"smoke"`), `pace`, and `command` as it was typed.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", type=torch.device, help="cpu, cuda, cuda:1, …")
    parser.add_argument("--threads", type=int, help="of a CPU; torch's choice by default")
    parser.add_argument("--quick", action="store_true", help="smaller networks and batches, timed more briefly")
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="where JSON, tables and figures go")
    add(parser)
    options = parser.parse_args(argv)
    options.size = "smoke" if options.smoke else "quick" if options.quick else "full"
    options.pace = PACES[options.size]
    options.command = " ".join(["python", f"benchmarks/{Path(script).name}", *_without_out(argv)])
    if options.threads:
        torch.set_num_threads(options.threads)
    # Every road in plain single precision: TF32 keeps ten bits, and libraries differ in who switches it off.
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    return options


def _without_out(argv: Sequence[str] | None) -> list[str]:
    """The words of the command line that have a part in what is measured."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out")
    return parser.parse_known_args(argv)[1]


def add_network(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose a network and a batch."""
    parser.add_argument("--network", help="resnet8, resnet14, resnet20, …, or torchvision's resnet18")
    parser.add_argument("--batch", type=int, help="examples in a batch")


def chosen_size(options: argparse.Namespace, sizes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What to build: the size for `options.size`, with the network and batch that the command line names."""
    size = dict(sizes[options.size])
    size |= {key: value for key in ("network", "batch") if (value := getattr(options, key))}
    if size["network"] == "resnet18":
        # Its width is its own.
        size.pop("width")
    return size


def setting(options: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """What was measured on, for the report."""
    cuda = options.device.type == "cuda"
    device = {"device": torch.cuda.get_device_name(options.device) if cuda else "cpu"}
    threads = {} if cuda else {"threads": torch.get_num_threads()}
    return {**more, **device, **threads, "torch": torch.__version__, "size": options.size, "command": options.command}


def road_row(
    measurement: Measurement, *, gradient_peak: float | None = None, error: float | None = None
) -> dict[str, Any]:
    """The row of a road, for `ROAD_COLUMNS`.

    Args:
        measurement: Of the road.
        gradient_peak: Bytes that a gradient has allocated at its peak, the unit of peaks.
        error: Of the road's result, relative.
    """
    notes = [measurement.road.note, measurement.failure, "first call only" if measurement.first_call_only else ""]
    time, peak = measurement.time, measurement.peak
    row: dict[str, Any] = {
        "road": measurement.road.name,
        "ms": Spread(1000 * time.median, 1000 * time.low, 1000 * time.high),
        "F": measurement.in_forwards,
        "peak_mib": None if peak is None else peak / 2**20,
        "peak_gradients": None if peak is None or not gradient_peak else peak / gradient_peak,
        "error": error,
        "samples": len(measurement.seconds),
        "note": "; ".join(note for note in notes if note),
    }
    return {key: value for key, value in row.items() if value is not None}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest |found − expected| over the largest |expected|, in float64."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).abs().max() / expected.abs().max())


def publish(report: Report, options: argparse.Namespace, figure: Figure | None = None) -> Report:
    """Print a report, and write it as JSON and Markdown, with its figure as PNG and PDF; returns it."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(_sentence(report.setting), style="dim")
    for table in report.all_tables():
        console.print(_rich_table(table))
    for note in report.notes:
        console.print(f"• {note}", highlight=False)
    options.out.mkdir(parents=True, exist_ok=True)
    base = options.out / report.name
    base.with_suffix(".json").write_text(json.dumps(report.record(), indent=2, ensure_ascii=False) + "\n")
    base.with_suffix(".md").write_text(report.markdown())
    if figure is not None:
        save_figure(figure, base)
    console.print(f"written: {base}.json, .md" + (", .png, .pdf" if figure is not None else ""))
    return report


def _rich_table(table: Table) -> RichTable:
    shown = RichTable(title=table.title, title_justify="left", box=box.SIMPLE_HEAD)
    for number, column in enumerate(table.columns):
        words = number == 0 or column.key in ("note", "bar", "met")
        shown.add_column(column.heading, justify="left" if words else "right", no_wrap=column.key != "note")
    for cells in table.cells():
        shown.add_row(*cells)
    return shown


def _text(value: Value, digits: int = 3) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, Spread):
        median = _text(value.median, digits)
        if not median or value.low == value.high:
            return median
        return f"{median} [{_text(value.low, digits)}, {_text(value.high, digits)}]"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return _number(value, digits)
    return str(value)


def _number(value: float, digits: int) -> str:
    """A number to some significant digits, without an exponent unless it is tiny or huge."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    power = math.floor(math.log10(abs(value)))
    if not -4 < power < 7:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(digits - 1 - power, 0)}f}"


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


def _sentence(setting: Mapping[str, Any]) -> str:
    """The setting in one line."""
    return ", ".join(f"{key} {value}" for key, value in setting.items() if key not in ("command", "size"))


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


__all__ = [
    "ROAD_COLUMNS",
    "Bar",
    "Column",
    "Pace",
    "Report",
    "Table",
    "add_network",
    "chosen_size",
    "parse_options",
    "publish",
    "relative_error",
    "road_row",
    "setting",
]
