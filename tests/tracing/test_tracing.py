import json
import shutil

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock

from lmc_curvature import measure_barrier, predict_barrier
from lmc_curvature.errors import CheckpointError, ConfigurationError, DataError, NewerVersionError, NonFiniteError
from lmc_curvature.forking import (
    ForkConfig,
    TrainingState,
    load_child,
    load_data,
    load_parent,
    open_directory,
    read_traces,
    run_forks,
    trace_forks,
)
from lmc_curvature.forking.directory import create_directory
from lmc_curvature.geometry import sibling_cosine, solution_plane_cosine
from lmc_curvature.tracing import tracing
from lmc_curvature.tracing.traces import cumulative_sets

SETTINGS = {
    "training": {"epochs": 3, "learning_rate": 0.1, "batch_size": 50},
    "fork_epochs": [0, 1],
    "snapshot_epochs": [2],
    "limit": 200,
    "model_options": {"width": 2},
    "threads": 1,
    "trace": {"examples": 150, "batch_size": 100, "alphas": 5, "layer_alphas": 3, "cumulative": "last"},
}
CONFIG = ForkConfig(**SETTINGS)


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    path = tmp_path_factory.mktemp("traced")
    run_forks(CONFIG, path, progress=False)
    return path, trace_forks(path, progress=False)


@pytest.fixture
def copy(traced, tmp_path):
    shutil.copytree(traced[0], tmp_path / "copy")
    return tmp_path / "copy"


