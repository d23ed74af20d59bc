import resource
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors import SafetensorError

from lmc_curvature.errors import NonFiniteError, OptionError
from lmc_curvature.forking import ForkConfig, TrainingState, initial_model, run_forks, train
from lmc_curvature.sources import load_data
from tests.support.experiments import contents


@pytest.mark.check
def test_the_same_configuration_gives_the_same_bits(finished, config, tmp_path):
    torch.manual_seed(99)
    run_forks(config, tmp_path / "again", progress=False)
    assert contents(tmp_path / "again") == contents(finished.path)


def test_children_differ_by_their_order_seed_alone(finished, config):
    # Each child is what training from the parent's state with its own order gives.
    data = load_data("digits", limit=150)
    for fork_epoch in (0, 2):
        start = TrainingState.load(finished.parent.snapshot_path(fork_epoch))
        ends = []
        for child in (0, 1):
            model = initial_model(config)
            end = train(model, data, config.training, order_seed=1 + child, start=start, progress=False)
            stored = TrainingState.load(finished.child(fork_epoch, child).snapshot_path(3))
            assert all(torch.equal(end.model[name], stored.model[name]) for name in end.model)
            assert stored.history[:fork_epoch] == start.history
            ends.append(end.model["linear.weight"])
        assert not torch.equal(*ends)


def test_the_momentum_of_the_parent_is_carried_over(finished, config):
    start = TrainingState.load(finished.parent.snapshot_path(2))
    assert len(start.optimizer) == len(list(initial_model(config).parameters()))
    assert start.optimizer["linear.weight"].abs().max() > 0
    assert not TrainingState.load(finished.parent.snapshot_path(0)).optimizer


def test_a_finished_experiment_is_not_trained_again(finished, config, watch):
    before = {name: (finished.path / name).stat().st_mtime_ns for name in contents(finished.path)}
    run_forks(config, finished.path, progress=False)
    assert {name: (finished.path / name).stat().st_mtime_ns for name in contents(finished.path)} == before
    assert watch.steps == 0


@pytest.mark.check(after=1)
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
def test_lost_files_come_back_with_the_same_bits(finished, config, copy, lost):
    for name in lost:
        (copy / name).unlink()
    run_forks(config, copy, progress=False)
    assert contents(copy) == contents(finished.path)


@pytest.mark.check
@pytest.mark.parametrize(("save_seconds", "trained_again"), [(0.0, 0), (1e9, 3)])
def test_an_interrupted_experiment_continues_to_the_same_bits(
    finished, config, watch, tmp_path, save_seconds, trained_again
):
    def interrupt(step, logits):
        # In the parent's second epoch, which is before its next snapshot.
        if step == 4:
            raise KeyboardInterrupt
        return logits

    watch.on_step = interrupt
    with pytest.raises(KeyboardInterrupt):
        run_forks(config, tmp_path, save_seconds=save_seconds, progress=False)
    assert (tmp_path / "parent" / "latest.safetensors").is_file() == (trained_again == 0)
    run_forks(config, tmp_path, save_seconds=save_seconds, progress=False)
    assert contents(tmp_path) == contents(finished.path)
    assert watch.steps == 33 + 1 + trained_again


@pytest.mark.check
def test_networks_trained_in_turns_have_the_same_bits(finished, config, watch, tmp_path):
    seen = []

    def look(step, logits):
        seen.append([path.parent.name for path in tmp_path.rglob("manifest.json")])
        return logits

    watch.on_step = look
    run_forks(config, tmp_path, together=3, progress=False)
    assert contents(tmp_path) == contents(finished.path)
    # The children of fork 0 began before the parent's first epoch was over.
    assert len(seen[0]) == 1
    assert len(seen[3]) == 3
    with pytest.raises(OptionError, match="together=0 must be at least 1"):
        run_forks(config, tmp_path, together=0)


