"""Claim: `select` goes from two files to a merged network, and says of it what the library says and what it has."""

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lmc_curvature import BarrierPrediction, merge, predict_barrier, select_layers
from lmc_curvature.cli.batches import with_other_data
from lmc_curvature.cli.conclusion import conclusion, merge_command
from lmc_curvature.cli.options import Comparison
from lmc_curvature.merging import Verification
from lmc_curvature.merging.trials import SetTrial
from lmc_curvature.sources import load_data
from tests.sources.test_data import write_images
from tests.support.networks import perceptron, permuted_pair

HERE = __name__
SIZES = [6, 8, 8, 8, 4]
COMMON = ["--model", f"{HERE}:make", "--data", f"{HERE}:chosen_on", "--no-progress", "--no-witness"]
OTHERS = ["--held-out", f"{HERE}:others"]


def make():
    return perceptron(SIZES)


NETWORKS = permuted_pair(SIZES)


def _data(seed):
    x = torch.randn(3, 16, 6, generator=torch.Generator().manual_seed(seed))
    return [(part, NETWORKS[0](part).argmax(1)) for part in x]


def chosen_on():
    return _data(0)


def others():
    return _data(1)


def passing():
    """A loader that can be visited only once."""
    return iter(_data(0))


def make_normalized():
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4))


def regression():
    return [(x, F.one_hot(y, 4).float()) for x, y in _data(0)]


@pytest.fixture(scope="module")
def prediction():
    return predict_barrier(*NETWORKS, chosen_on(), progress=False)


@pytest.fixture
def paths(tmp_path):
    return _files(NETWORKS, tmp_path)


@pytest.fixture
def normalized(tmp_path):
    """Two networks with batch normalisation, and their files."""
    torch.manual_seed(0)
    networks = [make_normalized() for _ in range(2)]
    return networks, _files(networks, tmp_path)


def _files(networks, folder):
    for name, network in zip("ab", networks, strict=True):
        save_file(network.state_dict(), folder / name)
    return folder / "a", folder / "b"


def _loss(network, batches):
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        return F.cross_entropy(network.eval()(x), y).item()


def _plain_rise(path, batches):
    """The rise of the network in a file, by plain torch."""
    merged = make()
    merged.load_state_dict(load_file(path), strict=True)
    return _loss(merged, batches) - sum(_loss(network, batches) for network in NETWORKS) / 2


def _selection(verification):
    return list(verification.selection.members), verification.selection.base


@pytest.mark.check
def test_the_answer_is_that_of_the_library_and_the_file_has_the_promised_loss(run, paths, prediction, tmp_path):
    budget = 0.3 * float(prediction.set_barriers([None])[0])
    selected = select_layers(prediction, budget, weight="distance", excluded="6")
    options = {"measurements": 4, "held_out": others(), "progress": False}
    expected = selected.verify(*NETWORKS, chosen_on(), **options)
    given = ["--budget", budget, "--weight", "distance", "--excluded", "6", "--measurements", 4, *OTHERS]
    status, out, err = run("select", *paths, *COMMON, *given, "--json", "--out", tmp_path / "m")
    record = json.loads(out)
    assert (status, err, record["out"]) == (0, "", str(tmp_path / "m"))
    found = record["selection"]
    assert (found["layers"], found["base"]) == _selection(expected)
    assert found["share"] == pytest.approx(expected.selection.share)
    assert (found["exact"], record["budget"]) == (True, pytest.approx(budget))
    assert record["predicted_selection"]["layers"] == list(selected.members)
    assert record["predicted_selection"]["rise"] == pytest.approx(selected.rise, rel=1e-3)
    assert [row["layers"] for row in record["measurements"]] == [list(trial.members) for trial in expected.trials]
    assert [row["rise"] for row in record["measurements"]] == pytest.approx(
        [trial.rise for trial in expected.trials], abs=1e-5
    )
    assert record["holds"] == expected.holds
    assert len(record["prediction"]["anchors"]) == 3
    # What is written is what was measured, by plain torch.
    assert record["measured"]["rise"] == pytest.approx(_plain_rise(tmp_path / "m", chosen_on()), abs=1e-5)
    assert record["held_out"]["rise"] == pytest.approx(_plain_rise(tmp_path / "m", others()), abs=1e-5)
    assert record["measured"]["rise"] <= budget < prediction.curve([0.5])[0]
    assert 0 < len(found["layers"]) < len(prediction.layers)
    provenance = record["provenance"]
    assert provenance["options"]["excluded"] == ["6"]
    assert provenance["options"]["weight"] == "distance"
    assert provenance["held_out"]["name"] == f"{HERE}:others"
    with safe_open(tmp_path / "m", framework="pt") as file:
        stored = json.loads(file.metadata()["lmc_curvature"])["metadata"]
    assert stored["selection"] == {
        "budget": record["budget"],
        "predicted_rise": found["rise"],
        "measured_rise": record["measured"]["rise"],
        "held_out_rise": record["held_out"]["rise"],
    }


