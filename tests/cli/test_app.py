"""Claim: the command line says what the API says, and turns errors into one message."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lmc_curvature import BarrierMeasurement, BarrierPrediction, measure_barrier, predict_barrier
from lmc_curvature.sources.data import load_data
from lmc_curvature.sources.resnets import digits_resnet
from tests.support.configurations import SECONDS

ROOT = Path(__file__).parents[2]
COMMON = ["--model", "digits-resnet", "--model-option", "width=4", "--data", "digits", "--limit", "60", "--no-progress"]


def loader():
    """A loader that the command line can import."""
    return [(torch.ones(4, 1, 8, 8), torch.arange(4))]


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    return [digits_resnet(width=4) for _ in range(2)]


@pytest.fixture(scope="module")
def checkpoints(networks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    first, second = networks
    save_file(first.state_dict(), folder / "a.safetensors")
    wrapped = {f"module.{name}": tensor for name, tensor in second.state_dict().items()}
    torch.save({"state_dict": wrapped, "epoch": 3}, folder / "b.pt")
    return [str(folder / "a.safetensors"), str(folder / "b.pt")]


def _batches(size=256):
    return load_data("digits", limit=60).batches(size)


@pytest.mark.check
def test_predict_prints_the_prediction_as_json(run, networks, checkpoints, tmp_path):
    expected = predict_barrier(*networks, _batches(25), progress=False)
    layers = expected.layers[:2]
    status, out, err = run(
        "predict", *checkpoints, *COMMON, "--batch-size", 25, "--json", "--set", ",".join(layers),
        "--save", tmp_path / "p.safetensors",
    )  # fmt: skip
    assert (status, err) == (0, "")
    record = json.loads(out)
    assert [anchor["alpha"] for anchor in record["anchors"]] == [0.0, 0.5, 1.0]
    assert record["expansion"] == "anchored"
    for expansion in ("anchored", "second-order", "hermite"):
        found = record["barrier"][expansion]
        assert found["value"] == pytest.approx(expected.barrier(None, expansion), rel=1e-5)
        assert found["at_half"] == pytest.approx(expected.curve([0.5], None, expansion)[0], rel=1e-5)
        assert found["standard_error"] == pytest.approx(expected.standard_error(None, expansion), rel=1e-3)
    assert "expansion_error" not in record["barrier"]["second-order"]
    assert [row["layer"] for row in record["layers"]] == list(expected.layers)
    assert record["sets"][0]["layers"] == list(layers)
    (found,) = record["sets"]
    assert found["barrier"] == pytest.approx(expected.barrier(layers), rel=1e-5)
    assert found["barrier_second_order"] == pytest.approx(expected.barrier(layers, "second-order"), rel=1e-5)
    assert found["at_half"] == pytest.approx(float(expected.set_barriers([layers])[0]), rel=1e-5)
    assert found["expansion_error_at_half"] == pytest.approx(
        float(expected.set_expansion_errors([layers])[0]), rel=1e-4
    )
    assert len(record["verdict"]) > 1
    assert BarrierPrediction.load(tmp_path / "p.safetensors").barrier() == pytest.approx(
        record["barrier"]["anchored"]["value"]
    )


@pytest.mark.check
def test_a_single_batch_has_no_error_in_json(run, checkpoints):
    _, out, _ = run("predict", *checkpoints, *COMMON, "--json")
    assert json.loads(out)["barrier"]["second-order"]["standard_error"] is None


def _rows(out):
    """The rows of a printed table, as lists of cells."""
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line[:1] == "│"]


@pytest.mark.check
def test_predict_prints_tables_and_ends_with_a_verdict(run, networks, checkpoints):
    expected = predict_barrier(*networks, _batches(25), layers="block", progress=False)
    members = ["conv", "stage1"]
    status, out, _ = run(
        "predict", *checkpoints, *COMMON, "--layers", "block", "--batch-size", 25, "--set", ",".join(members)
    )
    assert status == 0
    *layers, of_set = _rows(out)
    assert [row[0] for row in layers] == list(expected.layers)
    assert of_set[0] == "conv + stage1"
    # Signed, and the errors apart.
    anchored, sampling, expansion, second_order = map(float, of_set[3:7])
    assert anchored == pytest.approx(float(expected.set_barriers([members])[0]), rel=0.01)
    assert sampling == pytest.approx(expected.standard_error(members, alpha=0.5), rel=0.06)
    assert expansion == pytest.approx(float(expected.set_expansion_errors([members])[0]), rel=0.06)
    assert second_order == pytest.approx(float(expected.set_barriers([members], 0.5, "second-order")[0]), rel=0.01)
    assert min(float(row[3]) for row in layers) < 0
    assert out.index("± expansion") < out.index("Verdict: ") > out.index("conv + stage1")


@pytest.mark.check
def test_anchors_are_counted_or_named(run, networks, checkpoints, tmp_path):
    saved = tmp_path / "p.safetensors"
    common = ["predict", *checkpoints, *COMMON, "--layers", "block", "--no-witness", "--save", saved]
    status, out, _ = run(*common, "--anchors", 2)
    assert status == 0
    assert "± expansion" not in out
    assert [anchor.alpha for anchor in BarrierPrediction.load(saved).anchors] == [0.0, 1.0]
    expected = predict_barrier(*networks, _batches(), layers="block", anchors=2, progress=False)
    assert float(_rows(out)[0][3]) == pytest.approx(float(expected.set_barriers([["conv"]])[0]), rel=0.01)
    assert run(*common, "--anchors", "0,0.3,1")[0] == 0
    assert [anchor.alpha for anchor in BarrierPrediction.load(saved).anchors] == [0.0, 0.3, 1.0]


@pytest.mark.check
def test_measure_prints_the_measurement(run, networks, checkpoints, tmp_path):
    expected = measure_barrier(*networks, _batches(), sets="each", alphas=5, progress=False)
    arguments = ["measure", *checkpoints, *COMMON, "--each", "--alphas", 5]
    status, out, _ = run(*arguments, "--json", "--save", tmp_path / "m.safetensors")
    record = json.loads(out)
    assert status == 0
    assert record["kind"] == expected.kind
    assert record["metrics"]["loss"]["curve"] == pytest.approx(expected.curve().tolist(), abs=1e-5)
    assert record["metrics"]["error"]["barrier"] == pytest.approx(expected.barrier("error"))
    found = [row["barrier"] for row in record["metrics"]["loss"]["sets"]]
    assert found == pytest.approx(expected.layer_barriers().tolist(), abs=1e-5)
    assert BarrierMeasurement.load(tmp_path / "m.safetensors").sets == expected.sets
    status, out, _ = run(*arguments)
    assert status == 0
    assert "error barrier" in out


def test_measure_takes_sets_and_a_loader_of_ones_own(run, checkpoints):
    arguments = [*COMMON]
    arguments[arguments.index("digits")] = f"{__name__}:loader"
    place = arguments.index("--limit")
    del arguments[place : place + 2]
    status, out, _ = run("measure", *checkpoints, *arguments, "--set", "conv,linear", "--alphas", 3, "--json")
    record = json.loads(out)
    assert (status, record["examples"]) == (0, 4)
    assert record["metrics"]["loss"]["sets"][0]["layers"] == ["conv", "linear"]


@pytest.mark.check(after=6)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--layers", "fusd"], "layers='fusd' is not a partition: did you mean 'fused'"),
        (["--set", "conv,convx"], "no layer 'convx'"),
        (
            ["--set", "conv,linear", "--set", " , "],
            "--set ' , ' names no layer; expected names with commas",
        ),
        (["--set", ""], "--set '' names no layer"),
        (["--anchors", "1"], "anchors=1: at least the two networks are needed"),
        (["--anchors", "three"], "--anchors 'three': expected a number of anchors, or positions"),
        (["--anchors", "0,0.5"], "positions that rise from 0 to 1"),
        (["--anchors", "0,,1"], "--anchors '0,,1': expected"),
        (["--device", "tpu9"], "device='tpu9' is not a device"),
        (["--data", "json:loads"], "--data json:loads: loads() missing"),
        (["--model-option", "width"], "--model-option 'width': expected KEY=VALUE"),
        (["--model-option", "widht=4"], "widht"),
        (["--model", "resnet2O"], "resnet2O"),
        (["--data", "cifar10:pyproject.toml"], "CIFAR-10 is not in pyproject.toml"),
        (["--data", "nowhere"], "'nowhere' is neither 'digits' nor 'cifar10' nor a directory"),
        (
            ["--data", "no.such.module:factory"],
            "--data no.such.module:factory: the module 'no.such.module' cannot be imported",
        ),
        (["--data", "json:lods"], "--data json:lods: the module 'json' has no function 'lods': did you mean 'loads'?"),
    ],
)
def test_errors_are_one_message_on_standard_error(run, checkpoints, change, message, untyped):
    status, out, err = run("predict", *checkpoints, *COMMON, *change)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--batch-norm", "frozen"], "'frozen' is not one of 'interpolate', 'batch', 'recalibrate'"),
        (["--dtype", "float12"], "'float12' is not one of 'float32', 'float64'"),
        (["--split", "valid"], "'valid' is not one of 'train', 'test'"),
        (["--save", "."], "'.' is a directory"),
    ],
)
def test_what_is_no_choice_is_answered_before_the_library_is_asked(run, checkpoints, change, message):
    status, out, err = run("predict", *checkpoints, *COMMON, *change)
    assert (status, out) == (2, "")
    assert message in " ".join(err.replace("│", " ").split())


def test_each_layer_or_sets_are_measured_and_not_both(run, checkpoints):
    status, _, err = run("measure", *checkpoints, *COMMON, "--each", "--set", "conv,linear")
    assert (status, "choose one of them" in err) == (2, True)


def test_a_missing_checkpoint_is_named(run, checkpoints):
    status, _, err = run("measure", checkpoints[0], "absent.pt", *COMMON)
    assert (status, "absent.pt does not exist" in err) == (2, True)


def test_key_and_prefix_choose_among_state_dicts_of_both_checkpoints(run, networks, tmp_path):
    for name, network in zip("ab", networks, strict=True):
        kept = {f"net.{entry}": tensor for entry, tensor in network.state_dict().items()}
        average = {f"ema.{entry}": torch.zeros_like(tensor) for entry, tensor in network.state_dict().items()}
        torch.save({"state_dict": {**kept, **average}, "last": average, "epoch": 3}, tmp_path / name)
    paths = [tmp_path / "a", tmp_path / "b"]
    status, out, err = run("measure", *paths, *COMMON, "--alphas", 3)
    assert (status, out) == (2, "")
    assert "strip_prefix='net.'; key='last' and strip_prefix='ema.' (--key, --strip-prefix on the command" in err
    options = ["--key", "state_dict", "--strip-prefix", "net.", "--alphas", 3, "--json"]
    status, out, _ = run("measure", *paths, *COMMON, *options)
    expected = measure_barrier(*networks, _batches(), alphas=3, progress=False)
    assert json.loads(out)["metrics"]["loss"]["curve"] == pytest.approx(expected.curve().tolist(), abs=1e-5)


def test_sets_are_of_layers_of_the_partition(run, checkpoints):
    arguments = ["--layers", "module", "--set", "norm,linear", "--alphas", 3, "--json"]
    _, out, _ = run("measure", *checkpoints, *COMMON, *arguments)
    (found,) = json.loads(out)["metrics"]["loss"]["sets"]
    assert found["layers"] == ["norm", "linear"]


def test_help_the_version_and_mistakes_are_answered_without_torch():
    lines = [["--version"], ["--help"], ["predcit"], ["predict", "a", "b", "--modle", "x"]]
    lines += [
        [command, "--help"]
        for command in ("demo", "fork", "trace", "figures", "predict", "measure", "select", "merge", "check")
    ]
    program = f"""
