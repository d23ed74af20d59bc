import json

import pytest
import torch

from lmc_curvature.errors import CheckpointError, ConfigurationError, NewerVersionError
from lmc_curvature.forking import (
    ForkConfig,
    TrainingState,
    evaluate,
    initial_model,
    load_child,
    load_fork_data,
    load_parent,
    open_directory,
    run_forks,
)
from tests.support.experiments import contents


def test_the_directory_holds_every_file_and_nothing_else(finished):
    stored = {"parent": (0, 2, 3)}
    stored |= {f"fork-0000/child-{c}": (1, 2, 3) for c in (0, 1)}
    stored |= {f"fork-0002/child-{c}": (3,) for c in (0, 1)}
    files = [f"{run}/{name}" for run in stored for name in ("manifest.json", "metrics.csv")]
    files += [f"{run}/epoch-{epoch:04d}.safetensors" for run, epochs in stored.items() for epoch in epochs]
    assert sorted(contents(finished.path)) == sorted(["config.json", "provenance.json", *files])


def test_fork_0_is_the_initialisation(finished, config, settings):
    start = TrainingState.load(finished.parent.snapshot_path(0)).model
    expected = initial_model(config).state_dict()
    assert all(torch.equal(start[name], expected[name]) for name in expected)
    other = initial_model(ForkConfig(**settings, init_seed=1)).state_dict()
    assert not torch.equal(other["conv.weight"], expected["conv.weight"])


def test_networks_and_data_are_rebuilt_from_the_directory(finished, config):
    data = load_fork_data(finished.path)
    assert len(data) == 150
    assert len(load_fork_data(finished.path, "test")) == 360
    child, parent = load_child(finished.path, 2, 1), load_parent(finished.path)
    assert not child.training
    assert evaluate(parent, data)[0] < evaluate(load_parent(finished.path, 0), data)[0] - 0.2
    assert torch.equal(
        child.linear.weight, TrainingState.load(finished.child(2, 1).snapshot_path(3)).model["linear.weight"]
    )
    assert torch.equal(load_parent(finished.path, 0).conv.weight, initial_model(config).conv.weight)
    assert open_directory(finished.path).config == config


def test_what_is_not_there_is_explained(finished, copy, tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json is missing; run_forks\(config, .*, makes"):
        load_child(tmp_path, 0, 0)
    with pytest.raises(CheckpointError, match=r"no fork at epoch 1; its forks are \(0, 2\)"):
        load_child(finished.path, 1, 0)
    with pytest.raises(CheckpointError, match="no child 2; its children are 0 to 1"):
        load_child(finished.path, 0, 2)
    with pytest.raises(CheckpointError, match=r"no parent at epoch 1; it was stored at \(0, 2, 3\)"):
        load_parent(finished.path, 1)
    with pytest.raises(CheckpointError, match=r"no fork 2, child 1 at epoch 2; it was stored at \(3,\)"):
        load_child(finished.path, 2, 1, epoch=2)
    (copy / "fork-0000" / "child-0" / "epoch-0003.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"epoch-0003\.safetensors does not exist\. run_forks\(config, .* makes it"
    ):
        load_child(copy, 0, 0)


def test_a_changed_configuration_is_refused_with_the_difference(finished, settings):
    changed = ForkConfig(**{**settings, "training": {**settings["training"], "learning_rate": 0.2}, "children": 3})
    with pytest.raises(ConfigurationError) as caught:
        run_forks(changed, finished.path, progress=False)
    assert "children: 2 there, 3 now\ntraining.learning_rate: 0.1 there, 0.2 now" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{", CheckpointError, r"config\.json is damaged"),
        ("[]", CheckpointError, r"config\.json is damaged"),
        (json.dumps({"version": "7", "config": {}}), NewerVersionError, "version '7', of a newer .* Upgrade"),
        (json.dumps({"version": "1", "config": {}}), NewerVersionError, "version '1', of an older .* Use that release"),
        (json.dumps({"version": "2", "config": {"new": 1}}), ConfigurationError, "new: unknown key"),
    ],
)
def test_unreadable_configurations_are_explained(config, tmp_path, text, error, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(error, match=message):
        run_forks(config, tmp_path, progress=False)