@pytest.mark.check
def test_what_is_printed_ends_with_what_to_do(run, paths, prediction, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = select_layers(prediction, 0.2, base="b").verify(*NETWORKS, chosen_on(), measurements=3, progress=False)
    assert expected.selection.base == "b"
    status, out, _ = run("select", *paths, *COMMON, "--budget", 0.2, "--base", "b", "--measurements", 3)
    *_, last = out.splitlines()
    text = " ".join(out.split())
    inside = expected.selection.choice.members(expected.selection.members)
    share = prediction.parameters[inside].sum() / prediction.parameters.sum()
    assert status == 0
    assert "Verdict: " in text
    assert f"Average {len(expected.selection.members)} of 4 layers ({share:.1%} of the parameters)" in text
    assert "Measured on the data that it was chosen on, it is" in text
    assert "On other data it may be higher: --held-out measures that." in text
    assert text.count("of 4 │") == len(expected.trials) + 1
    # The command at the end writes the merged network.
    program, *command = shlex.split(last.removeprefix("To write it: "))
    assert program == "lmc-curvature"
    assert run(*command)[0] == 0
    assert _plain_rise(tmp_path / "merged.safetensors", chosen_on()) == pytest.approx(expected.chosen.rise, abs=1e-5)


def test_a_rise_near_the_budget_is_told_from_one_within_it(prediction):
    selection = select_layers(prediction, 0.2, base="a")

    def said(rise, held_out=None):
        trials = [
            SetTrial(
                members=selection.members,
                base="a",
                weight=1.0,
                predicted=0.1,
                expected=0.1,
                rise=each,
                standard_error=0.01,
            )
            for each in (rise, held_out)
            if each is not None
        ]
        found = Verification(selection, (trials[0],), trials[0], 1.5, trials[1] if held_out else None)
        return " ".join(conclusion(selection, found))

    assert "it is 0.18 ± 0.01, within the budget." in said(0.18)
    assert "No measured set is surely within it" not in said(0.18)
    assert "it is 0.19 ± 0.01, just within the budget. No measured set is surely within it." in said(0.19)
    assert "it is 0.21 ± 0.01, above the budget. No measured set" in said(0.21)
    assert "--held-out" in said(0.1)
    text = said(0.1, 0.3)
    assert "Measured on held-out data, it is 0.3 ± 0.01, above the budget. Choose by more data" in text
    assert "--held-out" not in text
    assert "Choose by more data" not in said(0.1, 0.19)


@pytest.mark.parametrize(("base", "whose"), [("a", "those of A"), ("b", "those of B")])
def test_where_no_layer_is_averaged_it_is_one_of_the_two(prediction, base, whose):
    selection = select_layers(prediction, 1.0, base=base, excluded=prediction.layers)
    assert conclusion(selection, None)[0] == f"No layer is averaged: all layers are {whose}."
    nothing = select_layers(prediction, 1e-9, base=base)
    assert conclusion(nothing, None)[0] == f"Nothing can be averaged within the budget: all layers are {whose}."
    assert merge_command(Comparison(Path("a"), Path("b"), "digits-resnet", "digits"), selection) is None


def test_the_command_to_merge_says_what_is_not_the_default(prediction):
    selection = select_layers(prediction, 1e3, excluded=["0", "2"], base="b")
    options = {"model_option": ["width=2", "x=a b"], "key": "ema", "layers": "module", "limit": 9}
    given = Comparison(Path("a"), Path("b"), "digits-resnet", "digits", **options)
    assert merge_command(given, selection) == (
        "lmc-curvature merge a b --model digits-resnet --model-option width=2 --model-option 'x=a b' --key ema "
        "--partition module --layers 4,6 --base b --out merged.safetensors"
    )
    assert "--loss mse --data digits --limit 9 --batch-norm recalibrate" in merge_command(
        dataclasses.replace(given, batch_norm="recalibrate", loss="mse"), selection
    )


@pytest.mark.check
@pytest.mark.parametrize("base", ["a", "b"])
def test_a_file_without_averaged_layers_is_called_a_copy(run, paths, tmp_path, base):
    given = ["--budget", 1e-9, "--base", base, "--measurements", 0, "--out", tmp_path / "m"]
    status, out, _ = run("select", *paths, *COMMON, *given)
    assert (status, out.splitlines()[-1]) == (0, f"{tmp_path / 'm'} is a copy of {base.upper()}")
    assert "Nothing can be averaged within the budget: all layers are" in " ".join(out.split())
    torch.testing.assert_close(load_file(tmp_path / "m"), load_file(paths["ab".index(base)]), rtol=0, atol=0)


@pytest.mark.check
def test_without_measurements_the_prediction_selects(run, paths, tmp_path):
    given = ["--relative-budget", 1e5, "--measurements", 0, "--save", tmp_path / "p"]
    status, out, _ = run("select", *paths, *COMMON, *given, "--out", tmp_path / "m", "--json")
    record = json.loads(out)
    assert (status, record["measurements"], record["measured"], record["holds"]) == (0, [], None, None)
    assert record["selection"]["layers"] == ["0", "2", "4", "6"]
    prediction = BarrierPrediction.load(tmp_path / "p")
    assert record["budget"] == pytest.approx(1e5 * sum(end.loss for end in prediction.endpoints) / 2)
    # The middle of all layers is an anchor.
    assert record["selection"]["rise"] == pytest.approx(_plain_rise(tmp_path / "m", chosen_on()), abs=1e-5)
    status, out, _ = run("select", *paths, *COMMON, *given, "--base", "mean")
    assert (status, "Nothing was measured" in out, "(with --base b the other of the two)" in out) == (0, True, True)


@pytest.mark.check
def test_statistics_are_estimated_anew_on_the_data_that_the_set_is_chosen_on(run, normalized, tmp_path):
    (networks, paths), merged = normalized, make_normalized()
    given = ["--budget", 9, "--batch-norm", "recalibrate", "--measurements", 1, *OTHERS, "--out", tmp_path / "m"]
    status, out, _ = run("select", *paths, *COMMON, "--model", f"{HERE}:make_normalized", *given, "--json")
    record = json.loads(out)
    assert status == 0
    assert f"--data {HERE}:chosen_on --batch-norm recalibrate" in record["merge"]
    merged.load_state_dict(load_file(tmp_path / "m"), strict=True)
    options = {"batch_norm": "recalibrate", "loader": chosen_on(), "progress": False}
    ends = [merge(*networks, alpha=alpha, **options) for alpha in (0.0, 1.0)]
    for found, batches in ((record["measured"], chosen_on()), (record["held_out"], others())):
        rise = _loss(merged, batches) - sum(_loss(end, batches) for end in ends) / 2
        assert found["rise"] == pytest.approx(rise, abs=1e-5)


def test_a_merge_with_new_statistics_evaluates_the_loss_that_is_named(run, normalized, tmp_path):
    _, paths = normalized
    options = ["--model", f"{HERE}:make_normalized", "--data", f"{HERE}:regression", "--loss", "mse", "--no-progress"]
    # Networks of random weights have other statistics than their own.
    with pytest.warns(UserWarning, match="Re-estimated statistics"):
        _, out, _ = run("merge", *paths, *options, "--batch-norm", "recalibrate", "--out", tmp_path / "m", "--json")
    merged = make_normalized()
    merged.load_state_dict(load_file(tmp_path / "m"), strict=True)
    x, y = (torch.cat(parts) for parts in zip(*regression(), strict=True))
    with torch.no_grad():
        assert json.loads(out)["losses"]["after"] == pytest.approx(F.mse_loss(merged.eval()(x), y).item(), rel=1e-5)


def test_images_of_held_out_data_are_prepared_as_those_that_the_set_is_chosen_on(tmp_path):
    for folder, seed in (("one", 0), ("two", 5)):
        for name in ("ant", "bee"):
            write_images(tmp_path / folder / name, 3, seed=seed, size=(5, 5))
    comparison = Comparison(tmp_path / "a", tmp_path / "b", "digits-resnet", str(tmp_path / "one"), progress=False)
    with pytest.warns(UserWarning, match="of their own training split"):
        loader = comparison.batches()
    own = with_other_data(comparison, "digits", "test", [])
    assert (own.data, own.split, own.mean) == ("digits", "test", None)
    other = with_other_data(comparison, str(tmp_path / "two"), "train", loader).batches()
    torch.testing.assert_close(other.dataset.mean, loader.dataset.mean, rtol=0, atol=0)
    torch.testing.assert_close(other.dataset.std, loader.dataset.std, rtol=0, atol=0)
    own_mean = load_data(tmp_path / "two", progress=False).mean
    assert not torch.allclose(other.dataset.mean, own_mean, rtol=1e-2)


BUDGET = ["--budget", 0.1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([], "Give one of --budget, in units of the loss, and --relative-budget"),
        ([*BUDGET, "--relative-budget", 0.1], "both were given"),
        (["--budget", -1], "--budget=-1.0: expected a number that is not negative"),
        (["--relative-budget", "nan"], "--relative-budget=nan: expected"),
        ([*BUDGET, "--caution", "inf"], "--caution=inf: expected"),
        ([*BUDGET, "--required", " ,"], "--required ' ,' names no layer"),
        ([*BUDGET, "--required", "0,2", "--excluded", "2,4"], "--required and --excluded name '2'"),
        ([*BUDGET, "--measurements", 0, *OTHERS], "--held-out is for what is measured"),
        ([*BUDGET, "--held-out", "no.such:data"], "are the data of --data"),
        ([*BUDGET, "--base", "mean", "--out", "m"], "--out writes one: choose --base a or b"),
        ([*BUDGET, "--out", "pyproject.toml"], "--out pyproject.toml exists already: pass --force"),
        ([*BUDGET, "--out", "m.pt"], "--out m.pt: the merged network is written as safetensors"),
        ([*BUDGET, "--out", "m", "--save", "m"], "--save and --out would write one file, m"),
        ([*BUDGET, "--force"], "--force is for the file of --out"),
        ([*BUDGET, "--measurements", -1], "--measurements"),
    ],
)
def test_mistakes_in_options_are_told_before_anything_is_read(run, change, message):
    # There are no such networks, and no such data.
    status, out, err = run("select", "no-a", "no-b", "--model", "no.such:model", "--data", "no.such:data", *change)
    assert (status, out) == (2, "")
    assert message in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--excluded", "0,7", "--data", "no.such:data"], "There is no layer '7'"),
        (["--required", "conv", "--data", "no.such:data"], "There is no layer 'conv'"),
        (["--required", "6.weight", "--data", "no.such:data"], "6.weight is part of layer '6'"),
        (["--layers", "0,2"], "name some by --required and --excluded"),
        (["--data", f"{HERE}:passing"], "can be visited only once"),
        (["--held-out", "no.such:data"], "the module 'no.such' cannot be imported"),
    ],
)
def test_mistakes_are_told_before_anything_is_computed(run, paths, monkeypatch, change, message):
    monkeypatch.setattr("lmc_curvature.predict_barrier", None, raising=False)
    status, out, err = run("select", *paths, *COMMON, *BUDGET, *change)
    assert (status, out) == (2, "")
    assert message in err


