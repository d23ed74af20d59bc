import contextlib
import json
import threading
import time

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from lmc_curvature.errors import CheckpointError, ConfigurationError, DataError, NewerVersionError, NonFiniteError
from lmc_curvature.forking import ForkConfig, TrainingState, open_directory, run_forks
from lmc_curvature.forking.directory import create_directory
from lmc_curvature.tracing import read_traces, trace_forks
from tests.support.experiments import contents

# Experiments are trained and traced, end to end.
pytestmark = pytest.mark.check


def tabled(path):
    """The forks and epochs that the tables hold."""
    geometry = read_traces(path).geometry
    return set(zip(geometry["fork"], geometry["epoch"], strict=True))


def edit(path, **changes):
    """Change values of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_config(copy, **changes):
    edit(copy / "config.json", config={**json.loads((copy / "config.json").read_text())["config"], **changes})


@contextlib.contextmanager
def another_at(path, pair, until, act):
    """Another process works on a pair until a file is there, then acts and ends."""
    # Released by another thread than the one that acquires it.
    lock = FileLock(open_directory(path).lock_path(f"trace {pair}"), thread_local=False)
    lock.acquire()

    def other():
        deadline = time.monotonic() + 60
        while not until.is_file() and time.monotonic() < deadline:
            time.sleep(0.02)
        act()
        lock.release()

    thread = threading.Thread(target=other)
    thread.start()
    yield
    thread.join()


@pytest.mark.parametrize(
    "lost",
    [
        ["curves.csv"],
        ["fork-0000/epoch-0002/sets.safetensors"],
        ["fork-0001/epoch-0002/predicted.safetensors", "fork-0001/epoch-0002/geometry.safetensors"],
    ],
)
def test_what_was_lost_comes_back_with_the_same_bits(copy, lost):
    expected = contents(copy)
    for name in lost:
        (copy / "traces" / name).unlink()
    trace_forks(copy, progress=False)
    assert contents(copy) == expected


def test_damage_is_named_and_computed_again(copy):
    expected = contents(copy)
    path = copy / "traces" / "fork-0000" / "epoch-0002" / "train.safetensors"
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(bytes(changed))
    with pytest.warns(UserWarning, match=r"train\.safetensors is damaged.* It is computed again"):
        trace_forks(copy, progress=False)
    assert contents(copy) == expected


def test_files_that_another_process_is_at_are_left_alone(copy):
    expected = contents(copy)
    pair, elsewhere = (copy / "traces" / "fork-0000" / f"epoch-000{epoch}" for epoch in (2, 1))
    (pair / "sets.safetensors").unlink()
    half_written = pair / "train.safetensors"
    half_written.write_bytes(b"half")
    (elsewhere / "sets.safetensors").unlink()
    seen = []

    def go_on():
        # The other one ends before it comes to the last file.
        seen.append(half_written.read_bytes())
        half_written.write_bytes(expected["traces/fork-0000/epoch-0002/train.safetensors"])

    with another_at(copy, "fork 0, epoch 2", elsewhere / "sets.safetensors", go_on):
        trace_forks(copy, progress=False)
    assert seen == [b"half"]
    assert contents(copy) == expected


@pytest.mark.parametrize(
    ("lost", "cut_short", "left"),
    [
        ("fork-0000/child-1/epoch-0001", False, {(0, 2), (1, 2)}),
        ("fork-0000/child-0/epoch-0002", True, {(1, 2)}),
        ("parent/epoch-0001", False, {(0, 1), (0, 2)}),
    ],
)
def test_what_can_be_traced_is_traced_without_missing_snapshots(traced, untraced, lost, cut_short, left):
    path = untraced / f"{lost}.safetensors"
    written = path.read_bytes()
    path.unlink()
    if cut_short:
        path.write_bytes(written[:-1])
    with pytest.raises(CheckpointError, match=rf"{path.name} .*run_forks\(.*lmc-curvature fork.*makes"):
        trace_forks(untraced, progress=False)
    assert tabled(untraced) == left
    path.write_bytes(written)
    trace_forks(untraced, progress=False)
    assert contents(untraced) == contents(traced[0])


def test_networks_that_come_while_others_are_traced_are_told_of(untraced):
    late = untraced / "parent" / "epoch-0001.safetensors"
    hidden = late.rename(untraced / "hidden")
    first = untraced / "traces" / "fork-0000" / "epoch-0001" / "sets.safetensors"
    with (
        another_at(untraced, "fork 0, epoch 2", first, lambda: hidden.rename(late)),
        pytest.raises(CheckpointError, match=r"^fork 1, epoch 2 not traced: their .*goes on\.\nAll others"),
    ):
        trace_forks(untraced, progress=False)
    assert set(read_traces(untraced).barriers["fork"]) == {0}
    assert set(trace_forks(untraced, progress=False).barriers["fork"]) == {0, 1}


def block(path):
    """Let nobody write a file."""
    (path / "in the way").mkdir(parents=True)


def test_an_error_is_not_hidden_by_one_of_the_tables(copy):
    (copy / "traces" / "fork-0001" / "epoch-0002" / "test.safetensors").unlink()
    (copy / "traces" / "curves.csv").unlink()
    block(copy / "traces" / "curves.csv")
    edit_config(copy, data="gone")
    with pytest.raises(DataError, match="'gone' is neither"):
        trace_forks(copy, progress=False)
    with pytest.raises(OSError, match="curves"):
        trace_forks(copy, data="digits", progress=False)


def test_a_trace_that_fails_has_tables_of_what_was_done(untraced):
    block(untraced / "traces" / "fork-0000" / "epoch-0002" / "train.safetensors")
    with pytest.raises(OSError, match="train"):
        trace_forks(untraced, progress=False)
    assert tabled(untraced) == {(0, 1)}


def test_nothing_to_trace_leaves_no_tables(config, tmp_path):
    create_directory(tmp_path, config)
    with pytest.raises(CheckpointError, match=r"and 7 more missing: run_forks\(.*makes them\.$"):
        trace_forks(tmp_path, progress=False)
    assert not list((tmp_path / "traces").glob("*.csv"))


def test_a_diverged_child_leaves_its_fork_out(untraced):
    manifest = untraced / "fork-0000" / "child-0" / "manifest.json"
    digests = json.loads(manifest.read_text())["sha256"]
    del digests["epoch-0002.safetensors"]
    edit(manifest, sha256=digests, status="diverged", message="Training diverged.")
    (untraced / "fork-0000" / "child-0" / "epoch-0002.safetensors").unlink()
    with pytest.raises(NonFiniteError, match=r"^fork 0, child 0: Training diverged\.\nAll others are in the tables of"):
        trace_forks(untraced, progress=False)
    assert tabled(untraced) == {(1, 2)}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_pair_that_is_not_finite_is_named_and_the_rest_is_kept(untraced, workers):
    path = untraced / "fork-0000" / "child-1" / "epoch-0001.safetensors"
    state = TrainingState.load(path)
    state.model["linear.bias"][0] = float("nan")
    state.save(path)
    with pytest.raises(NonFiniteError, match=r"^fork 0, epoch 1: Entry 'linear\.bias' .*not a number.*\nAll others"):
        trace_forks(untraced, workers=workers, progress=False)
    assert tabled(untraced) == {(0, 2), (1, 2)}


def test_another_configuration_is_refused_with_the_difference(settings, copy):
    changed = ForkConfig(**{**settings, "trace": {**settings["trace"], "alphas": 7}})
    # Training does not depend on it, so nothing is trained again.
    run_forks(changed, copy, progress=False)
    with pytest.raises(ConfigurationError, match=r"another configuration:\nalphas: 5 there, 7 now\nMove .*traces away"):
        trace_forks(copy, progress=False)


def drop_anchors(path, *keys):
    """Make a file say what is traced as earlier versions did, which knew the two ends alone."""
    values = json.loads(path.read_text())
    trace = values
    for key in keys:
        trace = trace[key]
    del trace["anchors"]
    path.write_text(json.dumps(values))


def test_traces_of_earlier_versions_go_on_from_the_two_ends_alone(untraced, settings, traced):
    drop_anchors(untraced / "config.json", "config", "trace")
    found = trace_forks(untraced, progress=False)
    assert "anchored" not in set(found.predictions["expansion"])
    assert found.layers[["predicted_anchored", "expansion_error"]].isna().all(axis=None)
    assert found.cumulative["predicted_anchored"].isna().all()
    of_both = traced[1].layers["predicted"].to_numpy()
    assert found.layers["predicted"].to_numpy() == pytest.approx(of_both, rel=1e-4, abs=1e-7)
    drop_anchors(untraced / "traces" / "config.json")
    (untraced / "traces" / "fork-0001" / "epoch-0002" / "predicted.safetensors").unlink()
    trace_forks(untraced, progress=False)
    # More anchors are another configuration.
    run_forks(ForkConfig(**settings), untraced, progress=False)
    with pytest.raises(
        ConfigurationError, match=r"another configuration:\nanchors: 2 there, 3 now\nMove .*traces away"
    ):
        trace_forks(untraced, progress=False)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"version": "9", "new": 1},
            NewerVersionError,
            r"traces.config\.json has format version '9', of a newer release",
        ),
        (
            {"new": 1},
            ConfigurationError,
            r"config\.json has keys .*not know \(use the release that .* away\):\nnew: unknown key",
        ),
    ],
)
def test_what_another_release_traced_is_not_called_damaged(copy, change, error, message):
    path = copy / "traces" / "config.json"
    edit(path, **change)
    with pytest.raises(error, match=message):
        trace_forks(copy, progress=False)
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged .* Remove .*traces"):
        trace_forks(copy, progress=False)


def test_a_record_without_a_version_is_of_the_first(copy):
    path = copy / "traces" / "config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "version"}))
    trace_forks(copy, progress=False)


def test_data_that_have_moved_are_read_where_they_are(copy):
    edit_config(copy, data="gone")
    expected = contents(copy)
    (copy / "traces" / "fork-0001" / "epoch-0002" / "test.safetensors").unlink()
    with pytest.raises(DataError, match="'gone' is neither"):
        trace_forks(copy, progress=False)
    trace_forks(copy, data="digits", progress=False)
    assert contents(copy) == expected


@pytest.mark.parametrize("split", ["train", "test"])
def test_other_data_than_those_trained_on_are_refused(untraced, tmp_path, split):
    generator = np.random.default_rng(0)
    for folder in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / "images" / folder).mkdir(parents=True)
        pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / folder / "0.png")
    # The record of the other split is not there, so this one decides.
    record = json.loads((untraced / "provenance.json").read_text())["data"]
    edit(untraced / "provenance.json", data={split: record[split]})
    edit_config(untraced, limit=None, trace={**open_directory(untraced).config.trace.model_dump(), "examples": None})
    with pytest.raises(DataError, match=rf"images' has other images or labels in its {split} split"):
        trace_forks(untraced, data=str(tmp_path / "images"), progress=False)


def test_more_examples_than_there_are_is_refused(untraced):
    edit_config(untraced, trace={**open_directory(untraced).config.trace.model_dump(), "examples": 101})
    with pytest.raises(DataError, match=r"trace\.examples: 101 were asked for; the train split has 100"):
        trace_forks(untraced, progress=False)


def test_the_progress_bar_counts_pairs(untraced, capsys):
    trace_forks(untraced, progress=True)
    assert "3/3 [" in capsys.readouterr().err
