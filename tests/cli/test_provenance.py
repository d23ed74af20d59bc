"""Claim: an answer in JSON names the files, data, options, versions and commits that it was computed from."""

import hashlib
import importlib.metadata
import json
import subprocess

import pytest
import torch
from safetensors.torch import save_file

from lmc_curvature.cli.provenance import checkpoint_record, commit_of, repository_of, software_record
from lmc_curvature.sources import digits_resnet, load_data, transformed_folder
from tests.cli import test_inputs as inputs
from tests.sources.test_data import write_images


def _sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def checkpoints(tmp_path):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.pt"]
    save_file(digits_resnet(width=2).state_dict(), paths[0])
    torch.save(digits_resnet(width=2).state_dict(), paths[1])
    return paths


def test_json_says_what_it_was_computed_from(run, checkpoints):
    options = ["--model", "digits-resnet", "--model-option", "width=2", "--limit", 30, "--batch-size", 20]
    options += ["--frozen", "conv", "--base", "b", "--mean", "0.5", "--std", "0.25", "--no-progress", "--json"]
    status, out, err = run("measure", *checkpoints, "--data", "digits", "--split", "test", *options, "--alphas", 3)
    assert (status, err) == (0, "")
    found = json.loads(out)["provenance"]
    for key, path in zip("ab", checkpoints, strict=True):
        assert found["networks"][key] == {"path": str(path), "sha256": {path.name: _sha256(path)}}
    assert found["model"] == {"name": "digits-resnet", "options": {"width": 2}, "key": None, "strip_prefix": None}
    data = load_data("digits", "test", 30, mean=[0.5], std=[0.25])
    assert found["data"] == {
        "name": "digits",
        "split": "test",
        "limit": 30,
        "batch_size": 20,
        "resize": None,
        "mean": [0.5],
        "std": [0.25],
        "sha256": data.fingerprint(),
    }
    expected = {"frozen": ["conv"], "base": "b", "loss": "cross-entropy", "layers": "fused", "dtype": "float32"}
    assert expected.items() <= found["options"].items()
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["lmc-curvature"] == importlib.metadata.version("lmc-curvature")


def test_loaders_of_ones_own_are_named_and_files_known_by_their_contents(run, tmp_path):
    write_images(tmp_path / "images" / "ant", 2, size=(6, 6))
    write_images(tmp_path / "images" / "bee", 2, size=(6, 6))
    _, common = inputs._networks(tmp_path)
    options = ["--alphas", 3, "--no-progress", "--json"]
    name = f"{inputs.__name__}:transform"
    status, out, err = run("measure", *common, "--data", tmp_path / "images", "--transform", name, *options)
    assert (status, err) == (0, "")
    found = json.loads(out)["provenance"]["data"]
    assert found["transform"] == name
    assert found["sha256"] == transformed_folder(tmp_path / "images", inputs.transform, 2).fingerprint()
    name = f"{inputs.__name__}:regression"
    _, out, _ = run("measure", *common, "--data", name, "--loss", "mse", *options)
    assert json.loads(out)["provenance"]["data"] == {"name": name}


def test_every_shard_and_its_index_is_hashed(tmp_path):
    places = {"x": "one.safetensors", "y": "two.safetensors", "z": "one.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    save_file({name: torch.ones(2) for name in "xz"}, tmp_path / "one.safetensors")
    save_file({"y": torch.ones(2)}, tmp_path / "two.safetensors")
    found = checkpoint_record(tmp_path)
    names = ["model.safetensors.index.json", "one.safetensors", "two.safetensors"]
    assert found == {"path": str(tmp_path), "sha256": {name: _sha256(tmp_path / name) for name in names}}


@pytest.fixture
def repository(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    name = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
    subprocess.run(["git", "-C", tmp_path, *name, "commit", "-qm", "first", "--allow-empty"], check=True)
    return tmp_path


def test_a_tree_is_dirty_when_a_file_is_not_the_commits(repository):
    clean = commit_of(repository)
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (repository / "new.py").write_text("")
    assert commit_of(repository) == {"commit": clean["commit"], "dirty": True}


def test_a_folder_within_a_repository_has_no_commit_of_its_own(repository, monkeypatch):
    inside = repository / "inside"
    inside.mkdir()
    assert commit_of(inside) == {"commit": None, "dirty": None}
    assert repository_of(inside) == repository
    # Code that a user names is imported from the directory where the command is given.
    monkeypatch.chdir(inside)
    assert software_record()["commits"]["working directory"] == commit_of(repository)


def test_without_git_there_is_no_commit(repository, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert commit_of(repository) == {"commit": None, "dirty": None}
    assert software_record()["commits"]["working directory"] == {"commit": None, "dirty": None}
