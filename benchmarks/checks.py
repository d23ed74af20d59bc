"""The cost of the checks that the library makes of itself before it gives away its first number.

The first sweep of an objective captures graphs and checks them; later ones do not. Both are measured, function by
function, in time and in the operations of convolutions and matrix products; the unit is one forward pass F.

    python -m benchmarks.checks [--device cuda] [--quick]
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.support import options, stopwatch, timing
from benchmarks.support.charts import draw_points
from benchmarks.support.problems import Problem, image_problem
from benchmarks.support.report import Bar, Report, new_report, publish
from benchmarks.support.stopwatch import Part
from benchmarks.support.timing import Spread
from lmc_curvature import Objective, project_hessian
from lmc_curvature.agreement import CHECKS
from lmc_curvature.curvature.projection import by_sweep, verification
from lmc_curvature.curvature.sweep import compiled
from lmc_curvature.objective import soundness

SIZES = {
    "full": {"network": "resnet20", "batch": 128, "width": 16, "pixels": 32},
    "quick": {"network": "resnet20", "batch": 128, "width": 8, "pixels": 16},
    "smoke": {"network": "resnet8", "batch": 16, "width": 4, "pixels": 8},
}
ROUNDS = {"full": 5, "quick": 3, "smoke": 1}
CAPTURE = "capture of graphs, which is no check"
SWEEP = "the sweep"
PARTS = [
    Part(compiled, "_network_program", CAPTURE),
    Part(compiled, "_loss_program", CAPTURE),
    Part(soundness, "check_soundness", "random numbers, constants, two evaluations"),
    Part(soundness, "check_copies", "copies"),
    Part(soundness, "check_caches", "caches"),
    Part(soundness, "check_twin", "two networks"),
    Part(soundness, "check_derivatives", "witness"),
    Part(by_sweep, "evaluate_batch", "captured values"),
    Part(by_sweep, "verify", "sweep"),
    Part(by_sweep, "is_current", "captured graphs"),
    Part(verification, "mixes_examples", "mixing"),
]


def main(argv: Sequence[str] | None = None) -> Report:
    """Parse, measure, print and write."""
    chosen = options.parse_options(__file__, __doc__, argv, options.add_network)
    size = options.chosen_size(chosen, SIZES)
    problem = image_problem(**size, device=chosen.device)
    report = new_report(
        chosen,
        "What do the library's checks of itself cost?",
        [
            "Each check without what others take within it. Operations: those of convolutions and matrix products.",
            "All of them beyond a later sweep: time of the first call less capture, less that of a later call.",
        ],
        **size,
        layers=len(problem.directions),
        dtype="float32",
    )
    rows = check_rows(problem, ROUNDS[chosen.size])
    report.add("checks", "A row for each check, in F", rows)
    checks = [row for row in rows if row["check"] not in (CAPTURE, SWEEP)]
    together = checks[-1]
    report.bars.append(Bar("all checks beyond a later sweep, in F", together["F"], "at most", 12))
    report.bars.append(Bar("operations of all checks, in F", together["operations_F"], "at most", 12))
    figure = draw_points({row["check"]: row["F"] for row in rows}, [row["check"] for row in checks], "F")
    return publish(report, chosen, figure)


def check_rows(problem: Problem, rounds: int) -> list[dict[str, Any]]:
    """A row for every check, for all of them together, for capture and for the sweep itself."""
    # The process has its own first times: imports, and kernels that are chosen.
    _first_and_later(problem, stopwatch.watched)
    samples = [_timed(problem) for _ in range(rounds)]
    first, later = (
        {row: Spread.of([sample[number].get(row, 0.0) for sample in samples]) for row in _row_names()}
        for number in range(2)
    )
    beyond = Spread.of([_beyond(*sample) for sample in samples])
    counted = operations(problem)
    rows = [
        {"check": row, "F": first[row], "later_F": later[row], "operations_F": counted[0].get(row, 0.0)}
        for row in _row_names()
    ]
    return [*rows, {"check": "all checks", "F": beyond, "later_F": None, "operations_F": _beyond(*counted)}]


def operations(problem: Problem) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Operations of a first and of a later sweep by row, over those of a forward pass."""
    forward = stopwatch.operations_watched(problem.forward, [], rest="F")["F"]
    first, later = _first_and_later(problem, stopwatch.operations_watched)
    return _over(first, forward), _over(later, forward)


def _timed(problem: Problem) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Times of a first and of a later sweep by row, over that of a forward pass between them."""
    before = timing.sample_seconds(problem.forward, 0.1)
    first, later = _first_and_later(problem, stopwatch.watched)
    forward = (before + timing.sample_seconds(problem.forward, 0.1)) / 2
    return _over(first, forward), _over(later, forward)


def _first_and_later(
    problem: Problem, watch: Callable[..., Mapping[str, float]]
) -> tuple[Mapping[str, float], Mapping[str, float]]:
    state, directions = problem.state, problem.directions
    objective = Objective(problem.model, list(problem.batches), twins=[problem.model])

    def project() -> object:
        return project_hessian(objective, state, directions, method="sweep")

    return watch(project, PARTS, rest=SWEEP), watch(project, PARTS, rest=SWEEP)


def _beyond(first: Mapping[str, float], later: Mapping[str, float]) -> float:
    """What the first sweep takes beyond a later one without capture, and what the later one takes for checks."""
    return sum(first.values()) - first[CAPTURE] - later[SWEEP]


def _over(spent: Mapping[str, float], unit: float) -> Mapping[str, float]:
    return {row: value / unit for row, value in spent.items()}


def _row_names() -> list[str]:
    return [*dict.fromkeys(part.row for part in PARTS), SWEEP]


def promised(row: str) -> float:
    """The cost that the table of checks states for a row, in F."""
    return sum(CHECKS[name].cost for name in row.split(", "))


if __name__ == "__main__":
    main()