@pytest.mark.check
def test_networks_trained_in_turns_continue_to_the_same_bits(finished, config, watch, tmp_path):
    def interrupt(step, logits):
        if step in (8, 33):
            raise KeyboardInterrupt
        return logits

    watch.on_step = interrupt
    for together in (3, 2):
        with pytest.raises(KeyboardInterrupt):
            run_forks(config, tmp_path, together=together, save_seconds=0.0, progress=False)
    run_forks(config, tmp_path, together=4, progress=False)
    assert contents(tmp_path) == contents(finished.path)


@pytest.mark.check
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
def test_side_by_side_and_interrupted_on_every_device(settings, tmp_path, monkeypatch, device):
    training = {**settings["training"], "batch_size": 40, "augmentation": "crop-flip"}
    plain = {"model": "digits-resnet", "model_options": {"width": 2}, "training": training}
    config = ForkConfig(**{**settings, **plain})
    run_forks(config, tmp_path / "one", device=device, together=1, progress=False)
    # As many as fit.
    run_forks(config, tmp_path / "several", device=device, progress=False)
    assert contents(tmp_path / "several") == contents(tmp_path / "one")
    saves, save = [], TrainingState.save

    def interrupt(state, path):
        save(state, path)
        saves.append(path)
        if len(saves) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingState, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_forks(config, tmp_path / "resumed", device=device, together=3, save_seconds=0.0, progress=False)
    assert contents(tmp_path / "resumed").keys() < contents(tmp_path / "one").keys() | {
        str(path.relative_to(tmp_path / "resumed")) for path in saves
    }
    run_forks(config, tmp_path / "resumed", device=device, together=2, progress=False)
    assert contents(tmp_path / "resumed") == contents(tmp_path / "one")


def test_one_that_diverges_leaves_those_it_was_trained_with(finished, config, watch, tmp_path):
    # The second step of the second child of fork 0.
    watch.diverge(7)
    with pytest.raises(NonFiniteError, match=r"^fork 0, child 1: Training diverged: .* in epoch 1, step 2 of 3"):
        run_forks(config, tmp_path, together=3, progress=False)
    kept, expected = contents(tmp_path), contents(finished.path)
    others = [name for name in expected if "fork-0000/child-1" not in name]
    assert {name: kept[name] for name in others} == {name: expected[name] for name in others}


@pytest.mark.check
def test_several_processes_share_the_work(settings, tmp_path):
    config = ForkConfig(**{**settings, "threads": 1})
    run_forks(config, tmp_path / "one", progress=False)
    run_forks(config, tmp_path / "two", workers=2, progress=False)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    with pytest.raises(OptionError, match="workers=0 must be at least 1"):
        run_forks(config, tmp_path / "none", workers=0)


