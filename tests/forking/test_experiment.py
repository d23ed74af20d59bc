import csv
import dataclasses
import errno
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from lmc_curvature.checkpoints import files as checkpoints
from lmc_curvature.errors import (
    CheckpointError,
    ConfigurationError,
    DataError,
    NewerVersionError,
    NonFiniteError,
    OptionError,
    PartitionError,
)
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
from lmc_curvature.forking.checks import check_fit
from lmc_curvature.forking.directory import initial_model

SETTINGS = {
    "training": {"epochs": 3, "learning_rate": 0.1, "batch_size": 50},
    "fork_epochs": [0, 2],
    "snapshot_epochs": 1,
    "limit": 150,
    "model_options": {"width": 2},
}
CONFIG = ForkConfig(**SETTINGS)


class Unsteady(nn.Module):
    """A network that is another in training, as some of torchvision's are."""

    def __init__(self, training="", num_classes=10):
        super().__init__()
        self.in_training = training
        self.linear = nn.Linear(64, num_classes)
        self.norm = nn.BatchNorm1d(num_classes)

    def forward(self, x):
        logits = self.norm(self.linear(x.flatten(1)))
        if self.training and self.in_training == "an assertion":
            raise AssertionError("Wrong image height!")
        if self.training and self.in_training == "a pair":
            return logits, logits
        return nn.functional.dropout(logits, training=self.training)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run_forks(CONFIG, tmp_path_factory.mktemp("forks"), progress=False)


@pytest.fixture
def copy(finished, tmp_path):
    """A finished experiment that a test may damage."""
    shutil.copytree(finished.path, tmp_path / "copy")
    return tmp_path / "copy"


def contents(path):
    files = (file for file in path.rglob("*") if file.is_file() and "locks" not in file.parts)
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def test_the_directory_holds_every_file_and_nothing_else(finished):
    stored = {"parent": (0, 2, 3)}
    stored |= {f"fork-0000/child-{c}": (1, 2, 3) for c in (0, 1)}
    stored |= {f"fork-0002/child-{c}": (3,) for c in (0, 1)}
    files = [f"{run}/{name}" for run in stored for name in ("manifest.json", "metrics.csv")]
    files += [f"{run}/epoch-{epoch:04d}.safetensors" for run, epochs in stored.items() for epoch in epochs]
    assert sorted(contents(finished.path)) == sorted(["config.json", "provenance.json", *files])


def test_the_same_configuration_gives_the_same_bits(finished, tmp_path):
    torch.manual_seed(99)
    run_forks(CONFIG, tmp_path / "again", progress=False)
    assert contents(tmp_path / "again") == contents(finished.path)


def test_children_differ_by_their_order_seed_alone(finished):
    # Each child is what training from the parent's state with its own order gives.
    data = load_data("digits", limit=150)
    for fork_epoch in (0, 2):
        start = TrainingState.load(finished.parent.snapshot_path(fork_epoch))
        ends = []
        for child in (0, 1):
            model = initial_model(CONFIG)
            end = train(model, data, CONFIG.training, order_seed=1 + child, start=start, progress=False)
            stored = TrainingState.load(finished.child(fork_epoch, child).snapshot_path(3))
            assert all(torch.equal(end.model[name], stored.model[name]) for name in end.model)
            assert stored.history[:fork_epoch] == start.history
            ends.append(end.model["linear.weight"])
        assert not torch.equal(*ends)


def test_the_momentum_of_the_parent_is_carried_over(finished):
    start = TrainingState.load(finished.parent.snapshot_path(2))
    assert len(start.optimizer) == len(list(initial_model(CONFIG).parameters()))
    assert start.optimizer["linear.weight"].abs().max() > 0
    assert not TrainingState.load(finished.parent.snapshot_path(0)).optimizer


def test_fork_0_is_the_initialisation(finished):
    start = TrainingState.load(finished.parent.snapshot_path(0)).model
    expected = initial_model(CONFIG).state_dict()
    assert all(torch.equal(start[name], expected[name]) for name in expected)
    other = initial_model(ForkConfig(**SETTINGS, init_seed=1)).state_dict()
    assert not torch.equal(other["conv.weight"], expected["conv.weight"])


def test_a_finished_experiment_is_not_trained_again(finished, monkeypatch):
    monkeypatch.setattr(experiment, "train", None)
    monkeypatch.setattr(experiment, "load_split", None)
    before = {name: (finished.path / name).stat().st_mtime_ns for name in contents(finished.path)}
    run_forks(CONFIG, finished.path, progress=False)
    assert {name: (finished.path / name).stat().st_mtime_ns for name in contents(finished.path)} == before


