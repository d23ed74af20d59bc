"""The benchmarks run, and report what they promise; their timings are not looked at."""

import argparse
import importlib
import itertools
import json
import math
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
PEERS = ("PyHessian", "BackPACK", "curvlinops")


# Annotations are checked by the tests of the library; here that would take most of the time.
pytestmark = pytest.mark.usefixtures("untyped")


def run(script: str, directory: Path, *words: str) -> dict:
    report = importlib.import_module(f"benchmarks.{script}").main(["--smoke", "--out", str(directory), *words])
    for suffix in (".md", ".png", ".pdf"):
        assert (directory / f"{report.name}{suffix}").stat().st_size > 100
    record = json.loads((directory / f"{report.name}.json").read_text())
    assert record["benchmark"] == report.name
    assert record["setting"]["command"] == " ".join(["python", f"benchmarks/{script}.py", "--smoke", *words])
    return record


def check_roads(rows: list[dict], expected: list[str]) -> None:
    """Every expected road has a row, and every row its time, its time in F and its peak."""
    names = [row["road"] for row in rows]
    for start in expected:
        assert any(name.startswith(start) for name in names), (start, names)
    for row in rows:
        for key in ("ms", "F", "peak_mib"):
            assert math.isfinite(row[key]), row
            assert row[key] > 0, row
        low, high = row["ms_quartiles"]
        assert low <= row["ms"] <= high
        assert row["samples"] >= 1


def installed_peers() -> list[str]:
    return [peer for peer in PEERS if importlib.import_module("benchmarks.support.peers").installed(peer)]


def bars(record: dict) -> dict[str, float]:
    assert all(bar["met"] in ("yes", "no", "within the spread") for bar in record["bars"])
    return {bar["what"]: bar["measured"] for bar in record["bars"]}


@pytest.mark.slow
def test_projection(tmp_path):
    record = run("projection", tmp_path, "--profile")
    tables = record["tables"]
    own = ["sweep", "loop of products on a kept graph", "HessianOperator @ V", "loop of HessianOperator @ v", "vmap"]
    check_roads(tables["roads"], [*own, *(f"{peer}, loop of products" for peer in installed_peers())])
    assert all(row["error"] < 1e-5 for row in tables["roads"])
    agreement = {row["dtype"]: row["error"] for row in tables["agreement"]}
    assert agreement["float32"] < 1e-5
    assert agreement["float64"] < 1e-9
    *steps, total = tables["first"]
    assert total["ms"] == pytest.approx(sum(step["ms"] for step in steps))
    profile = {row["operation"]: row for row in tables["profile"]}
    assert profile["all: convolution, forward"]["calls"] > 0
    assert any("peak of the sweep" in what for what in bars(record))


@pytest.mark.slow
def test_hvp(tmp_path):
    record = run("hvp", tmp_path)
    check_roads(record["tables"]["one"], ["HessianOperator @ v", "torch.func", *installed_peers()])
    check_roads(record["tables"]["many"], ["HessianOperator @ V", *installed_peers()])
    rows = [*record["tables"]["one"], *record["tables"]["many"]]
    assert all(row["error"] < 1e-5 for row in rows if not row["road"].startswith("gradient"))
    assert sum("the fastest peer" in what for what in bars(record)) == (2 if installed_peers() else 0)


def test_blocks(tmp_path):
    record = run("blocks", tmp_path, "--profile")
    roads = ["layer_hessian", "the same, method='products'", "HessianOperator.block", "torch.func.hessian"]
    check_roads(record["tables"]["roads"], [*roads, *(peer for peer in installed_peers() if peer == "curvlinops")])
    assert all(row["error"] < 1e-5 for row in record["tables"]["roads"])
    assert record["setting"]["parameters"] == 170
    assert "torch.func.hessian / ours" in bars(record)
    assert any(row["operation"] == "all: convolution, forward" for row in record["tables"]["profile"])


def test_hvp_vs_exact(tmp_path):
    record = run("hvp_vs_exact", tmp_path)
    tables = record["tables"]
    check_roads(tables["product"], ["HessianOperator @ v", "HessianOperator.block_diagonal() @ v"])
    check_roads(tables["whole"], ["HessianOperator.to_dense()", "torch.func.hessian"])
    check_roads(tables["layers"], ["layer_hessian", "torch.func.hessian"])
    assert {row["parameters"] for row in tables["whole"]} == {58, 114}
    assert all(row["error"] < 1e-4 for row in (*tables["whole"], *tables["layers"]))
    assert all(math.isfinite(row["exponent"]) for row in tables["exponents"])


