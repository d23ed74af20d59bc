import argparse
import dataclasses
import json
import math
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks import on_gpu
from benchmarks.support.report import Bar, Report
from tests.support.benchmarking import rows, run

NAMES = [section.name for section in on_gpu.SECTIONS]


@pytest.mark.check
def test_all_sections_on_a_cpu(tmp_path):
    record = run("on_gpu", tmp_path, "--device", "cpu", "--seconds", "480")
    found = {row["section"]: row for row in rows(record, "sections")}
    assert list(found) == NAMES
    assert not any(row["note"] for row in found.values()), found
    sections = {name: json.loads((tmp_path / f"on_gpu-{name}.json").read_text()) for name in NAMES}
    for name, section in sections.items():
        assert section["benchmark"] == f"on_gpu-{name}"
        assert (tmp_path / f"on_gpu-{name}.md").stat().st_size > 100
    # The overview has every bar of every section.
    assert len(record["bars"]) == sum(len(section["bars"]) for section in sections.values())
    assert {row["road"] for row in rows(sections["projection-resnet20"], "roads")} >= {"sweep"}
    assert rows(sections["projection-resnet20"], "occupation")[0]["share"] > 0.1
    assert [row["road"] for row in rows(sections["barriers"], "occupation")] == ["predict_barrier", "measure_barrier"]
    assert all(row["peak_mib"] < row["budget_mib"] for row in rows(sections["memory"], "peaks"))
    assert any("compiler takes minutes" in note for note in sections["products"]["notes"])


def _run_of(tmp_path, seconds):
    chosen = argparse.Namespace(
        out=tmp_path, script="on_gpu", size="smoke", command="", device=torch.device("cpu"), seconds=seconds, only=None
    )
    return on_gpu.Run(chosen, on_gpu.SIZES["smoke"], on_gpu.clock() + seconds)


def _overview():
    return Report("on_gpu", "?", {"size": "smoke", "command": ""}, {"commit": None, "dirty": None})


def _sectioned(tmp_path, work, *, seconds=48.0, expected=10.0):
    overview, found = _overview(), []
    section = on_gpu.Section("part", "?", expected, work)
    on_gpu._run_section(_run_of(tmp_path, 480.0), section, seconds, overview, found)
    return overview, found[0]


def test_a_section_that_fails_keeps_what_it_has_found(tmp_path):
    def work(run, report, until):
        report.add("table", "A table", [{"what": "first", "seconds": 1.0}])
        report.bars.append(Bar("half", 0.5, "at most", 1.0))
        raise ValueError("no\nsecond line")

    overview, row = _sectioned(tmp_path, work)
    assert row["note"] == "ended by ValueError: no"
    assert [bar.what for bar in overview.bars] == ["part: half"]
    assert json.loads((tmp_path / "on_gpu-part.json").read_text())["tables"]["table"]["rows"]


def test_a_section_that_takes_too_long_is_interrupted(tmp_path):
    def work(run, report, until):
        try:
            time.sleep(30)
        except Exception:  # noqa: BLE001
            pytest.fail("an interruption is no error that a road may catch")

    begun = time.monotonic()
    _, row = _sectioned(tmp_path, work, seconds=0.4, expected=1.0)
    assert time.monotonic() - begun < 10
    assert row["note"].startswith("interrupted")


def test_a_section_without_time_is_skipped(tmp_path):
    def work(run, report, until):
        pytest.fail("it was begun")

    _, row = _sectioned(tmp_path, work, seconds=2.0, expected=10.0)
    assert row["note"] == "skipped: 2 s were left for it"
    assert not list(tmp_path.iterdir())


def test_outcomes_of_a_run_of_tests_that_did_not_end():
    log = """
tests/test_a.py::test_one[x y] PASSED   [ 20%]
tests/test_a.py::test_two FAILED        [ 40%]
tests/test_b.py::test_three SKIPPED (needs a CUDA device) [ 60%]
tests/test_b.py::test_four ERROR        [ 80%]
tests/test_b.py::test_five
ERROR tests/test_c.py - ModuleNotFoundError: No module named 'beartype'
"""
    counts, failed = on_gpu.outcomes(log)
    assert counts == {"passed": 1, "failed": 1, "skipped": 1, "error": 2}
    assert failed == ["tests/test_a.py::test_two", "tests/test_b.py::test_four", "tests/test_c.py"]
    by_several = """
tests/test_a.py::test_one[x y]
[gw1] [ 20%] PASSED tests/test_a.py::test_one[x y]
[gw0] [ 40%] FAILED tests/test_a.py::test_two
"""
    counts, failed = on_gpu.outcomes(by_several)
    assert counts == {"passed": 1, "failed": 1, "skipped": 0, "error": 0}
    assert failed == ["tests/test_a.py::test_two"]


