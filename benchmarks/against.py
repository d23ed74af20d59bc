"""Time of the sweep in this checkout beside another one, and the operators that it calls.

Of three networks: ResNet-20 and ResNet-56 on random images, and a small GPT-2 on random tokens. Each checkout has a
process, which is asked for one sweep more when it is its turn. Two sweeps in a row are a pair; every network has the
ratios of its pairs, and all of them the geometric mean of theirs.

Operators are counted by torch's profiler in the sweep of a batch of two examples. Checkouts may cut a batch into tiles
of different sizes, and each tile calls the same operators again; two examples are a single tile to either, so that what
is compared is the sweep of a tile, with what is done once a batch.

    python -m benchmarks.against --other FOLDER [--network resnet56] [--device cuda] [--quick]
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lmc_curvature
from benchmarks.support import options, sweep_once, timing
from benchmarks.support.charts import draw_points
from benchmarks.support.environment import short_commit
from benchmarks.support.report import Bar, Report, new_report, publish
from benchmarks.support.roads import relative_error
from benchmarks.support.timing import Spread

OURS, OTHER = "this checkout", "the other checkout"
_TILE = 2
# Options of `sweep_once` by network.
SIZES = {
    "full": {
        "resnet20": {"batch": 128, "width": 16, "pixels": 32},
        "resnet56": {"batch": 64, "width": 16, "pixels": 32},
        "gpt2": {"batch": 8, "width": 128, "layers": 4, "heads": 4, "vocabulary": 1024, "tokens": 64},
    },
    "quick": {
        "resnet20": {"batch": 32, "width": 16, "pixels": 32},
        "resnet56": {"batch": 8, "width": 8, "pixels": 32},
        "gpt2": {"batch": 4, "width": 64, "layers": 2, "heads": 4, "vocabulary": 256, "tokens": 32},
    },
    "smoke": {
        "resnet8": {"batch": 2, "width": 2, "pixels": 8},
        "gpt2": {"batch": 2, "width": 8, "layers": 1, "heads": 2, "vocabulary": 16, "tokens": 4},
    },
}
PAIRS = {"full": 10, "quick": 3, "smoke": 1}
NOTES = (
    "Ratios are ours over the other's. Those of seconds are of a pair, so that a machine's drift falls out of them; "
    "their bars are on the median of the pairs.",
    "Calls are of one sweep of two examples, a single tile, after the first; operators within operators count, too.",
    "A difference is max |M − M'| / max |M'| of the two checkouts' matrices.",
)


@dataclass(frozen=True)
class Comparison:
    """The sweep of a network by two checkouts.

    Attributes:
        seconds: Of every sweep, by checkout.
        calls: Operators that the sweep of a tile calls, by checkout.
        error: Relative difference of the two matrices.
    """

    seconds: Mapping[str, list[float]]
    calls: Mapping[str, int]
    error: float

    @classmethod
    def of(cls, found: Mapping[str, dict[str, Any]], seconds: Mapping[str, list[float]]) -> "Comparison":
        """The comparison of what `sweep_once` prints first, and later, by checkout."""
        ours, other = (torch.tensor(found[name]["curvature"], dtype=torch.float64) for name in (OURS, OTHER))
        return cls(seconds, {name: first["calls"] for name, first in found.items()}, relative_error(ours, other))

    @property
    def ratios(self) -> list[float]:
        """Our seconds over the other's, pair by pair."""
        return [ours / other for ours, other in zip(self.seconds[OURS], self.seconds[OTHER], strict=True)]

    @property
    def ratio_of_calls(self) -> float:
        """Our operator calls over the other's."""
        return self.calls[OURS] / self.calls[OTHER]


