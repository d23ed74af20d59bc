"""Growth of a projection's cost with layers, batches and width, by the sweep and by a loop of products.

python -m benchmarks.scaling [--device cuda] [--quick]
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.support import growth, options, timing
from benchmarks.support.charts import Panel, draw_panels
from benchmarks.support.problems import Problem, image_problem
from benchmarks.support.report import Bar, Report, new_report, publish
from benchmarks.support.roads import eager_forward, road_row
from lmc_curvature import project_hessian

METHODS = {"sweep": "sweep", "hvp": "loop of products"}

# The values of the quantity that varies in a series; the other two stay as in BASE.
SERIES = {
    "full": {"depth": (8, 14, 20, 32, 44, 56), "batches": (1, 2, 4, 8), "width": (4, 8, 16, 32)},
    "quick": {"depth": (8, 14, 20), "batches": (1, 2, 4), "width": (4, 8, 16)},
    "smoke": {"depth": (8, 14), "batches": (1, 2), "width": (2,)},
}
BASE = {
    "full": {"depth": 20, "batches": 1, "width": 16, "batch": 64, "pixels": 32},
    "quick": {"depth": 8, "batches": 1, "width": 8, "batch": 16, "pixels": 32},
    "smoke": {"depth": 8, "batches": 1, "width": 2, "batch": 2, "pixels": 8},
}
# For growth with depth and batches there are bars; with width it depends on the processor.
BOUNDS = {"layers": 2.0, "batches": 1.1}


def main(argv: Sequence[str] | None = None) -> Report:
    """Parse, measure, print and write."""
    chosen = options.parse_options(__file__, __doc__, argv)
    base = BASE[chosen.size]
    report = new_report(
        chosen,
        "How does the cost of a projection grow?",
        ["F is one forward pass over all batches; it grows with depth, batches and width itself."],
        network="residual, for 32 × 32 images",
        **base,
        dtype="float32",
    )
    # A series at a time: what is compared is measured close together.
    panels = []
    for quantity, values in SERIES[chosen.size].items():
        problems = {value: _problem({**base, quantity: value}, chosen.device) for value in values}
        roads = {
            (value, method): _road(value, method, problem) for value, problem in problems.items() for method in METHODS
        }
        roads |= {
            (value, "eager"): dataclasses.replace(road, name=f"{road.name}, at {value}")
            for value, problem in problems.items()
            for road in eager_forward(problem)
        }
        found = timing.measure(list(roads.values()), chosen.pace, chosen.device)
        rows = [
            {
                **road_row(found[road.name], problems[value]),
                "at": value,
                "layers": len(problems[value].directions),
                "road": METHODS.get(method, "forward pass, eager"),
            }
            for (value, method), road in roads.items()
        ]
        report.add(quantity, f"Growth with {quantity}", rows)
        size, key = ("layers", "layers") if quantity == "depth" else (quantity, "at")
        panels.append(growth.growth_panel(size, size, rows, key=key))
    report.add("exponents", "Exponents of time, by least squares on logarithms", growth.exponent_rows(panels))
    report.bars += _bars(panels)
    return publish(report, chosen, draw_panels(panels))


def _problem(size: dict[str, int], device: torch.device) -> Problem:
    sizes: dict[str, Any] = dict(size)
    return image_problem(f"resnet{sizes.pop('depth')}", device=device, **sizes)


def _road(value: int, method: str, problem: Problem) -> timing.Road:
    def run() -> object:
        return project_hessian(problem.objective, problem.state, problem.directions, method=method)

    return timing.Road(f"{METHODS[method]} at {value}", run, problem.forward, warms_up=method == "sweep")


def _bars(panels: Sequence[Panel]) -> list[Bar]:
    """Bars on the sweep's exponents, which are those of the first curves."""
    return [
        Bar(f"sweep: exponent in {panel.title}", panel.lines[0].exponent, "at most", BOUNDS[panel.title])
        for panel in panels
        if panel.title in BOUNDS and panel.lines[0].exponent is not None
    ]


if __name__ == "__main__":
    main()
