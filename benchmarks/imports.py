"""Time to import the library, and until the command line answers.

Each is the time of a process, and the processes take turns. The unit is the import of torch, numpy and scipy.sparse,
which the library needs. The command line runs as `python -m lmc_curvature`.

    python -m benchmarks.imports [--quick]
"""

import functools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import lmc_curvature
from benchmarks.support import options, timing
from benchmarks.support.charts import draw_points
from benchmarks.support.report import Bar, Report, new_report, publish
from benchmarks.support.timing import Spread

UNIT = "import torch, numpy, scipy.sparse"
OURS = "from lmc_curvature import predict_barrier"
MISTYPED = "lmc-curvature predcit"
COMMANDS = ("lmc-curvature --help", "lmc-curvature --version", MISTYPED)
ROUNDS = {"full": 11, "quick": 3, "smoke": 1}


def main(argv: Sequence[str] | None = None) -> Report:
    """Parse, measure, print and write."""
    chosen = options.parse_options(__file__, __doc__, argv)
    report = new_report(
        chosen,
        "How long do imports and the command line take?",
        [f"{MISTYPED} is mistyped, and refused. In units: times over that of {UNIT}, round by round."],
        rounds=ROUNDS[chosen.size],
    )
    words = {line: [sys.executable, "-c", line] for line in (UNIT, OURS)}
    words |= {line: [sys.executable, "-m", "lmc_curvature", *line.split()[1:]] for line in COMMANDS}
    runs = {line: functools.partial(_run, each, fails=line == MISTYPED) for line, each in words.items()}
    for run in runs.values():
        run()
    found = timing.seconds_in_turns(runs, ROUNDS[chosen.size])
    multiples = {
        name: Spread.of([each / unit for each, unit in zip(seconds, found[UNIT], strict=True)])
        for name, seconds in found.items()
    }
    rows = [
        {"command": name, "seconds": Spread.of(each), "multiple": multiples[name], "samples": len(each)}
        for name, each in found.items()
    ]
    report.add("imports", "A process each", rows)
    report.bars.append(Bar(f"{OURS} / {UNIT}", multiples[OURS], "at most", 1.1))
    report.bars += [Bar(f"{line}, seconds", Spread.of(found[line]), "at most", 1.0) for line in COMMANDS]
    figure = draw_points({row["command"]: row["seconds"] for row in rows}, [OURS, *COMMANDS], "seconds")
    return publish(report, chosen, figure)


def _run(words: Sequence[str], *, fails: bool) -> None:
    """Wait for a process that finds the library where this one has found it."""
    environment = {**os.environ, "PYTHONPATH": str(Path(lmc_curvature.__file__).parents[1])}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if bool(done.returncode) != fails:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    main()
