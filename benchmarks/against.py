"""Time of the sweep of ResNet-20 in this checkout beside another one.

Both are measured in pairs of processes that take turns, each by the median of some sweeps after the first.

    python -m benchmarks.against --other FOLDER [--device cuda] [--quick]
"""

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import lmc_curvature
from benchmarks.support import options, sweep_once, timing
from benchmarks.support.charts import draw_points
from benchmarks.support.environment import short_commit
from benchmarks.support.report import Bar, Report, new_report, publish
from benchmarks.support.roads import relative_error
from benchmarks.support.timing import Spread

OURS, OTHER = "this checkout", "the other checkout"
SIZES = {
    "full": {"network": "resnet20", "batch": 128, "width": 16, "pixels": 32, "calls": 5, "pairs": 10},
    "quick": {"network": "resnet20", "batch": 32, "width": 16, "pixels": 32, "calls": 3, "pairs": 3},
    "smoke": {"network": "resnet20", "batch": 2, "width": 2, "pixels": 8, "calls": 1, "pairs": 1},
}


def main(argv: Sequence[str] | None = None) -> Report:
    """Parse, measure, print and write."""
    chosen = options.parse_options(__file__, __doc__, argv, _add_options)
    size = options.chosen_size(chosen, SIZES)
    checkouts = {OURS: Path(lmc_curvature.__file__).parents[1], OTHER: chosen.other.resolve()}
    commits = {name: short_commit(folder)["commit"] or "an unknown commit" for name, folder in checkouts.items()}
    report = new_report(
        chosen,
        "How long does the sweep take, beside another checkout?",
        ["The bar is on the median of the ratios of pairs, and the matrices are compared."],
        **size,
        other=commits[OTHER],
        dtype="float32",
    )
    runs = {name: functools.partial(sweep_in, folder, size, chosen.device) for name, folder in checkouts.items()}
    found = timing.in_turns(runs, size["pairs"])
    seconds = {name: [each["seconds"] for each in results] for name, results in found.items()}
    rows = [
        {"road": name, "seconds": Spread.of(each), "samples": len(each), "note": commits[name]}
        for name, each in seconds.items()
    ]
    report.add("sweep", "One sweep", rows)
    ratios = [ours / other for ours, other in zip(seconds[OURS], seconds[OTHER], strict=True)]
    matrices = [torch.tensor(found[name][0]["curvature"], dtype=torch.float64) for name in (OURS, OTHER)]
    report.bars += [
        Bar("sweep: ours / the other's", Spread.of(ratios), "at most", 1.05),
        Bar("difference of the two matrices, relative", relative_error(*matrices), "at most", 1e-5),
    ]
    return publish(report, chosen, draw_points({row["road"]: row["seconds"] for row in rows}, [OURS], "seconds"))


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--other", type=Path, required=True, help="the folder that holds its lmc_curvature/")


def sweep_in(checkout: Path, size: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The results of `sweep_once` in a process that finds the library in a checkout."""
    words = [f"--{name}={size[name]}" for name in ("batch", "width", "pixels", "calls")]
    # Without -P the folder of the file would come before the checkout.
    command = [sys.executable, "-P", sweep_once.__file__, *words, f"--threads={torch.get_num_threads()}"]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run([*command, f"--device={device}"], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The sweep of {checkout} failed:\n{done.stderr}")
    result = json.loads(done.stdout.splitlines()[-1])
    if Path(result["checkout"]).resolve() != checkout.resolve():
        raise RuntimeError(f"Python found the library in {result['checkout']} instead of {checkout}.")
    return result


if __name__ == "__main__":
    main()
