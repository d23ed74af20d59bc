"""Claim: the commands on files say and write what the library does, and refuse mistakes before they begin."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmc_curvature import merge
from lmc_curvature.errors import OptionError
from lmc_curvature.merging.checking import check_checkpoints
from lmc_curvature.sources.data import load_data
from lmc_curvature.sources.resnets import digits_resnet
from tests.support.networks import randomized

MODEL = ["--model", "digits-resnet", "--model-option", "width=2"]
DATA = ["--data", "digits", "--limit", "60", "--no-progress"]


@pytest.fixture(scope="module")
def networks():
    return [randomized(digits_resnet(width=2), seed) for seed in (0, 1)]


@pytest.fixture
def paths(networks, tmp_path):
    save_file(networks[0].state_dict(), tmp_path / "a.safetensors")
    torch.save({"state_dict": networks[1].state_dict()}, tmp_path / "b.pt")
    return tmp_path / "a.safetensors", tmp_path / "b.pt"


@pytest.fixture
def plain_paths(networks, paths):
    torch.save(networks[1].state_dict(), paths[1].with_name("plain.pt"))
    return paths[0], paths[1].with_name("plain.pt")


def _same(path, network):
    torch.testing.assert_close(load_file(path), network.state_dict(), rtol=1e-6, atol=1e-7)


def test_merge_writes_the_merged_network(run, networks, paths, plain_paths, tmp_path):
    status, out, _ = run("merge", *paths, "--out", tmp_path / "m")
    entries = sum("num_batches" not in name for name in networks[0].state_dict())
    assert (status, out) == (0, f"merged: {tmp_path / 'm'}; moved from A: all {entries} entries\n")
    _same(tmp_path / "m", merge(*networks))
    options = ["--layers", "conv, linear", "--alpha", "0.25", "--base", "b", "--mergekit", tmp_path / "m.yaml"]
    status, out, _ = run("merge", *plain_paths, *MODEL, *options, "--out", tmp_path / "m", "--force")
    assert (status, "moved from B: 2 of 10 layers (conv, linear)" in out) == (0, True)
    assert f"mergekit-yaml {tmp_path / 'm.yaml'} " in out
    _same(tmp_path / "m", merge(*networks, layers=["conv", "linear"], alpha=0.25, base="b"))
    text = (tmp_path / "m.yaml").read_text()
    assert "merge_method: linear" in text
    assert "# Run it with mergekit: mergekit-yaml THIS_FILE OUTPUT_DIRECTORY\n" in text
    alphas = ["--alpha", "stage1=0.25", "--alpha", "linear=1", "--partition", "block", "--json"]
    status, out, _ = run("merge", *paths, *alphas, "--out", tmp_path / "n")
    record = json.loads(out)
    assert (status, set(record["layers"]), record["partition"]) == (0, {"stage1", "linear"}, "block")
    _same(tmp_path / "n", merge(*networks, alpha={"stage1": 0.25, "linear": 1.0}, partition="block"))


@pytest.mark.check
def test_layers_mean_what_the_command_says(run, networks, paths, tmp_path):
    """A layer of that name is another one with the network and without it."""
    for options, partition in (([*MODEL], "fused"), (["--partition", "module"], "module")):
        for names in (["--layers", "conv"], ["--alpha", "conv=0.5"]):
            status, _, _ = run("merge", *paths, *options, *names, "--out", tmp_path / "m", "--force")
            assert status == 0
            _same(tmp_path / "m", merge(*networks, layers=["conv"], partition=partition))
            stays = load_file(tmp_path / "m")["norm.running_mean"].equal(networks[0].norm.running_mean)
            assert stays == (partition == "module")
    # One number for all layers names none.
    status, _, _ = run("merge", *paths, "--alpha", "0.25", "--out", tmp_path / "m", "--force")
    assert status == 0
    _same(tmp_path / "m", merge(*networks, alpha=0.25))


@pytest.mark.check
def test_merge_estimates_statistics_anew(run, networks, paths, tmp_path):
    options = ["--batch-norm", "recalibrate", "--layers", "conv", "--json"]
    status, out, _ = run("merge", *paths, *MODEL, *DATA, *options, "--out", tmp_path / "m")
    loader = load_data("digits", limit=60).batches(256)
    expected = merge(*networks, layers=["conv"], batch_norm="recalibrate", loader=loader, progress=False)
    _same(tmp_path / "m", expected)
    losses = {"before": expected.recalibration.before, "after": expected.recalibration.after}
    assert (status, json.loads(out)["losses"]) == (0, pytest.approx(losses))
    # With images of training that are augmented, statistics are others.
    options += ["--augmentation", "crop-flip"]
    run("merge", *paths, *MODEL, *DATA, *options, "--out", tmp_path / "n")
    name = "norm.running_var"
    assert not torch.allclose(load_file(tmp_path / "m")[name], load_file(tmp_path / "n")[name], rtol=1e-3)


@pytest.mark.check
def test_measure_estimates_statistics_on_the_data_given_for_it(run, paths):
    options = ["--batch-norm", "recalibrate", "--alphas", 3, "--json"]
    found = [
        json.loads(run("measure", *paths, *MODEL, *DATA, *options, *more)[1])["metrics"]["loss"]["values"]
        for more in ([], ["--recalibration", "digits"], ["--augmentation", "crop-flip"])
    ]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--alpha", "half"], "--alpha 'half': expected a number in [0, 1], or LAYER=NUMBER"),
        (["--alpha", "0.5", "--alpha", "conv=1"], "give one number, or LAYER=NUMBER for each layer"),
        (["--alpha", "2"], "alpha=2.0 of layer"),
        (["--layers", " , "], "--layers ' , ' names no layer"),
        (["--layers", "convx", "--partition", "module"], "no layer 'convx': did you mean 'conv'?"),
        (["--layers", "conv"], "give --model, or --partition module"),
        (["--alpha", "conv=0.25"], "name layers, which without the network are not those of predict and select"),
        (["--layers", "conv", "--partition", "fused"], "--model on the command line"),
        (["--batch-norm", "recalibrate"], "give --model and --data"),
        (["--augmentation", "none"], "are for --batch-norm recalibrate"),
        (["--batch-norm", "recalibrate", *MODEL, *DATA, "--mergekit", "m.yaml"], "running statistics included"),
        (["--mergekit", "pyproject.toml"], "--mergekit pyproject.toml exists already: pass --force"),
    ],
)
def test_mistakes_are_one_message_and_nothing_is_written(run, paths, tmp_path, change, message):
    status, out, err = run("merge", *paths, "--out", tmp_path / "m", *change)
    assert (status, out) == (2, "")
    assert message in err
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("name", ["m.pt", "m.bin", "m.safetensors.gz"])
def test_other_files_than_safetensors_are_not_promised(run, paths, tmp_path, name):
    status, _, err = run("merge", *paths, "--out", tmp_path / name)
    assert (status, f"--out {tmp_path / name}: the merged network is written as safetensors" in err) == (2, True)
    assert not (tmp_path / name).exists()


def test_files_in_which_mergekit_finds_no_entries_are_refused(run, networks, paths, plain_paths, tmp_path):
    prefixed = {f"module.{name}": entry for name, entry in networks[0].state_dict().items()}
    save_file(prefixed, tmp_path / "prefixed")
    pairs = {"under 'state_dict'": paths, "with 'module.' in their names": (tmp_path / "prefixed", plain_paths[1])}
    for said, pair in pairs.items():
        options = ["--mergekit", tmp_path / "m.yaml", "--out", tmp_path / "m"]
        status, _, err = run("merge", *pair, *options)
        assert (status, f"has its entries {said}, where mergekit does not look" in err) == (2, True)
        assert not (tmp_path / "m").exists()
    # A prefix of the network's own is no wrapper's: filters are parts of names.
    inner = {f"backbone.{name}": entry for name, entry in networks[0].state_dict().items()}
    save_file(inner, tmp_path / "inner")
    assert run("merge", tmp_path / "inner", plain_paths[1], *MODEL, *options)[0] == 0


def test_networks_are_never_replaced_and_files_when_told(run, paths, tmp_path):
    for path in paths:
        status, _, err = run("merge", *paths, "--out", path, "--force")
        assert (status, "would replace a network" in err) == (2, True)
    (tmp_path / "m").write_text("mine")
    status, _, err = run("merge", *paths, "--out", tmp_path / "m")
    assert (status, f"--out {tmp_path / 'm'} exists already: pass --force" in err) == (2, True)
    assert (tmp_path / "m").read_text() == "mine"


def test_check_says_whether_two_files_can_be_averaged(run, networks, paths, tmp_path):
    status, out, _ = run("check", *paths)
    assert (status, out) == (0, f"{check_checkpoints(*paths, partition='module')}\n")
    _, out, _ = run("check", *paths, *MODEL, "--distances", "--json")
    record = json.loads(out)
    expected = check_checkpoints(*paths, networks[0], partition="fused", distances=True)
    assert record["layers"] == list(expected.layers)
    assert record["distances"] == pytest.approx(expected.distances)
    assert (record["distance"], record["cost"]) == (pytest.approx(expected.distance), None)
    assert "stage3.0.conv2" in run("check", *paths, *MODEL, "--distances")[1]
    save_file(digits_resnet(width=3).state_dict(), tmp_path / "c")
    status, out, err = run("check", paths[0], tmp_path / "c")
    assert (status, out) == (2, "")
    assert "conv.weight: shape (2, 1, 3, 3) in" in err


@pytest.mark.check
def test_check_tells_what_a_prediction_costs(run, paths):
    _, out, _ = run("check", *paths, *MODEL, *DATA, "--batch-size", 25, "--json")
    cost = json.loads(out)["cost"]
    assert (cost["batches"], cost["anchors"]) == (3, 3)
    assert cost["seconds"] == pytest.approx(cost["first"] + 2 * cost["further"])
    status, _, err = run("check", *paths, *MODEL, *DATA, "--device", "tpu9")
    assert (status, "device='tpu9' is not a device" in err) == (2, True)


@pytest.mark.parametrize("command", ["merge", "check"])
def test_threads_are_as_many_as_asked_for(command, run, paths, tmp_path, monkeypatch):
    found = []
    before, more = torch.get_num_threads(), ["--out", tmp_path / "m"] if command == "merge" else []
    inner = {"merge": "merging.files.plan_merge", "check": "merging.checking.check_checkpoints"}[command]

    def refuse(*_, **__):
        found.append(torch.get_num_threads())
        raise OptionError("seen")

    monkeypatch.setattr(f"lmc_curvature.{inner}", refuse)
    assert run(command, *paths, *more, "--threads", before + 1)[0] == 2
    assert (found, torch.get_num_threads()) == ([before + 1], before)
