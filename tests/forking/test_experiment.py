import csv
import json

import pytest
import torch

from lmc_curvature.errors import CheckpointError, ConfigurationError, DataError, NonFiniteError
from lmc_curvature.forking import (
    ForkConfig,
    TrainingState,
    evaluate,
    experiment,
    load_child,
    load_data,
    load_fork_data,
    load_parent,
    open_directory,
    run_forks,
    train,
)
from lmc_curvature.forking.directory import initial_model

SETTINGS = {
    "training": {"epochs": 3, "learning_rate": 0.1, "batch_size": 50},
    "fork_epochs": [0, 2],
    "limit": 150,
    "model_options": {"width": 2},
}
CONFIG = ForkConfig(**SETTINGS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run_forks(CONFIG, tmp_path_factory.mktemp("forks"), progress=False)


@pytest.fixture
def copy(finished, tmp_path):
    """A finished experiment that a test may damage."""
    for source in finished.path.rglob("*.*"):
        target = tmp_path / "copy" / source.relative_to(finished.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    return tmp_path / "copy"


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_the_directory_holds_every_file_and_nothing_else(finished):
    children = [f"fork-{f:04d}/child-{c}.{e}" for f in (0, 2) for c in (0, 1) for e in ("csv", "safetensors")]
    parent = [f"parent/epoch-{e:04d}.safetensors" for e in (0, 2, 3)]
    assert sorted(contents(finished.path)) == sorted(["config.json", "parent/metrics.csv", *parent, *children])


def test_the_same_configuration_gives_the_same_bits(finished, tmp_path):
    torch.manual_seed(99)
    run_forks(CONFIG, tmp_path / "again", progress=False)
    assert contents(tmp_path / "again") == contents(finished.path)


def test_children_differ_by_their_order_seed_alone(finished):
    # Each child is what training from the parent's state with its own order gives.
    data = load_data("digits", limit=150)
    for fork_epoch in (0, 2):
        start = TrainingState.load(finished.parent_path(fork_epoch))
        ends = []
        for child in (0, 1):
            model = initial_model(CONFIG)
            end = train(model, data, CONFIG.training, order_seed=1 + child, start=start, progress=False)
            stored = TrainingState.load(finished.child_path(fork_epoch, child))
            assert all(torch.equal(end.model[name], stored.model[name]) for name in end.model)
            assert stored.history[:fork_epoch] == start.history
            ends.append(end.model["linear.weight"])
        assert not torch.equal(*ends)


def test_the_momentum_of_the_parent_is_carried_over(finished):
    start = TrainingState.load(finished.parent_path(2))
    assert len(start.optimizer) == len(list(initial_model(CONFIG).parameters()))
    assert start.optimizer["linear.weight"].abs().max() > 0
    assert not TrainingState.load(finished.parent_path(0)).optimizer


def test_fork_0_is_the_initialisation(finished):
    start = TrainingState.load(finished.parent_path(0)).model
    expected = initial_model(CONFIG).state_dict()
    assert all(torch.equal(start[name], expected[name]) for name in expected)
    other = initial_model(ForkConfig(**SETTINGS, init_seed=1)).state_dict()
    assert not torch.equal(other["conv.weight"], expected["conv.weight"])


def test_a_finished_experiment_is_not_trained_again(finished, monkeypatch):
    monkeypatch.setattr(experiment, "train", None)
    monkeypatch.setattr(experiment, "load_data", None)
    before = {path: path.stat().st_mtime_ns for path in finished.path.rglob("*")}
    run_forks(CONFIG, finished.path, progress=False)
    assert {path: path.stat().st_mtime_ns for path in finished.path.rglob("*")} == before


@pytest.mark.parametrize(
    "lost",
    [
        ["fork-0002/child-1.safetensors"],
        ["parent/epoch-0002.safetensors"],
        ["parent/epoch-0000.safetensors", "parent/epoch-0003.safetensors"],
        ["parent/metrics.csv", "fork-0002/child-0.csv"],
    ],
)
def test_lost_files_come_back_with_the_same_bits(finished, copy, lost):
    for name in lost:
        (copy / name).unlink()
    run_forks(CONFIG, copy, progress=False)
    assert contents(copy) == contents(finished.path)


def test_an_interrupted_experiment_continues_to_the_same_bits(finished, tmp_path, monkeypatch):
    real, calls = experiment.train, []

    def interrupted(*args, **options):
        calls.append(options["start"].epoch)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(experiment, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_forks(CONFIG, tmp_path, progress=False)
    run_forks(CONFIG, tmp_path, progress=False)
    assert contents(tmp_path) == contents(finished.path)
    # Three parts of the parent, the first child cut short, and the four children.
    assert calls == [0, 0, 2, 0, 0, 0, 2, 2]


def test_a_damaged_snapshot_is_named_and_computed_again(finished, copy):
    path = copy / "fork-0000" / "child-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"child-1\.safetensors is damaged.*run_forks\(config, .*\) makes it"):
        load_child(copy, 0, 1)
    with pytest.warns(UserWarning, match=r"child-1\.safetensors is damaged.* It is computed again"):
        run_forks(CONFIG, copy, progress=False)
    assert contents(copy) == contents(finished.path)


def test_metrics_have_a_row_for_each_epoch_of_the_run(finished):
    def epochs(path):
        with path.open(encoding="utf-8", newline="") as file:
            return [int(row["epoch"]) for row in csv.DictReader(file)]

    assert epochs(finished.parent_metrics_path()) == [1, 2, 3]
    assert epochs(finished.child_metrics_path(0, 1)) == [1, 2, 3]
    assert epochs(finished.child_metrics_path(2, 0)) == [3]


def test_networks_and_data_are_rebuilt_from_the_directory(finished):
    data = load_fork_data(finished.path)
    assert len(data) == 150
    assert len(load_fork_data(finished.path, "test")) == 360
    child, parent = load_child(finished.path, 2, 1), load_parent(finished.path)
    assert not child.training
    assert evaluate(parent, data)[0] < evaluate(load_parent(finished.path, 0), data)[0] - 0.2
    assert torch.equal(child.linear.weight, TrainingState.load(finished.child_path(2, 1)).model["linear.weight"])
    assert torch.equal(load_parent(finished.path, 0).conv.weight, initial_model(CONFIG).conv.weight)
    assert open_directory(finished.path).config == CONFIG


def test_what_is_not_there_is_explained(finished, copy, tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json is missing; run_forks\(config, .*\) makes"):
        load_child(tmp_path, 0, 0)
    with pytest.raises(CheckpointError, match=r"no fork at epoch 1; its forks are \(0, 2\)"):
        load_child(finished.path, 1, 0)
    with pytest.raises(CheckpointError, match="no child 2; its children are 0 to 1"):
        load_child(finished.path, 0, 2)
    with pytest.raises(CheckpointError, match=r"no parent at epoch 1; it was stored at \(0, 2, 3\)"):
        load_parent(finished.path, 1)
    (copy / "fork-0000" / "child-0.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"child-0\.safetensors does not exist\. run_forks\(config, .* makes it"):
        load_child(copy, 0, 0)


def test_a_changed_configuration_is_refused_with_the_difference(finished):
    changed = ForkConfig(**{**SETTINGS, "training": {**SETTINGS["training"], "learning_rate": 0.2}, "children": 3})
    with pytest.raises(ConfigurationError) as caught:
        run_forks(changed, finished.path, progress=False)
    assert "children: 2 there, 3 now\ntraining.learning_rate: 0.1 there, 0.2 now" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{", CheckpointError, r"config\.json is damaged"),
        ("[]", CheckpointError, r"config\.json is damaged"),
        (json.dumps({"version": "7", "config": {}}), ConfigurationError, "version '7'.*Upgrade"),
        (json.dumps({"version": "1", "config": {**SETTINGS, "new": 1}}), ConfigurationError, "new: unknown key"),
    ],
)
def test_unreadable_configurations_are_explained(tmp_path, text, error, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(error, match=message):
        run_forks(CONFIG, tmp_path, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fork_epochs": [0, 3]}, "fork_epochs: 3 is outside the schedule of 3 epochs; choose from 0 to 2"),
        ({"fork_epochs": [-1]}, "fork_epochs: -1 is outside"),
        ({"fork_epochs": [2, 1]}, r"fork_epochs: \(2, 1\) must increase"),
        ({"fork_epochs": []}, "fork_epochs: "),
        ({"children": 1}, "children: .*greater than or equal to 2, got 1"),
        ({"fork_epoch": [0]}, "fork_epoch: unknown key; did you mean 'fork_epochs'"),
        ({"training": {"epochs": 3, "learning_rat": 1}}, "training.learning_rate: missing"),
        ({"training": {"epochs": 3, "learning_rate": -1}}, "training.learning_rate: .*greater than 0, got -1"),
        (
            {"training": {"epochs": 3, "learning_rate": 1, "epoch": 2}},
            "training.epoch: unknown key; did you mean 'epochs'",
        ),
        ({"training": 3}, "training: .*got 3"),
    ],
)
def test_bad_configurations_name_the_key(change, message):
    with pytest.raises(ConfigurationError, match=f"^{message}"):
        ForkConfig(**{**SETTINGS, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"model": "resnet20"},
            ConfigurationError,
            r"'resnet20' cannot take images of shape \(1, 8, 8\) from 'digits'",
        ),
        ({"model_options": {"num_classes": 4}}, ConfigurationError, r"gives \(1, 4\) .*expected \(1, 10\)"),
        ({"data": "no-such-place"}, DataError, "'no-such-place' is neither"),
    ],
)
def test_a_network_or_data_set_that_does_not_fit_is_refused(tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        run_forks(ForkConfig(**{**SETTINGS, **change}), tmp_path, progress=False)


def test_a_diverged_child_is_named_and_the_others_are_kept(finished, copy, monkeypatch):
    for child in (0, 1):
        (copy / "fork-0002" / f"child-{child}.safetensors").unlink()
    real = experiment.train

    def diverging(*args, **options):
        if options["order_seed"] == 1:
            raise NonFiniteError("Training diverged.")
        return real(*args, **options)

    monkeypatch.setattr(experiment, "train", diverging)
    with pytest.raises(NonFiniteError, match=r"^Fork 2, child 0: Training diverged\.$"):
        run_forks(CONFIG, copy, progress=False)
    assert (copy / "fork-0002" / "child-1.safetensors").is_file()
    assert not (copy / "fork-0002" / "child-0.safetensors").exists()


def test_threads_are_those_of_the_configuration(tmp_path, monkeypatch):
    seen, before = [], torch.get_num_threads()

    def watched(model, data, config, *, start, **options):
        seen.append(torch.get_num_threads())
        return start

    monkeypatch.setattr(experiment, "train", watched)
    run_forks(ForkConfig(**SETTINGS, threads=before + 1), tmp_path, progress=False)
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


def test_one_progress_bar_counts_every_epoch(tmp_path, monkeypatch):
    bars = []

    class Bar(experiment.tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            bars.append(self)

    monkeypatch.setattr(experiment, "tqdm", Bar)
    run_forks(CONFIG, tmp_path, progress=True)
    assert [(bar.n, bar.total) for bar in bars] == [(3 + 2 * 3 + 2 * 1,) * 2]
