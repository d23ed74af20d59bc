"""How does the cost of a projection grow with layers, batches and width, by the sweep and by a loop of products?

python -m benchmarks.scaling [--device cuda] [--quick]
"""

from collections.abc import Sequence
from typing import Any

from benchmarks.support.charts import Line, Panel, draw_panels, fitted_exponent
from benchmarks.support.harness import Bar, Column, Report, Table, parse_options, publish, road_row, setting
from benchmarks.support.memory import peak_bytes
from benchmarks.support.problems import Problem, image_problem
from benchmarks.support.timing import Measurement, Road, Spread, measure
from lmc_curvature import project_hessian

METHODS = {"sweep": "sweep", "hvp": "loop of products"}

# What is varied, and what stays the same in the other two series.
SERIES = {
    "full": {"depth": (8, 14, 20, 32, 44, 56), "batches": (1, 2, 4, 8), "width": (4, 8, 16, 32)},
    "quick": {"depth": (8, 14, 20), "batches": (1, 2, 4), "width": (4, 8, 16)},
    "smoke": {"depth": (8, 14), "batches": (1, 2), "width": (2, 4)},
}
BASE = {
    "full": {"depth": 20, "batches": 1, "width": 16, "batch": 64, "pixels": 32},
    "quick": {"depth": 8, "batches": 1, "width": 8, "batch": 16, "pixels": 32},
    "smoke": {"depth": 8, "batches": 1, "width": 2, "batch": 2, "pixels": 8},
}
# For growth with depth and batches there are bars; with width it depends on the processor.
BOUNDS = {"depth": 2.0, "batches": 1.1}

COLUMNS = (
    Column("at", "at"),
    Column("layers", "layers"),
    Column("road", "road"),
    Column("ms", "ms [quartiles]"),
    Column("F", "F [quartiles]"),
    Column("peak_mib", "peak, MiB"),
    Column("peak_gradients", "peak / gradient's", 2),
    Column("samples", "samples"),
    Column("note", "note"),
)


def main(argv: Sequence[str] | None = None) -> Report:
    """Parse, measure, print and write."""
    options = parse_options(__file__, __doc__, argv)
    base = BASE[options.size]
    report = Report(
        "scaling",
        "How does the cost of a projection grow?",
        setting(options, network="residual, for 32 × 32 images", **base, dtype="float32"),
        notes=["F is one forward pass over all batches; it grows with depth, batches and width itself."],
    )
    # A series at a time: what is compared is measured close together.
    panels = []
    for quantity, values in SERIES[options.size].items():
        problems = {value: _problem({**base, quantity: value}, options.device) for value in values}
        found = measure(
            [road for value, problem in problems.items() for road in _roads(value, problem)],
            options.pace,
            options.device,
        )
        rows = [row for value, problem in problems.items() for row in _rows(value, problem, found)]
        report.tables.append(Table(quantity, f"Growth with {quantity}", COLUMNS, rows))
        panels.append(_panel(quantity, rows))
    report.tables.append(_exponents(panels))
    report.bars += _bars(panels)
    return publish(report, options, draw_panels(panels))


def _problem(size: dict[str, int], device: Any) -> Problem:
    options: dict[str, Any] = dict(size)
    return image_problem(f"resnet{options.pop('depth')}", device=device, **options)


def _roads(value: int, problem: Problem) -> list[Road]:
    def road(method: str) -> Road:
        def run() -> object:
            return project_hessian(problem.objective, problem.state, problem.directions, method=method)

        return Road(_name(method, value), run, problem.forward, warms_up=method == "sweep")

    return [road(method) for method in METHODS]


def _name(method: str, value: int) -> str:
    return f"{METHODS[method]} at {value}"


def _rows(value: int, problem: Problem, found: dict[str, Measurement]) -> list[dict[str, Any]]:
    gradient_peak = peak_bytes(problem.forward_backward, problem.device)
    return [
        {
            **road_row(found[_name(method, value)], gradient_peak=gradient_peak),
            "at": value,
            "layers": len(problem.directions),
            "road": METHODS[method],
        }
        for method in METHODS
    ]


def _panel(quantity: str, rows: Sequence[dict[str, Any]]) -> Panel:
    """Time over what is varied (layers, where that is the depth), a curve a road."""
    key = "layers" if quantity == "depth" else "at"
    lines = []
    for label in METHODS.values():
        chosen = [row for row in rows if row["road"] == label and row["samples"]]
        xs, ys = [row[key] for row in chosen], [row["ms"] for row in chosen]
        lines.append(Line(label, xs, ys, fitted_exponent(xs, [y.median for y in ys]) if len(xs) > 1 else None))
    return Panel(quantity, "layers" if quantity == "depth" else quantity, "milliseconds", lines)


def _exponents(panels: Sequence[Panel]) -> Table:
    rows = [
        {"quantity": panel.xlabel, "road": line.label, "exponent": line.exponent}
        for panel in panels
        for line in panel.lines
        if line.exponent is not None
    ]
    columns = (Column("quantity", "time grows with"), Column("road", "road"), Column("exponent", "exponent"))
    return Table("exponents", "Fitted exponents, by least squares on logarithms", columns, rows)


def _bars(panels: Sequence[Panel]) -> list[Bar]:
    bars = []
    for panel in panels:
        exponent = panel.lines[0].exponent
        if panel.title in BOUNDS and exponent is not None:
            measured = Spread(exponent, exponent, exponent)
            bars.append(Bar(f"sweep: exponent in {panel.xlabel}", measured, "at most", BOUNDS[panel.title]))
    return bars


if __name__ == "__main__":
    main()