import sys
from lmc_curvature.cli import main
for line in {lines}:
    try:
        main(line)
    except SystemExit:
        assert "torch" not in sys.modules, line
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("lmc-curvature 0.")
    assert "Predict the loss barrier between them" in done.stdout
    assert "No such command 'predcit'" in done.stderr
    assert "--modle" in done.stderr


@pytest.mark.parametrize("module", ["lmc_curvature", "lmc_curvature.cli"])
def test_the_package_runs_as_a_module(module):
    command = [sys.executable, "-m", module, "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("lmc-curvature 0.")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, so asking for one is no mistake")
def test_a_missing_device_is_named(run, checkpoints):
    assert "no CUDA device was found" in run("predict", *checkpoints, *COMMON, "--device", "cuda")[2]


@pytest.mark.check
def test_fork_trace_and_figures_are_three_commands(run, tmp_path):
    (tmp_path / "config.yaml").write_text(SECONDS)
    out = tmp_path / "out"
    _, printed, _ = run("fork", tmp_path / "config.yaml", "--out", out, "--no-progress")
    assert "next: lmc-curvature trace" in printed
    _, printed, _ = run("trace", out, "--no-progress")
    assert "Barrier between the siblings of each fork at the end" in printed
    assert "predicted (with slopes)" in printed
    status, printed, _ = run("figures", out, "--no-progress")
    assert status == 0
    drawn = sorted(path.stem for path in (out / "figures").glob("*.png"))
    for name in ("ridges-error-train", "sibling-angles", "mountainside", "layers-fork-0000", "cumulative-barriers"):
        assert name in drawn
    assert len(drawn) == printed.count(".pdf")


