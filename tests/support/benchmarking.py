"""Runs of benchmarks at their smallest size, and checks of their rows."""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import torch

from benchmarks.support import peers

INSTALLED = [peer for peer in ("PyHessian", "BackPACK", "curvlinops") if peers.installed(peer)]


def run(script: str, directory: Path, *words: str) -> dict[str, Any]:
    """The JSON record of a run; its other files are there as well."""
    report = importlib.import_module(f"benchmarks.{script}").main(["--smoke", "--out", str(directory), *words])
    for suffix in (".md", ".png", ".pdf"):
        assert (directory / f"{report.name}{suffix}").stat().st_size > 100
    record = json.loads((directory / f"{report.name}.json").read_text())
    assert record["benchmark"] == report.name
    assert record["setting"]["command"].startswith(f"python -m benchmarks.{script} --smoke")
    assert {"device", "torch", "commit", "dirty"} <= set(record["environment"])
    assert all(bar["met"] in ("yes", "no", "within the spread") for bar in record["bars"])
    return record


def rows(record: dict[str, Any], table: str) -> list[dict[str, Any]]:
    """The rows of a table."""
    return record["tables"][table]["rows"]


def check_roads(found: list[dict[str, Any]], expected: list[str]) -> None:
    """Every expected road has a row, and every row its time, its time in F and its peak."""
    names = [row["road"] for row in found]
    for start in expected:
        assert any(name.startswith(start) for name in names), (start, names)
    for row in found:
        for key in ("ms", "F", "peak_mib"):
            assert math.isfinite(row[key]), row
            assert row[key] > 0, row
        low, high = row["ms_quartiles"]
        assert low <= row["ms"] <= high
        assert row["samples"] >= 1


def check_on_a_gpu(script: str, directory: Path) -> None:
    """A run on a GPU names it, and is right."""
    record = run(script, directory, "--device", "cuda")
    assert record["environment"]["device"] == torch.cuda.get_device_name()
    # What peers compute is theirs to answer for.
    peers_names = ("PyHessian", "BackPACK", "curvlinops")
    for table in record["tables"].values():
        ours = [row for row in table["rows"] if not any(peer in str(row.get("road")) for peer in peers_names)]
        assert all(row["error"] < 1e-3 for row in ours if row.get("error") is not None)