def test_a_prediction_is_kept_where_nothing_can_be_selected(run, paths, tmp_path):
    given = ["--budget", 1e-9, "--required", "0,2", "--save", tmp_path / "p", "--out", tmp_path / "m"]
    status, _, err = run("select", *paths, *COMMON, *given, "--json")
    assert (status, "no set of layers stays within it" in err) == (2, True)
    assert not (tmp_path / "m").exists()
    assert select_layers(BarrierPrediction.load(tmp_path / "p"), 10.0).members


@pytest.mark.check
def test_an_answer_is_printed_though_the_network_cannot_be_written(run, paths, tmp_path, small_files):
    (tmp_path / "m").write_text("mine")
    small_files(256)
    status, out, err = run(
        "select", *paths, *COMMON, *BUDGET, "--measurements", 1, "--json", "--out", tmp_path / "m", "--force"
    )
    assert (status, "the answer above was not saved" in err) == (1, True)
    assert json.loads(out)["measured"]["rise"] is not None
    assert (tmp_path / "m").read_text() == "mine"


def test_an_interrupt_is_one_line(run, paths, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("lmc_curvature.merging.verify.verify_selection", interrupt)
    status, _, err = run("select", *paths, *COMMON, *BUDGET, "--save", tmp_path / "p", "--out", tmp_path / "m")
    assert (status, err) == (130, "interrupted.\n")
    assert (tmp_path / "p").exists()
    assert not (tmp_path / "m").exists()
