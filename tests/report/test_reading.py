"""Claim: a report is made of the files and directories that the commands leave, and says what is wrong with others."""

import dataclasses
import json
import shutil

import pytest

from lmc_curvature import select_layers
from lmc_curvature.cli.tables import selection_record
from lmc_curvature.errors import CheckpointError, FileFormatError, OptionError
from lmc_curvature.merging import Verification
from lmc_curvature.merging.trials import SetTrial
from lmc_curvature.report import read_contents
from lmc_curvature.report.answers import answer_of


@pytest.fixture
def files(pair, tmp_path):
    paths = [tmp_path / "predicted.safetensors", tmp_path / "measured.safetensors"]
    for result, path in zip(pair, paths, strict=True):
        result.save(path)
    return paths


def test_files_of_one_pair(files, pair):
    contents = read_contents(files, budget=0.25, merge=["lmc-curvature", "merge", "a", "b"])
    (found,) = contents.pairs
    assert found.prediction.layers == pair[0].layers
    assert list(found.measurements) == ["measured"]
    assert (found.selection.budget, found.merge) == (0.25, ("lmc-curvature", "merge", "a", "b"))
    assert contents.provenance["files"] == [str(path) for path in files]


@pytest.mark.check
def test_the_demo_s_directory(files, traced, tmp_path):
    for fork in (0, 1):
        folder = tmp_path / "demo" / "barriers" / f"fork-{fork:04d}"
        folder.mkdir(parents=True)
        for path in files:
            shutil.copy(path, folder)
    shutil.copytree(traced[0], tmp_path / "demo" / "forks")
    contents = read_contents([tmp_path / "demo"])
    assert [each.title for each in contents.pairs] == ["fork at epoch 0", "fork at epoch 1"]
    first, second = contents.pairs[1].merge[2:4]
    assert first.endswith("fork-0001/child-0/epoch-0002.safetensors")
    assert second.endswith("fork-0001/child-1/epoch-0002.safetensors")
    assert contents.provenance["experiment"]["config"]["fork_epochs"] == [0, 1]
    shutil.rmtree(tmp_path / "demo" / "barriers")
    (tmp_path / "demo" / "barriers").mkdir()
    with pytest.raises(CheckpointError, match="holds no results"):
        read_contents([tmp_path / "demo"])


@pytest.mark.check
def test_a_traced_experiment(traced):
    contents = read_contents([traced[0]])
    assert [each.title for each in contents.pairs] == ["fork at epoch 0", "fork at epoch 1"]
    first = contents.pairs[0]
    assert list(first.measurements) == [
        "measured (training data)",
        "measured (test data)",
        "measured (sets of layers)",
    ]
    assert first.merge[4:6] == ("--model", "tests.support.experiments:tiny")
    assert all((each.merge[2]).endswith("epoch-0002.safetensors") for each in contents.pairs)
    assert len(contents.traces.geometry) == 3


def test_what_select_printed_is_what_was_measured(files, pair):
    prediction = pair[0]
    selection = select_layers(prediction, 5.0)
    fields = {"base": selection.base, "weight": selection.weight, "predicted": 0.5, "expected": 0.4}
    chosen = SetTrial(members=selection.members, rise=0.3, standard_error=0.01, **fields)
    held_out = dataclasses.replace(chosen, rise=0.6, standard_error=float("nan"))
    verification = Verification(selection, (chosen,), chosen, 1.5, held_out)
    record = json.loads(json.dumps(selection_record(selection, verification)))
    record["provenance"] = {"options": {"caution": 1.5}}
    (found,) = read_contents(files, records={"s.json": record}).pairs
    assert str(found.verification) == str(verification)
    assert found.selection.members == selection.members
    said = " ".join(answer_of(found).selection)
    assert "Measured on the data that it was chosen on, it is 0.3 ± 0.01, within the budget." in said
    assert "Measured on held-out data, it is 0.6 ± unknown (one batch), within the budget." in said


def test_records_of_predictions_are_provenance_alone(files):
    record = {"verdict": [], "provenance": {"data": {"name": "digits"}}}
    contents = read_contents(files, records={"p.json": record})
    assert contents.pairs[0].verification is None
    assert contents.provenance["p.json"] == {"data": {"name": "digits"}}


@pytest.mark.parametrize(
    "record",
    [
        {"measurements": [{}], "measured": {"base": "a"}, "budget": 1},
        {"measurements": 3, "measured": {"layers": []}},
        {"measurements": [{}], "measured": {"base": "a"}, "held_out": False},
        {"measurements": ["x"], "measured": "x", "budget": {}},
    ],
)
def test_records_that_select_did_not_print_are_named(files, record):
    with pytest.raises(FileFormatError, match=r"s\.json is damaged: its contents are not what they should be"):
        read_contents(files, records={"s.json": record | {"provenance": {}}})


def test_damaged_records_of_an_experiment_are_named(traced, tmp_path):
    shutil.copytree(traced[0], tmp_path / "copy")
    (tmp_path / "copy" / "provenance.json").write_text("{")
    with pytest.raises(FileFormatError, match=r"provenance\.json is damaged"):
        read_contents([tmp_path / "copy"])


def test_what_is_wrong_is_named(files, traced, tmp_path):
    with pytest.raises(OptionError, match="one directory of an experiment, or files"):
        read_contents([files[0], traced[0]])
    with pytest.raises(OptionError, match="one directory of an experiment, or files"):
        read_contents([])
    with pytest.raises(FileNotFoundError, match=r"other\.safetensors does not exist"):
        read_contents([tmp_path / "other.safetensors"])
    with pytest.raises(FileFormatError, match="holds 'sibling-geometry'; expected a file that `save`"):
        read_contents([traced[0] / "traces" / "fork-0000" / "epoch-0002" / "geometry.safetensors"])
    (tmp_path / "text.safetensors").write_text("text")
    with pytest.raises(FileFormatError, match="is damaged or is not a safetensors file"):
        read_contents([tmp_path / "text.safetensors"])
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        read_contents([tmp_path])
    with pytest.raises(OptionError, match="mapping from the name of each pair"):
        read_contents([files[0], files[0]])
