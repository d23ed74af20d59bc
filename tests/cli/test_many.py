"""Claim: of three files or more, commands say and write what the library does for many networks."""

import json
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lmc_curvature import BarriersMeasurement, BarriersPrediction, measure_barriers, merge, predict_barriers
from lmc_curvature.sources.data import load_data

MODEL = ["--model", "tests.cli.test_many:network"]
COMMON = [*MODEL, "--data", "digits", "--limit", "40", "--batch-size", "20", "--no-progress"]
WEIGHTS = [0.5, 0.3, 0.2]
ONE_ANSWER = ["--weights", "0.5,0.3,0.2", "--json"]


def network():
    """A small network of digits that the command line can import."""
    layers = {"flat": nn.Flatten(), "conv": nn.Linear(64, 6), "norm": nn.BatchNorm1d(6), "tanh": nn.Tanh()}
    return nn.Sequential(OrderedDict(layers | {"linear": nn.Linear(6, 10)}))


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    return [network() for _ in range(3)]


@pytest.fixture(scope="module")
def files(networks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clients")
    found = [folder / f"{name}.pt" for name in ("north", "east", "south")]
    for path, network in zip(found, networks, strict=True):
        torch.save(network.state_dict(), path)
    return found


def _batches():
    return load_data("digits", limit=40).batches(20)


@pytest.mark.check
def test_predict_prints_and_saves_what_the_library_predicts(run, networks, files, tmp_path):
    expected = predict_barriers(
        networks, _batches(), names=["north", "east", "south"], weights=WEIGHTS, anchors=2, progress=False
    )
    options = ["--anchors", "2", "--set", "conv,linear", "--save", tmp_path / "p", "--plot", tmp_path / "p.png"]
    status, out, err = run("predict", *files, *COMMON, *options, *ONE_ANSWER)
    assert (status, err) == (0, "")
    record = json.loads(out)
    assert record["names"] == ["north", "east", "south"]
    assert record["mean"]["barrier"] == pytest.approx(expected.mean_barrier(), rel=1e-4)
    found = [row["barrier"] for row in record["pairs"]]
    assert found == pytest.approx([pair.barrier() for pair in expected.pairs.values()], rel=1e-4)
    assert [row["barrier"] for row in record["layers"]] == pytest.approx(expected.layer_barriers(), rel=1e-3)
    assert record["sets"][0]["barrier"] == pytest.approx(expected.mean_barrier(["conv", "linear"]), rel=1e-3)
    assert record["subsets"][0]["networks"] == list(expected.subsets[0].networks)
    assert list(record["provenance"]["networks"]) == ["a", "b", "c"]
    assert (tmp_path / "p.png").stat().st_size > 0
    saved = BarriersPrediction.load(tmp_path / "p")
    assert saved.mean_barrier() == pytest.approx(expected.mean_barrier(), rel=1e-4)
    status, out, _ = run("predict", *files, *COMMON, "--anchors", "2", "--names", "n, e, s")
    assert (status, "mean of all" in out, "conv" in out, "± expansion" in out) == (0, True, True, True)
    assert "n, e, s: loss" in out


@pytest.mark.check
def test_measure_prints_and_saves_what_the_library_measures(run, networks, files, tmp_path):
    names = ["north", "east", "south"]
    some = {"names": names, "weights": WEIGHTS, "subsets": [["east", "south"]], "sets": [["conv"]], "alphas": 3}
    more = {"frozen": "linear", "base": "east", "progress": False}
    expected = measure_barriers(networks, _batches(), **some, **more)
    options = ["--alphas", "3", "--set", "conv", "--subset", "east, south", "--save", tmp_path / "m"]
    options += ["--frozen", "linear", "--base", "b"]
    status, out, err = run("measure", *files, *COMMON, *options, *ONE_ANSWER)
    assert (status, err) == (0, "")
    record = json.loads(out)
    for metric in ("loss", "error"):
        assert record["metrics"][metric]["barrier"] == pytest.approx(expected.mean_barrier(metric), rel=1e-4)
        found = [row[f"{metric}_barrier"] for row in record["pairs"]]
        assert found == pytest.approx([expected.pair(*pair).barrier(metric) for pair in expected.pairs], rel=1e-4)
    assert record["subsets"][0]["loss"] == pytest.approx(expected.subset_values()[0], rel=1e-4)
    assert record["sets"][0]["loss_barrier"] == pytest.approx(expected.set_barriers()[0], rel=1e-4)
    assert record["notes"] == ["frozen at east: linear (2 entries, others in north, south)"]
    assert BarriersMeasurement.load(tmp_path / "m").subsets == (("east", "south"),)


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({}, []),
        ({"weights": WEIGHTS}, ["--weights", "0.5,0.3,0.2"]),
        ({"layers": ["conv"], "base": "b", "weights": WEIGHTS}, ["--weights", "0.5,0.3,0.2", *MODEL]),
    ],
)
def test_merge_writes_the_mean(run, networks, files, tmp_path, options, more):
    chosen = ["--layers", "conv", "--base", "b"] if "layers" in options else []
    status, out, err = run("merge", *files, *more, *chosen, "--out", tmp_path / "m", "--json")
    assert (status, err) == (0, "")
    torch.testing.assert_close(load_file(tmp_path / "m"), merge(*networks, **options).state_dict())
    record = json.loads(out)
    assert record["weights"] == pytest.approx(options.get("weights", [1 / 3] * 3))
    assert set(record["files"]) == {"a", "b", "c"}
    assert record["layers"] == (["conv"] if chosen else ["all layers"])