@pytest.mark.parametrize(
    "lost",
    [
        ["fork-0002/child-1/epoch-0003.safetensors"],
        ["fork-0000/child-1/epoch-0002.safetensors"],
        ["parent/epoch-0002.safetensors"],
        ["parent/epoch-0000.safetensors", "parent/epoch-0003.safetensors"],
        ["parent/metrics.csv", "fork-0002/child-0/metrics.csv", "fork-0000/child-0/manifest.json"],
    ],
)
def test_lost_files_come_back_with_the_same_bits(finished, copy, lost):
    for name in lost:
        (copy / name).unlink()
    run_forks(CONFIG, copy, progress=False)
    assert contents(copy) == contents(finished.path)


@pytest.mark.parametrize("saves_often", [False, True])
def test_an_interrupted_experiment_continues_to_the_same_bits(finished, tmp_path, monkeypatch, saves_often):
    real, calls = experiment.train, []
    if saves_often:
        monkeypatch.setattr(experiment, "_SECONDS_BETWEEN_SAVES", 0.0)

    def interrupted(*args, **options):
        calls.append(options["start"].epoch)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(experiment, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_forks(CONFIG, tmp_path, progress=False)
    assert (tmp_path / "parent" / "latest.safetensors").is_file() == saves_often
    run_forks(CONFIG, tmp_path, progress=False)
    assert contents(tmp_path) == contents(finished.path)
    # The parent is cut short in its second epoch, which is before its next snapshot.
    again = [1, 2] if saves_often else [0, 1, 2]
    assert calls == [0, 1, *again, 0, 1, 2, 0, 1, 2, 2, 2]


def test_several_processes_share_the_work(finished, tmp_path):
    run_forks(ForkConfig(**SETTINGS, threads=1), tmp_path / "one", progress=False)
    run_forks(ForkConfig(**SETTINGS, threads=1), tmp_path / "two", workers=2, progress=False)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_full_disk_leaves_the_last_good_state(finished, tmp_path, monkeypatch):
    real, calls = checkpoints.save_file, []
    monkeypatch.setattr(experiment, "_SECONDS_BETWEEN_SAVES", 0.0)

    def failing(entries, path, *rest):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(entries, path, *rest)

    monkeypatch.setattr(checkpoints, "save_file", failing)
    with pytest.raises(OSError, match="No space left"):
        run_forks(CONFIG, tmp_path, progress=False)
    assert sorted(file.name for file in (tmp_path / "parent").glob("*.safetensors")) == [
        "epoch-0000.safetensors",
        "latest.safetensors",
    ]
    assert not list((tmp_path / "parent").glob(".*.partial"))
    run_forks(CONFIG, tmp_path, progress=False)
    assert contents(tmp_path) == contents(finished.path)


def test_the_manifest_names_every_snapshot_with_its_digest(finished):
    manifest = finished.child(0, 1).manifest()
    assert (manifest["status"], manifest["order_seed"], manifest["first_epoch"]) == ("finished", 2, 0)
    assert list(manifest["sha256"]) == [f"epoch-{epoch:04d}.safetensors" for epoch in (1, 2, 3)]
    for name, digest in manifest["sha256"].items():
        contents = (finished.child(0, 1).path / name).read_bytes()
        assert hashlib.sha256(contents).hexdigest() == digest
    assert manifest["made_with"]["torch"] == torch.__version__


def test_a_damaged_snapshot_is_named_and_computed_again(finished, copy):
    path = copy / "fork-0000" / "child-1" / "epoch-0003.safetensors"
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(bytes(changed))
    with pytest.raises(CheckpointError, match=r"epoch-0003\.safetensors is damaged.*run_forks\(config, .*, makes it"):
        load_child(copy, 0, 1)
    with pytest.warns(UserWarning, match=r"child-1/epoch-0003\.safetensors is damaged.* It is computed again"):
        run_forks(CONFIG, copy, progress=False)
    assert contents(copy) == contents(finished.path)


def test_a_snapshot_of_another_run_is_named_and_computed_again(finished, copy):
    child = copy / "fork-0002" / "child-1" / "epoch-0003.safetensors"
    shutil.copy(copy / "fork-0002" / "child-0" / "epoch-0003.safetensors", child)
    with pytest.warns(UserWarning, match=r"child-1.epoch-0003\.safetensors is not the file that .*manifest\.json"):
        run_forks(CONFIG, copy, progress=False)
    assert contents(copy) == contents(finished.path)


def test_metrics_have_a_row_for_each_epoch_of_the_run(finished):
    def epochs(path):
        with path.open(encoding="utf-8", newline="") as file:
            return [int(row["epoch"]) for row in csv.DictReader(file)]

    assert epochs(finished.parent.metrics_path) == [1, 2, 3]
    assert epochs(finished.child(0, 1).metrics_path) == [1, 2, 3]
    assert epochs(finished.child(2, 0).metrics_path) == [3]


def test_networks_and_data_are_rebuilt_from_the_directory(finished):
    data = load_fork_data(finished.path)
    assert len(data) == 150
    assert len(load_fork_data(finished.path, "test")) == 360
    child, parent = load_child(finished.path, 2, 1), load_parent(finished.path)
    assert not child.training
    assert evaluate(parent, data)[0] < evaluate(load_parent(finished.path, 0), data)[0] - 0.2
    assert torch.equal(
        child.linear.weight, TrainingState.load(finished.child(2, 1).snapshot_path(3)).model["linear.weight"]
    )
    assert torch.equal(load_parent(finished.path, 0).conv.weight, initial_model(CONFIG).conv.weight)
    assert open_directory(finished.path).config == CONFIG


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
        (json.dumps({"version": "7", "config": {}}), NewerVersionError, "version '7', of a newer .* Upgrade"),
        (json.dumps({"version": "1", "config": {}}), NewerVersionError, "version '1', of an older .* Use that release"),
        (json.dumps({"version": "2", "config": {**SETTINGS, "new": 1}}), ConfigurationError, "new: unknown key"),
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
        ({"snapshot_epochs": 0}, "snapshot_epochs: 0: expected a list of epochs, or at least 1"),
        ({"snapshot_epochs": [3]}, "snapshot_epochs: 3 is outside the schedule of 3 epochs; choose from 1 to 2"),
        ({"trace": {"alpha": 3}}, "trace.alpha: unknown key; did you mean 'alphas'"),
        ({"trace": {"layers": "some"}}, "trace.layers: .*'all', 'last' or 'never'"),
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
        ({"model_options": {"num_classes": 4}}, ConfigurationError, r"gives \(2, 4\) .*expected \(2, 10\)"),
        (
            {"model": "test_experiment:Unsteady", "model_options": {"training": "a pair"}},
            ConfigurationError,
            r"in training, .*Unsteady' gives tuple; expected logits alone, a tensor \(2, 10\).*aux_logits: false",
        ),
        (
            {"model": "test_experiment:Unsteady", "model_options": {"training": "an assertion"}},
            ConfigurationError,
            r"in training, .*Unsteady' cannot take images of shape \(1, 8, 8\) .*Wrong image height",
        ),
        (
            {"model": "test_experiment:Unsteady", "model_options": {}, "limit": 151},
            ConfigurationError,
            r"'digits', 1 a batch \(Expected more than 1 value per channel",
        ),
        ({"data": "no-such-place"}, DataError, "'no-such-place' is neither"),
    ],
)
def test_a_network_or_data_set_that_does_not_fit_is_refused(tmp_path, monkeypatch, change, error, message):
    monkeypatch.setattr(experiment, "train", None)
    with pytest.raises(error, match=message):
        run_forks(ForkConfig(**{**SETTINGS, **change}), tmp_path, progress=False)