@pytest.mark.check
def test_tests_that_did_not_run_have_not_passed(tmp_path):
    run = dataclasses.replace(_run_of(tmp_path, 480.0), size={"tests": ("tests/nowhere.py",)})
    report = _overview()
    on_gpu.run_tests(run, report, on_gpu.clock() + 60)
    assert not report.bars
    assert any("none ran" in note for note in report.notes)


def test_shares_are_of_a_whole_run():
    assert math.isclose(sum(section.seconds for section in on_gpu.SECTIONS), 480)


@pytest.mark.check
def test_a_run_that_is_killed_keeps_what_it_has(tmp_path):
    words = ["--smoke", "--device", "cpu", "--only", "memory", "barriers", "--out", str(tmp_path)]
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.on_gpu", *words], cwd=on_gpu.ROOT)
    overview, end = tmp_path / "on_gpu.json", time.monotonic() + 120
    while not overview.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    process.kill()
    process.wait()
    record = json.loads(overview.read_text())
    assert rows(record, "sections")[0]["section"] == "memory"
    assert rows(json.loads((tmp_path / "on_gpu-memory.json").read_text()), "peaks")


@pytest.mark.check
@pytest.mark.parametrize("name", ["projection-resnet20", "products", "memory", "barriers", "language", "spectrum"])
def test_a_section_whose_time_is_over_ends_at_once_and_promises_nothing(name, tmp_path):
    (section,) = (section for section in on_gpu.SECTIONS if section.name == name)
    run, overview, found = _run_of(tmp_path, 480.0), _overview(), []
    late = dataclasses.replace(section, run=lambda run, report, until: section.run(run, report, on_gpu.clock() - 1))
    on_gpu._run_section(run, late, 200.0, overview, found)
    assert not found[0]["note"]
    assert not [bar.what for bar in overview.bars if "sweep" in bar.what or math.isnan(bar.spread.median)]
    record = json.loads((tmp_path / f"on_gpu-{name}.json").read_text())
    roads = [row for table in record["tables"].values() for row in table["rows"] if "samples" in row]
    assert all(row["note"] == "no time was left" for row in roads)


def test_what_is_warned_of_is_in_the_report(tmp_path):
    def work(run, report, until):
        for _ in range(2):
            warnings.warn("aten::nonzero cannot be captured.\nMore.", stacklevel=1)

    _sectioned(tmp_path, work)
    record = json.loads((tmp_path / "on_gpu-part.json").read_text())
    assert record["notes"] == ["Warning: aten::nonzero cannot be captured."]


def test_what_cannot_be_compiled_ends_nothing(tmp_path, monkeypatch):
    run = _run_of(tmp_path, 480.0)

    def fails(network):
        raise ModuleNotFoundError(f"no network {network}")

    monkeypatch.setattr(run, "problem", fails)
    notes = on_gpu._start_compilers(run, ["products", "growth"])
    assert notes == ["Compiled peers of products are missing: ModuleNotFoundError: no network resnet20"]
    assert run.elsewhere == {}


@pytest.mark.check
def test_it_is_imported_without_what_may_be_missing():
    missing = ["pydantic", "beartype", "backpack", "curvlinops", "pyhessian", "transformers", "typer", "hypothesis"]
    missing += ["yaml", "sklearn", "torchvision"]
    code = f"""
import sys
for name in {missing}:
    sys.modules[name] = None
from benchmarks import on_gpu
from lmc_curvature import measure_barrier, predict_barrier, project_hessian
"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(on_gpu.__file__).parents[1], check=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_section_on_a_gpu(tmp_path):
    record = run("on_gpu", tmp_path, "--device", "cuda", "--only", "memory")
    assert [row["note"] for row in rows(record, "sections")] == [""]