def test_of_two_files_weights_are_an_alpha(run, files, tmp_path):
    for name, options in (("w", ["--weights", "0.75,0.25"]), ("x", ["--alpha", "0.25"])):
        assert run("merge", *files[:2], *options, "--out", tmp_path / name)[0] == 0
    torch.testing.assert_close(load_file(tmp_path / "w"), load_file(tmp_path / "x"), rtol=1e-6, atol=1e-7)


@pytest.mark.check
def test_merge_estimates_statistics_of_the_mean_anew(run, networks, files, tmp_path):
    options = ["--batch-norm", "recalibrate", "--augmentation", "none", *COMMON, "--weights", "0.5,0.3,0.2"]
    status, _, err = run("merge", *files, *options, "--out", tmp_path / "m")
    assert status == 0, err
    batches = list(_batches())
    mean = merge(*networks, weights=WEIGHTS, batch_norm="recalibrate", loader=batches, progress=False)
    torch.testing.assert_close(load_file(tmp_path / "m"), mean.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("command", "count", "options", "message"),
    [
        ("predict", 3, ["--tolerance", "0.1"], "--tolerance is for two networks"),
        ("measure", 3, ["--tolerance", "0.1"], "--tolerance is for two networks"),
        ("predict", 3, ["--weights", "0.5,half,0.2"], "--weights '0.5,half,0.2': expected a number a network"),
        ("predict", 3, ["--weights", "0.5,0.5"], "weights has 2 numbers for 3 networks"),
        ("predict", 3, ["--names", "a,b"], "names has 2 names for 3 networks"),
        ("predict", 3, ["--set", "convx"], "no layer 'convx'"),
        ("measure", 3, ["--subset", "north,west"], "no network 'west'"),
        ("measure", 3, ["--subset", ","], "--subset ',' names no network"),
        ("measure", 3, ["--each", "--set", "conv"], "choose one of them"),
        ("predict", 2, ["--weights", "0.5,0.5"], "--weights is for three networks or more"),
        ("measure", 2, ["--subset", "a"], "--subset is for three networks or more"),
        ("measure", 2, ["--names", "a,b"], "--names is for three networks or more"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(run, files, command, count, options, message, untyped):
    status, out, err = run(command, *files[:count], *COMMON, *options)
    assert (status, out) == (2, "")
    assert message in err


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (3, ["--alpha", "0.5"], "--alpha is for two networks without --weights"),
        (2, ["--alpha", "0.5", "--weights", "0.5,0.5"], "--alpha is for two networks without --weights"),
        (3, ["--mergekit", "m.yaml"], "--mergekit is for two networks without --weights"),
        (3, ["--weights", "0.5,0.4,0.3"], "weights sum to 1.2"),
    ],
)
def test_a_merge_that_makes_no_sense_writes_nothing(run, files, tmp_path, count, options, message):
    status, out, err = run("merge", *files[:count], *options, "--out", tmp_path / "m")
    assert (status, out, (tmp_path / "m").exists()) == (2, "", False)
    assert message in err


def test_no_network_is_written_over_and_a_missing_one_is_named(run, files, tmp_path):
    status, _, err = run("merge", *files, "--out", files[2], "--force")
    assert (status, "would replace a network" in err) == (2, True)
    status, _, err = run("predict", *files[:2], tmp_path / "none.pt", *COMMON)
    assert (status, "none.pt" in err) == (2, True)
    for command in ("select", "check"):
        status, _, err = run(command, *files, *COMMON)
        assert (status, "unexpected extra argument" in err) == (2, True)