def test_trying_the_network_out_leaves_no_trace(monkeypatch):
    before = torch.random.get_rng_state()
    # Draws random numbers in training.
    config = ForkConfig(**{**SETTINGS, "model": "test_experiment:Unsteady", "model_options": {}})
    check_fit(config, load_data("digits", limit=150))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.fixture
def diverge(monkeypatch):
    """Let whoever trains with an order seed diverge after an epoch."""
    real = experiment.train

    def after(*, order_seed, epoch):
        def diverging(*args, **options):
            if (options["order_seed"], options["start"].epoch) == (order_seed, epoch):
                raise NonFiniteError("Training diverged.")
            return real(*args, **options)

        monkeypatch.setattr(experiment, "train", diverging)

    return after


def test_a_diverged_child_is_named_and_the_others_are_kept(finished, tmp_path, monkeypatch, diverge):
    diverge(order_seed=1, epoch=1)
    for _ in range(2):
        # The second time nothing is trained: it would diverge again.
        with pytest.raises(NonFiniteError, match=r"^fork 0, child 0: Training diverged\.$"):
            run_forks(CONFIG, tmp_path, progress=False)
        monkeypatch.setattr(experiment, "train", None)
    kept, expected = contents(tmp_path), contents(finished.path)
    others = [name for name in expected if "fork-0000/child-0" not in name]
    assert {name: kept[name] for name in others} == {name: expected[name] for name in others}
    assert "fork-0000/child-0/epoch-0001.safetensors" in kept
    assert "fork-0000/child-0/epoch-0003.safetensors" not in kept


def test_a_diverged_parent_ends_the_experiment(tmp_path):
    config = ForkConfig(**{**SETTINGS, "training": {**SETTINGS["training"], "learning_rate": 1e30}})
    with pytest.raises(NonFiniteError, match=r"^parent: Training diverged"):
        run_forks(config, tmp_path, progress=False)