def main(argv: Sequence[str] | None = None) -> Report:
    """Parse, measure, print and write."""
    chosen = options.parse_options(__file__, __doc__, argv, _add_options)
    sizes = SIZES[chosen.size]
    if chosen.network:
        sizes = {chosen.network: sizes[chosen.network]}
    checkouts = {OURS: Path(lmc_curvature.__file__).parents[1], OTHER: chosen.other.resolve()}
    commits = {name: short_commit(folder)["commit"] or "an unknown commit" for name, folder in checkouts.items()}
    report = new_report(
        chosen,
        "How long does the sweep take, beside another checkout?",
        NOTES,
        **{network: ", ".join(f"{key} {value}" for key, value in size.items()) for network, size in sizes.items()},
        pairs=PAIRS[chosen.size],
        other=commits[OTHER],
        dtype="float32",
    )
    found = {
        network: _compare(network, size, checkouts, PAIRS[chosen.size], chosen.device)
        for network, size in sizes.items()
    }
    rows = [row for network, comparison in found.items() for row in _rows(network, comparison, commits)]
    report.add("sweep", "One sweep, and the operators that it calls for a tile", rows)
    report.bars += bars(found)
    points = {f"{row['network']}, {row['road']}": row["seconds"] for row in rows}
    return publish(report, chosen, draw_points(points, [name for name in points if name.endswith(OURS)], "seconds"))


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--other", type=Path, required=True, help="the folder that holds its lmc_curvature/")
    parser.add_argument("--network", choices=list(SIZES["full"]), help="one of the networks; all by default")


def _compare(
    network: str, size: dict[str, Any], checkouts: Mapping[str, Path], pairs: int, device: torch.device
) -> Comparison:
    with contextlib.ExitStack() as processes:
        started = {
            name: processes.enter_context(sweeps_of(folder, network, size, device))
            for name, folder in checkouts.items()
        }
        seconds = timing.in_turns({name: sweep for name, (_, sweep) in started.items()}, pairs)
    return Comparison.of({name: first for name, (first, _) in started.items()}, seconds)


@contextlib.contextmanager
def sweeps_of(
    checkout: Path, network: str, size: dict[str, Any], device: torch.device
) -> Iterator[tuple[dict[str, Any], Callable[[], float]]]:
    """A process of `sweep_once` that finds the library in a checkout, for as long as it is used.

    Yields:
        What it finds first, and a function that has it time one sweep more.

    Raises:
        RuntimeError: It failed, or it found the library elsewhere.
    """
    words = {"network": network, **size, "tile": _TILE, "threads": torch.get_num_threads(), "device": device}
    # Without -P the folder of the file would come before the checkout.
    command = [sys.executable, "-P", sweep_once.__file__, *(f"--{name}={value}" for name, value in words.items())]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=errors, text=True) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        answers = process.stdout

        def answer() -> Any:
            line = answers.readline()
            if not line:
                errors.seek(0)
                raise RuntimeError(f"The sweep of {checkout} failed:\n{errors.read()}")
            return json.loads(line)

        def sweep() -> float:
            print(file=process.stdin, flush=True)
            return answer()

        first = answer()
        if Path(first["checkout"]).resolve() != checkout.resolve():
            raise RuntimeError(f"Python found the library in {first['checkout']} instead of {checkout}.")
        yield first, sweep


def _rows(network: str, comparison: Comparison, commits: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "network": network,
            "road": name,
            "calls": comparison.calls[name],
            "seconds": Spread.of(seconds),
            "over_other": Spread.of(comparison.ratios) if name == OURS else None,
            "calls_over_other": comparison.ratio_of_calls if name == OURS else None,
            "error": comparison.error if name == OURS else None,
            "samples": len(seconds),
            "note": commits[name],
        }
        for name, seconds in comparison.seconds.items()
    ]


def bars(found: Mapping[str, Comparison]) -> list[Bar]:
    """The bars on comparisons by network."""
    together = np.exp(np.mean([np.log(comparison.ratios) for comparison in found.values()], axis=0))
    made = [Bar("geometric mean of all networks' ratios of seconds", Spread.of(together), "at most", 0.95)]
    for network, comparison in found.items():
        made += [
            Bar(f"{network}: ours / the other's, seconds", Spread.of(comparison.ratios), "at most", 1.1),
            Bar(
                f"{network}: ours / the other's, operator calls of a tile", comparison.ratio_of_calls, "at most", 1 / 8
            ),
            Bar(f"{network}: difference of the two matrices, relative", comparison.error, "at most", 1e-5),
        ]
    return made


if __name__ == "__main__":
    main()