@pytest.mark.slow
def test_spectrum(tmp_path):
    record = run("spectrum", tmp_path)
    eigenvalues, densities = record["tables"]["eigenvalues"], record["tables"]["densities"]
    check_roads(eigenvalues, ["top_eigenpairs", "SciPy's eigsh on HessianOperator.to_scipy()"])
    exact = [row for row in eigenvalues if not row["road"].startswith("PyHessian")]
    assert all(row["residual"] < 1e-3 for row in exact)
    assert all(row["error"] < 1e-4 for row in exact)
    assert eigenvalues[0]["products"] > 0
    check_roads([row for row in densities if "ms" in row], ["spectral_density"])
    assert densities[0]["accuracy"] < 0.05
    if "PyHessian" in installed_peers():
        assert densities[-1]["note"].startswith("fails: This function was deprecated")


@pytest.mark.slow
def test_eigenvalues_of_a_network_by_name(tmp_path):
    record = run("spectrum", tmp_path, "--network", "resnet8", "--batch", "6")
    assert list(record["tables"]) == ["eigenvalues"]
    rows = record["tables"]["eigenvalues"]
    check_roads(rows, ["top_eigenpairs", "SciPy's eigsh on HessianOperator.to_scipy()"])
    assert rows[0]["residual"] < 1e-3
    assert record["setting"]["network"] == "resnet8"


@pytest.mark.slow
def test_scaling(tmp_path):
    record = run("scaling", tmp_path)
    for quantity, values in (("depth", [8, 14]), ("batches", [1, 2]), ("width", [2, 4])):
        rows = record["tables"][quantity]
        check_roads(rows, ["sweep", "loop of products"])
        assert [row["at"] for row in rows] == [value for value in values for _ in range(2)]
    assert len(record["tables"]["exponents"]) == 6
    assert {"sweep: exponent in layers", "sweep: exponent in batches"} == set(bars(record))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("script", ["projection", "hvp", "blocks", "hvp_vs_exact", "spectrum", "scaling"])
def test_on_a_gpu(script, tmp_path):
    record = run(script, tmp_path, "--device", "cuda")
    assert record["setting"]["device"] == torch.cuda.get_device_name()
    for rows in record["tables"].values():
        assert all(row["error"] < 1e-3 for row in rows if row.get("error") is not None)


def test_peak_is_what_lives_at_once():
    memory = importlib.import_module("benchmarks.support.memory")
    count, size = 1000, 4 * 1000

    def three_at_once():
        first = torch.zeros(count)
        second = torch.zeros(count)
        del first
        third, fourth = torch.zeros(count), torch.zeros(count)
        return second, third, fourth

    kept = torch.zeros(10 * count)
    assert memory.peak_bytes(lambda: torch.zeros(count), torch.device("cpu")) == size
    assert memory.peak_bytes(three_at_once, torch.device("cpu")) == 3 * size
    assert len(kept) == 10 * count


def test_columns_are_cut_to_the_memory_that_is_free(monkeypatch):
    memory = importlib.import_module("benchmarks.support.memory")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 3 * 10 * 4000.0)

    def work(columns):
        return torch.zeros(columns, 1000)

    assert memory.columns_that_fit(work, 100, torch.device("cpu")) == 20
    assert memory.columns_that_fit(work, 7, torch.device("cpu")) == 7


def test_roads_take_turns_between_forward_passes():
    timing = importlib.import_module("benchmarks.support.timing")
    calls = []

    def named(name):
        return lambda: calls.append(name)

    forward = named("F")
    roads = [timing.Road(name, named(name), forward) for name in "ab"]
    found = timing.measure(roads, timing.Pace(rounds=2, seconds=0.0, budget=10.0), torch.device("cpu"))
    # A sample calls several times.
    turns = [name for name, before in zip(calls, [None, *calls], strict=False) if name != before]
    # First each road for its result; then a, b in one round and b, a in the next, with F between samples.
    assert "".join(turns) == "FaFb" + "FaFbF" + "bFaF"
    assert all(len(measurement.multiples) == 2 for measurement in found.values())


def test_times_are_of_one_vector_and_in_forward_passes():
    timing = importlib.import_module("benchmarks.support.timing")
    measurement = timing.Measurement(timing.Road("four at once", lambda: None, lambda: None, vectors=4))
    measurement.add(8.0, 0.5)
    measurement.add(4.0, 0.5)
    assert (measurement.time.median, measurement.in_forwards.median) == (1.5, 3.0)
    ratio = measurement.in_forwards.over(timing.Spread(2.0, 1.0, 4.0))
    assert (ratio.median, ratio.low, ratio.high) == (1.5, 2.5 / 4, 3.5)


@pytest.mark.parametrize(
    ("kind", "measured", "verdict"),
    [
        ("at most", (0.9, 0.8, 1.2), "yes"),
        ("at most", (1.1, 0.9, 1.2), "within the spread"),
        ("at most", (1.3, 1.1, 1.5), "no"),
        ("at least", (1.1, 0.9, 1.2), "yes"),
        ("at least", (0.9, 0.8, 1.2), "within the spread"),
        ("at least", (0.9, 0.8, 0.95), "no"),
    ],
)
def test_bars(kind, measured, verdict):
    harness = importlib.import_module("benchmarks.support.harness")
    assert harness.Bar("ratio", harness.Spread(*measured), kind, 1.0).verdict == verdict