def test_a_diverged_parent_leaves_the_children_it_reached(finished, tmp_path, monkeypatch, diverge):
    diverge(order_seed=0, epoch=1)
    report = ["parent: Training diverged."]
    report += [f"fork 2, child {c}: Cannot start, because the parent diverged before epoch 2." for c in (0, 1)]
    for _ in range(2):
        # The second time nothing is left to train.
        with pytest.raises(NonFiniteError) as caught:
            run_forks(CONFIG, tmp_path, progress=False)
        assert str(caught.value).splitlines() == report
        monkeypatch.setattr(experiment, "train", None)
        monkeypatch.setattr(experiment, "load_split", None)
    kept, expected = contents(tmp_path), contents(finished.path)
    reached = [name for name in expected if "fork-0000" in name]
    assert {name: kept[name] for name in reached} == {name: expected[name] for name in reached}
    assert not (tmp_path / "fork-0002").exists()


def test_what_a_diverged_network_had_is_computed_again_if_it_is_lost(tmp_path, diverge):
    diverge(order_seed=0, epoch=2)
    with pytest.raises(NonFiniteError, match=r"^parent: Training diverged\.$"):
        run_forks(CONFIG, tmp_path, progress=False)
    before = contents(tmp_path)
    (tmp_path / "parent" / "epoch-0002.safetensors").unlink()
    with pytest.raises(NonFiniteError, match=r"^parent: Training diverged\.$"):
        run_forks(CONFIG, tmp_path, progress=False)
    assert contents(tmp_path) == before


def test_threads_are_those_of_the_configuration(tmp_path, monkeypatch):
    seen, before = [], torch.get_num_threads()

    def watched(model, data, config, *, start, until, **options):
        seen.append(torch.get_num_threads())
        return dataclasses.replace(start, epoch=until)

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
    assert [(bar.n, bar.total) for bar in bars if bar.total] == [(3 + 2 * 3 + 2 * 1,) * 2]


def test_tensorboard_events_are_the_metrics(finished, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_forks(CONFIG, tmp_path / "forks", tensorboard=tmp_path / "events", progress=False)
    events = EventAccumulator(str(tmp_path / "events" / "fork-0002" / "child-1")).Reload()
    last = TrainingState.load(finished.child(2, 1).snapshot_path(3)).history[-1]
    assert {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]} == {
        name: [(3, pytest.approx(getattr(last, name), rel=1e-6))] for name in ("learning_rate", "loss", "accuracy")
    }


def test_tensorboard_that_is_missing_is_named_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"package tensorboard: pip install lmc-curvature\[tensorboard\]"):
        run_forks(CONFIG, tmp_path / "forks", tensorboard=tmp_path / "events", progress=False)
    assert not (tmp_path / "forks").exists()


def test_a_snapshot_from_a_newer_release_is_left_alone(finished, copy):
    path = copy / "fork-0000" / "child-1" / "epoch-0003.safetensors"
    header, entries = checkpoints._read_safetensors(path)
    save_file(entries, path, {checkpoints._HEADER: json.dumps({**header, "version": "99"})})
    written = path.read_bytes()
    with pytest.raises(NewerVersionError, match=r"Upgrade lmc_curvature\.$"):
        load_child(copy, 0, 1)
    with pytest.raises(NewerVersionError, match=r"epoch-0003\.safetensors has format version '99'.*Upgrade"):
        run_forks(CONFIG, copy, progress=False)
    assert path.read_bytes() == written


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"trace": {"partition": "fusd"}}, PartitionError, "did you mean 'fused'"),
        ({"trace": {"examples": 151}}, DataError, r"trace\.examples: 151 were asked for; the train split has 150"),
        (
            {"trace": {"examples": 361}, "limit": 400},
            DataError,
            r"trace\.examples: 361 were asked for; the test split has 360",
        ),
    ],
)
def test_what_cannot_be_traced_is_known_before_training(tmp_path, monkeypatch, change, error, message):
    monkeypatch.setattr(experiment, "train", None)
    with pytest.raises(error, match=message):
        run_forks(ForkConfig(**{**SETTINGS, **change}), tmp_path, progress=False)


@pytest.mark.slow
def test_ranks_of_torchrun_share_the_children(tmp_path):
    config = ForkConfig(**SETTINGS, threads=1)
    run_forks(config, tmp_path / "one", progress=False)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "lmc_curvature.cli", "fork"]
    arguments = [tmp_path / "config.yaml", "--out", tmp_path / "two", "--no-progress"]
    subprocess.run([sys.executable, *command, *arguments], check=True, timeout=300)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