@pytest.fixture
def limit_files():
    """Let the operating system refuse every file of more than so many bytes."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size=before: resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))


@pytest.mark.check
def test_a_full_disk_leaves_the_last_good_state(finished, config, watch, tmp_path, limit_files):
    def fill(step, logits):
        if step == 4:
            limit_files(5_000)
        return logits

    watch.on_step = fill
    with pytest.raises((OSError, SafetensorError), match="File too large"):
        run_forks(config, tmp_path, save_seconds=0.0, progress=False)
    assert sorted(file.name for file in (tmp_path / "parent").glob("*.safetensors")) == [
        "epoch-0000.safetensors",
        "latest.safetensors",
    ]
    assert not list((tmp_path / "parent").glob(".*.partial"))
    limit_files()
    run_forks(config, tmp_path, progress=False)
    assert contents(tmp_path) == contents(finished.path)


def test_a_diverged_child_is_named_and_the_others_are_kept(finished, config, watch, tmp_path):
    watch.diverge(13)
    for steps in (30, 30):
        # The second time nothing is trained: it would diverge again.
        with pytest.raises(NonFiniteError, match=r"^fork 0, child 0: Training diverged: .* in epoch 2, step 1 of 3\."):
            run_forks(config, tmp_path, progress=False)
        assert watch.steps == steps
    kept, expected = contents(tmp_path), contents(finished.path)
    others = [name for name in expected if "fork-0000/child-0" not in name]
    assert {name: kept[name] for name in others} == {name: expected[name] for name in others}
    assert "fork-0000/child-0/epoch-0001.safetensors" in kept
    assert "fork-0000/child-0/epoch-0003.safetensors" not in kept


def test_a_diverged_parent_ends_the_experiment(settings, tmp_path):
    config = ForkConfig(**{**settings, "training": {**settings["training"], "learning_rate": 1e30}})
    with pytest.raises(NonFiniteError, match=r"^parent: Training diverged"):
        run_forks(config, tmp_path, progress=False)


def test_a_diverged_parent_leaves_the_children_it_reached(finished, config, watch, tmp_path):
    watch.diverge(4)
    for steps in (24, 24):
        # The second time nothing is left to train.
        with pytest.raises(NonFiniteError) as caught:
            run_forks(config, tmp_path, progress=False)
        parent, *children = str(caught.value).splitlines()
        assert parent.startswith("parent: Training diverged: ")
        assert children == [
            f"fork 2, child {c}: Cannot start, because the parent diverged before epoch 2." for c in (0, 1)
        ]
        assert watch.steps == steps
    kept, expected = contents(tmp_path), contents(finished.path)
    reached = [name for name in expected if "fork-0000" in name]
    assert {name: kept[name] for name in reached} == {name: expected[name] for name in reached}
    assert not (tmp_path / "fork-0002").exists()


@pytest.mark.check
def test_what_a_diverged_network_had_is_computed_again_if_it_is_lost(config, watch, tmp_path):
    watch.diverge(7, 33 + 7)
    with pytest.raises(NonFiniteError, match=r"^parent: Training diverged: .* in epoch 3, step 1 of 3"):
        run_forks(config, tmp_path, progress=False)
    before = contents(tmp_path)
    (tmp_path / "parent" / "epoch-0002.safetensors").unlink()
    with pytest.raises(NonFiniteError, match=r"^parent: Training diverged: .* in epoch 3, step 1 of 3"):
        run_forks(config, tmp_path, progress=False)
    assert contents(tmp_path) == before


@pytest.mark.check
def test_threads_are_those_of_the_configuration(settings, watch, tmp_path):
    seen, before = set(), torch.get_num_threads()

    def look(step, logits):
        seen.add(torch.get_num_threads())
        return logits

    watch.on_step = look
    changes = {"training": {"epochs": 1, "learning_rate": 0.1}, "fork_epochs": [0], "threads": before + 1}
    run_forks(ForkConfig(**{**settings, **changes}), tmp_path, progress=False)
    assert seen == {before + 1}
    assert torch.get_num_threads() == before


@pytest.mark.check
@pytest.mark.parametrize(("progress", "shown"), [(True, True), (None, False), (False, False)])
def test_one_progress_bar_counts_every_epoch(config, tmp_path, capsys, progress, shown):
    run_forks(config, tmp_path, progress=progress)
    printed = capsys.readouterr().err
    assert ("11/11 [" in printed) == shown
    assert bool(printed) == shown


@pytest.mark.check
def test_only_the_first_rank_shows_progress(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run_forks(config, tmp_path, progress=True)
    assert not capsys.readouterr().err


@pytest.mark.check
def test_ranks_of_torchrun_share_the_children(settings, tmp_path):
    config = ForkConfig(**{**settings, "model": "digits-resnet", "model_options": {"width": 2}, "threads": 1})
    run_forks(config, tmp_path / "one", progress=False)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "lmc_curvature.cli", "fork"]
    arguments = [tmp_path / "config.yaml", "--out", tmp_path / "two", "--no-progress"]
    subprocess.run([sys.executable, *command, *arguments], check=True, timeout=300)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