def test_the_three_commands_explain_what_is_missing(run, tmp_path):
    (tmp_path / "config.yaml").write_text(SECONDS + "modle: x\n")
    status, _, printed = run("fork", tmp_path / "config.yaml", "--out", tmp_path / "out", "--no-progress")
    assert status == 2
    assert "modle: unknown key; did you mean 'model'" in printed
    assert not (tmp_path / "out").exists()
    (tmp_path / "config.yaml").write_text(SECONDS)
    refused = run("fork", tmp_path / "config.yaml", "--out", tmp_path / "out", "--together", "0", "--no-progress")
    assert "together=0 must be at least 1" in refused[2]
    assert not (tmp_path / "out").exists()
    assert "config.json is missing; run_forks" in run("trace", tmp_path / "out", "--no-progress")[2]
    assert "config.json is missing; run_forks" in run("figures", tmp_path / "out", "--no-progress")[2]


@pytest.mark.check
def test_layers_stay_where_they_are_and_notes_are_printed(run, networks, checkpoints):
    options = ["--frozen", "stage2.0.conv1", "--frozen", "stage1.*", "--base", "b", "--batch-size", 60]
    expected = measure_barrier(
        *networks, _batches(60), frozen=("stage2.0.conv1", "stage1.*"), base="b", alphas=3, progress=False
    )
    status, out, err = run("measure", *checkpoints, *COMMON, *options, "--alphas", 3, "--json")
    record = json.loads(out)
    assert (status, err) == (0, "")
    assert record["metrics"]["loss"]["curve"] == pytest.approx(expected.curve().tolist(), abs=1e-6)
    assert record["notes"] == list(expected.notes)
    status, out, _ = run("predict", *checkpoints, *COMMON, *options, "--no-witness")
    assert status == 0
    expected = predict_barrier(*networks, _batches(60), frozen=("stage2.0.conv1", "stage1.*"), base="b", progress=False)
    assert list(expected.notes[-1:]) == record["notes"][-1:]
    for note in (*expected.notes, "derivatives were not compared with differences of the loss (witness=False)"):
        assert note in out


def test_key_and_prefix_are_for_the_file_that_needs_them(run, networks, checkpoints, tmp_path):
    second = {f"net.{name}": tensor for name, tensor in networks[1].state_dict().items()}
    torch.save({"state_dict": second | {"criterion.weight": torch.ones(3)}}, tmp_path / "lightning.ckpt")
    expected = measure_barrier(*networks, _batches(60), alphas=3, progress=False)
    options = ["--key", "state_dict", "--strip-prefix", "net", "--alphas", 3, "--batch-size", 60, "--json"]
    with pytest.warns(UserWarning, match="a.safetensors was read without --key and --strip-prefix"):
        status, out, _ = run("measure", checkpoints[0], tmp_path / "lightning.ckpt", *COMMON, *options)
    assert status == 0
    assert json.loads(out)["metrics"]["loss"]["curve"] == pytest.approx(expected.curve().tolist(), abs=1e-6)