def test_report_is_written_as_json_and_markdown(tmp_path):
    harness = importlib.import_module("benchmarks.support.harness")
    columns = (harness.Column("road", "road"), harness.Column("ms", "ms"), harness.Column("note", "note"))
    rows = [{"road": "a | b", "ms": harness.Spread(1234.5, 1200.0, float("nan")), "hidden": 1}]
    report = harness.Report("name", "why?", {"device": "cpu", "command": "python x.py"})
    report.tables.append(harness.Table("roads", "Roads", columns, rows))
    harness.publish(report, argparse.Namespace(out=tmp_path))
    record = json.loads((tmp_path / "name.json").read_text())
    row = {"road": "a | b", "ms": 1234.5, "ms_quartiles": [1200.0, None], "hidden": 1}
    assert record["tables"] == {"roads": [row]}
    lines = (tmp_path / "name.md").read_text().splitlines()
    # The column of notes is empty, so it is left out.
    assert lines[0] == "`python x.py`"
    assert "| road | ms |" in lines
    assert "| a \\| b | 1234 [1200, ] |" in lines


def test_examples_near_a_kink_are_left_out():
    kinks = importlib.import_module("benchmarks.kinks")
    layer = torch.nn.Linear(200, 1, bias=False)
    weight, vector = torch.randn(2, 200, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.weight.copy_(weight.unsqueeze(0))
    # The second one is at right angles: what is left of its terms is their rounding.
    x = torch.stack([weight, vector - (vector @ weight) / (weight @ weight) * weight, -weight])
    assert kinks.far_from_kinks(torch.nn.Sequential(layer, torch.nn.ReLU()), x, 2).tolist() == [0, 2]


def test_digits_are_learned():
    problem = importlib.import_module("benchmarks.support.problems").digits_problem(32, width=2, epochs=1)
    assert problem.examples == 32
    assert not problem.model.training
    # That of a guess is log 10 = 2.3.
    assert problem.objective.loss() < 1.5


def test_fitted_exponent():
    charts = importlib.import_module("benchmarks.support.charts")
    assert charts.fitted_exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("heights", "places"),
    [
        ([0.0, 10.0], [0.0, 10.0]),
        ([0.0, 1.0], [-1.5, 2.5]),
        # The third comes too close only once the first two have parted.
        ([0.0, 1.0, 5.0], [-2.0, 2.0, 6.0]),
        ([0.0, 20.0, 20.0, 20.0], [0.0, 16.0, 20.0, 24.0]),
        ([], []),
    ],
)
def test_numbers_part_no_farther_than_they_must(heights, places):
    assert importlib.import_module("benchmarks.support.charts").spread_out(heights, 4.0) == pytest.approx(places)


def test_numbers_at_the_ends_of_curves_do_not_cover_one_another():
    charts, timing = (importlib.import_module(f"benchmarks.support.{name}") for name in ("charts", "timing"))
    spread = lambda value: timing.Spread(value, value, value)  # noqa: E731
    lines = [
        charts.Line(f"road {k}", [1, 10, 100], [spread(1.0), spread(30.0), spread(900.0 + 10 * k)], 1.5)
        for k in range(4)
    ]
    (axes,) = charts.draw_panels([charts.Panel("time", "size", "milliseconds", lines)]).axes
    axes.figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
    assert len(boxes) == 4
    assert all(below.y1 <= above.y0 for below, above in itertools.pairwise(boxes))


@pytest.mark.parametrize(("values", "scale"), [((5.6, 6.2), "linear"), ((1.0, 6.2), "log")])
def test_points_close_to_each_other_have_an_axis_from_zero(values, scale):
    charts, timing = (importlib.import_module(f"benchmarks.support.{name}") for name in ("charts", "timing"))
    shown = {name: timing.Spread(value, value, value) for name, value in zip(("ours", "theirs"), values, strict=True)}
    figure = charts.draw_points(shown, ["ours"], "seconds")
    (axes,) = figure.axes
    assert axes.get_xscale() == scale
    assert (axes.get_xlim()[0] == 0) == (scale == "linear")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["this library", "others"]


def test_training_compares_loops_and_siblings(tmp_path):
    record = run("training", tmp_path)
    loops = record["tables"]["loop"]
    assert [row["loop"].split()[0] for row in loops] == ["lmc_curvature:", "plain", "plain"]
    for row in loops:
        assert row["rate"] == pytest.approx(64 / row["seconds"])
    assert [bar["what"] for bar in record["bars"]] == ["fastest plain loop / ours"]