def contents(path):
    files = (file for file in (path / "traces").rglob("*") if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def siblings(path, fork, epoch):
    return [load_child(path, fork, child, epoch) for child in (0, 1)]


def pick(table, **values):
    for column, value in values.items():
        table = table[table[column] == value]
    return table


def test_every_fork_and_epoch_is_in_every_table(traced):
    expected = {(fork, epoch) for fork in (0, 1) for epoch in (2, 3)}
    for name in ("curves", "barriers", "predictions", "layers", "geometry"):
        table = getattr(traced[1], name)
        assert set(zip(table["fork"], table["epoch"], strict=True)) == expected, name
    assert set(traced[1].cumulative["epoch"]) == {3}
    assert set(traced[1].curves["split"]) == {"train", "test"}


@pytest.mark.parametrize("split", ["train", "test"])
def test_barriers_are_those_of_measure_barrier(traced, split):
    path, traces = traced
    data = load_data("digits", split, 200 if split == "train" else None).subset(150)
    measured = measure_barrier(*siblings(path, 1, 2), data.batches(100), alphas=5, progress=False)
    for metric in ("loss", "error"):
        row = pick(traces.barriers, fork=1, epoch=2, split=split, metric=metric).iloc[0]
        assert row["barrier"] == pytest.approx(measured.barrier(metric), abs=1e-6)
        assert row["standard_error"] == pytest.approx(measured.standard_error(metric), abs=1e-6)
        assert (row["end_a"], row["end_b"]) == pytest.approx(measured.ends(metric), abs=1e-6)
        curve = pick(traces.curves, fork=1, epoch=2, split=split, metric=metric)
        assert curve["value"].to_numpy() == pytest.approx(measured.values(metric), abs=1e-6)
        assert curve["barrier"].to_numpy() == pytest.approx(measured.curve(metric), abs=1e-6)


def test_predictions_and_layers_are_those_of_the_library(traced):
    path, traces = traced
    loader = load_data("digits", "train", 200).subset(150).batches(100)
    prediction = predict_barrier(*siblings(path, 0, 3), loader, progress=False)
    for expansion in ("second-order", "with-slopes", "shared-hessian", "hermite"):
        row = pick(traces.predictions, fork=0, epoch=3, expansion=expansion).iloc[0]
        assert row["barrier"] == pytest.approx(prediction.barrier(None, expansion), rel=1e-4)
    layers = pick(traces.layers, fork=0, epoch=3)
    assert tuple(layers["layer"]) == prediction.layers
    assert layers["predicted"].to_numpy() == pytest.approx(prediction.layer_barriers(), rel=1e-4, abs=1e-7)
    assert layers["hessian_energy"].to_numpy() == pytest.approx(prediction.hessian_energy, rel=1e-3, abs=1e-7)
    assert layers["distance"].to_numpy() == pytest.approx(prediction.distances, rel=1e-6)
    measured = measure_barrier(*siblings(path, 0, 3), loader, sets="each", alphas=3, progress=False)
    assert layers["measured"].to_numpy() == pytest.approx(measured.layer_barriers(), abs=1e-6)
    assert layers["measured_lowest"].to_numpy() == pytest.approx(measured.layer_curves().min(axis=1), abs=1e-6)


def test_cumulative_barriers_are_of_the_first_and_last_layers(traced):
    path, traces = traced
    loader = load_data("digits", "train", 200).subset(150).batches(100)
    prediction = predict_barrier(*siblings(path, 0, 3), loader, progress=False)
    names = prediction.layers
    sets = [names[:4], names[-4:]]
    measured = measure_barrier(*siblings(path, 0, 3), loader, sets=sets, alphas=3, progress=False).layer_barriers()
    for side, members, expected in zip(("first", "last"), sets, measured, strict=True):
        row = pick(traces.cumulative, fork=0, side=side, count=4).iloc[0]
        assert row["measured"] == pytest.approx(expected, abs=1e-6)
        assert row["predicted"] == pytest.approx(prediction.barrier(members), rel=1e-4, abs=1e-7)
        # Equation 21: the sum of the interactions of the set.
        inside = np.isin(names, members)
        total = max(prediction.interactions[np.ix_(inside, inside)].sum(), 0.0)
        assert row["predicted_shared"] == pytest.approx(total, rel=1e-4, abs=1e-7)
    whole = pick(traces.cumulative, fork=0, count=len(names))
    assert whole["measured"].nunique() == 1
    assert list(cumulative_sets("abc"))[2:4] == [("first", 2, ("a", "b")), ("last", 2, ("b", "c"))]


def test_geometry_is_that_of_parameters(traced):
    path, traces = traced
    (a, b), (final_a, final_b) = (
        [dict(model.named_parameters()) for model in siblings(path, 1, epoch)] for epoch in (2, 3)
    )
    row = pick(traces.geometry, fork=1, epoch=2).iloc[0]
    assert row["cosine_fork"] == pytest.approx(sibling_cosine(a, b, dict(load_parent(path, 1).named_parameters())))
    assert row["cosine_origin"] == pytest.approx(sibling_cosine(a, b))
    assert row["cosine_final"] == pytest.approx(solution_plane_cosine(a, b, final_a, final_b))
    assert pick(traces.geometry, epoch=3)["cosine_final"].to_numpy() == pytest.approx(1.0)


def test_tables_are_read_back(traced):
    path, traces = traced
    read = read_traces(path)
    for name in vars(traces):
        pd.testing.assert_frame_equal(getattr(read, name), getattr(traces, name))


@pytest.mark.parametrize(
    "lost",
    [
        ["curves.csv"],
        ["fork-0000/epoch-0002/sets.safetensors"],
        ["fork-0001/epoch-0003/predicted.safetensors", "fork-0001/epoch-0003/geometry.safetensors"],
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
    path = copy / "traces" / "fork-0000" / "epoch-0003" / "train.safetensors"
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(bytes(changed))
    with pytest.warns(UserWarning, match=r"train\.safetensors is damaged.* It is computed again"):
        trace_forks(copy, progress=False)
    assert contents(copy) == expected
    (copy / "traces" / "layers.csv").write_text("fork,epoch\n")
    with pytest.raises(CheckpointError, match=r"layers\.csv has columns .*lmc-curvature trace .* makes it"):
        read_traces(copy)


def test_files_that_another_process_is_at_are_left_alone(copy, monkeypatch):
    expected = contents(copy)
    pair = copy / "traces" / "fork-0000" / "epoch-0003"
    (pair / "sets.safetensors").unlink()
    half_written = pair / "train.safetensors"
    half_written.write_bytes(b"half")
    lock = FileLock(open_directory(copy).lock_path("trace fork 0, epoch 3"))
    lock.acquire()
    real = tracing.share

    def share(tasks, **options):
        assert half_written.read_bytes() == b"half"
        # The other one goes on, and ends before it comes to the last file.
        half_written.write_bytes(expected["traces/fork-0000/epoch-0003/train.safetensors"])
        lock.release()
        real(tasks, **options)

    monkeypatch.setattr(tracing, "share", share)
    trace_forks(copy, progress=False)
    assert contents(copy) == expected


def tabled(path):
    """The forks and epochs that the tables hold."""
    geometry = read_traces(path).geometry
    return set(zip(geometry["fork"], geometry["epoch"], strict=True))


@pytest.mark.parametrize(
    ("lost", "cut_short", "left"),
    [
        ("fork-0001/child-1/epoch-0002", False, {(0, 2), (0, 3), (1, 3)}),
        ("fork-0000/child-0/epoch-0003", True, {(1, 2), (1, 3)}),
        ("parent/epoch-0001", False, {(0, 2), (0, 3)}),
    ],
)
def test_what_can_be_traced_is_traced_without_missing_snapshots(copy, lost, cut_short, left):
    expected = contents(copy)
    shutil.rmtree(copy / "traces")
    path = copy / f"{lost}.safetensors"
    written = path.read_bytes()
    path.unlink()
    if cut_short:
        path.write_bytes(written[:-1])
    with pytest.raises(CheckpointError, match=rf"{path.name} .*run_forks\(.*lmc-curvature fork.*makes"):
        trace_forks(copy, progress=False)
    assert tabled(copy) == left
    path.write_bytes(written)
    trace_forks(copy, progress=False)
    assert contents(copy) == expected


def test_networks_that_come_while_others_are_traced_are_told_of(copy, monkeypatch):
    shutil.rmtree(copy / "traces")
    needed = tracing._Pair.missing
    looked = []

    def not_there_yet(pair):
        # Whoever looks first does not see the later fork.
        looked.append(pair.title)
        return [copy] if pair.fork_epoch == 1 and looked.count(pair.title) == 1 else needed(pair)

    monkeypatch.setattr(tracing._Pair, "missing", not_there_yet)
    with pytest.raises(CheckpointError, match=r"^fork 1, epoch 2 and 1 more not traced: their .*goes on\.\nAll others"):
        trace_forks(copy, progress=False)
    assert set(read_traces(copy).barriers["fork"]) == {0}
    assert set(trace_forks(copy, progress=False).barriers["fork"]) == {0, 1}


def test_an_error_is_not_hidden_by_one_of_the_tables(copy, monkeypatch):
    shutil.rmtree(copy / "traces")

    def failing(*args):
        raise OSError("disk full")

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(tracing, "write_tables", failing)
    monkeypatch.setattr(tracing._Tracer, "trace_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trace_forks(copy, progress=False)


def test_nothing_to_trace_leaves_no_tables(tmp_path):
    create_directory(tmp_path, CONFIG)
    with pytest.raises(CheckpointError, match=r"and 9 more missing: run_forks\(.*makes them\.$"):
        trace_forks(tmp_path, progress=False)
    assert not list((tmp_path / "traces").glob("*.csv"))


def test_a_diverged_child_leaves_its_fork_out(copy):
    shutil.rmtree(copy / "traces")
    manifest = copy / "fork-0000" / "child-0" / "manifest.json"
    written = json.loads(manifest.read_text())
    del written["sha256"]["epoch-0003.safetensors"]
    manifest.write_text(json.dumps({**written, "status": "diverged", "message": "Training diverged."}))
    (copy / "fork-0000" / "child-0" / "epoch-0003.safetensors").unlink()
    with pytest.raises(NonFiniteError, match=r"^fork 0, child 0: Training diverged\.\nAll others are in the tables of"):
        trace_forks(copy, progress=False)
    assert tabled(copy) == {(1, 2), (1, 3)}


def test_a_pair_that_is_not_finite_is_named_and_the_rest_is_kept(copy):
    shutil.rmtree(copy / "traces")
    path = copy / "fork-0000" / "child-1" / "epoch-0002.safetensors"
    state = TrainingState.load(path)
    state.model["linear.bias"][0] = float("nan")
    state.save(path)
    for workers in (1, 2):
        with pytest.raises(
            NonFiniteError, match=r"^fork 0, epoch 2: Entry 'linear\.bias' .*not a number.*\nAll others"
        ):
            trace_forks(copy, workers=workers, progress=False)
        assert tabled(copy) == {(0, 3), (1, 2), (1, 3)}


def test_an_interrupted_trace_has_tables_of_what_was_done(copy, monkeypatch):
    shutil.rmtree(copy / "traces")
    real = tracing.SiblingGeometry.of

    def interrupted(*args):
        if (copy / "traces" / "fork-0000" / "epoch-0003" / "predicted.safetensors").is_file():
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(tracing.SiblingGeometry, "of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trace_forks(copy, progress=False)
    assert tabled(copy) == {(0, 2)}


def test_another_configuration_is_refused_with_the_difference(copy):
    changed = ForkConfig(**{**SETTINGS, "trace": {**SETTINGS["trace"], "alphas": 7}})
    # Training does not depend on it, so nothing is trained again.
    run_forks(changed, copy, progress=False)
    with pytest.raises(ConfigurationError, match=r"another configuration:\nalphas: 5 there, 7 now\nMove .*traces away"):
        trace_forks(copy, progress=False)


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
            r"config\.json has keys .*not know:\nnew: unknown key.*\nUse the release that",
        ),
        ({"version": "1"}, None, None),
    ],
)
def test_what_another_release_traced_is_not_called_damaged(copy, change, error, message):
    path = copy / "traces" / "config.json"
    contents = json.loads(path.read_text())
    # The first release that traced gave no version.
    del contents["version"]
    path.write_text(json.dumps({**contents, **change}))
    if error is None:
        trace_forks(copy, progress=False)
    else:
        with pytest.raises(error, match=message):
            trace_forks(copy, progress=False)
    path.write_text("{")
    with pytest.raises(ConfigurationError, match=r"config\.json is damaged .* Remove .*traces"):
        trace_forks(copy, progress=False)


def test_data_that_have_moved_are_read_where_they_are(copy):
    expected = contents(copy)
    config = json.loads((copy / "config.json").read_text())
    config["config"]["data"] = "gone"
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "traces" / "fork-0001" / "epoch-0003" / "test.safetensors").unlink()
    with pytest.raises(DataError, match="'gone' is neither"):
        trace_forks(copy, progress=False)
    trace_forks(copy, data="digits", progress=False)
    assert contents(copy) == expected


def test_more_examples_than_there_are_is_refused(copy):
    shutil.rmtree(copy / "traces")
    config = json.loads((copy / "config.json").read_text())
    config["config"]["trace"]["examples"] = 201
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"trace\.examples: 201 were asked for; the train split has 200"):
        trace_forks(copy, progress=False)


def test_tables_that_are_not_there_are_explained(tmp_path):
    run_forks(ForkConfig(**SETTINGS), tmp_path, progress=False)
    with pytest.raises(CheckpointError, match=r"curves\.csv is missing; trace_forks\(.*lmc-curvature trace"):
        read_traces(tmp_path)
