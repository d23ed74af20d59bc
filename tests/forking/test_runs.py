import csv
import hashlib
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lmc_curvature.checkpoints import write_snapshot
from lmc_curvature.errors import CheckpointError, NewerVersionError
from lmc_curvature.forking import TrainingState, load_child, load_fork_data, run_forks
from tests.support.experiments import contents


def test_the_manifest_names_every_snapshot_with_its_digest(finished):
    manifest = finished.child(0, 1).manifest()
    assert (manifest["status"], manifest["order_seed"], manifest["first_epoch"]) == ("finished", 2, 0)
    snapshots = [f"epoch-{epoch:04d}.safetensors" for epoch in (1, 2, 3)]
    assert list(manifest["sha256"]) == [*snapshots, "metrics.csv"]
    for name, digest in manifest["sha256"].items():
        contents = (finished.child(0, 1).path / name).read_bytes()
        assert hashlib.sha256(contents).hexdigest() == digest
    assert manifest["made_with"]["torch"] == torch.__version__


def test_a_damaged_snapshot_is_named_and_computed_again(finished, config, copy):
    path = copy / "fork-0000" / "child-1" / "epoch-0003.safetensors"
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(bytes(changed))
    with pytest.raises(CheckpointError, match=r"epoch-0003\.safetensors is damaged.*run_forks\(config, .*, makes it"):
        load_child(copy, 0, 1)
    with pytest.warns(UserWarning, match=r"child-1/epoch-0003\.safetensors is damaged.* It is computed again"):
        run_forks(config, copy, progress=False)
    assert contents(copy) == contents(finished.path)


def test_a_snapshot_of_another_run_is_named_and_computed_again(finished, config, copy):
    child = copy / "fork-0002" / "child-1" / "epoch-0003.safetensors"
    shutil.copy(copy / "fork-0002" / "child-0" / "epoch-0003.safetensors", child)
    with pytest.warns(UserWarning, match=r"child-1.epoch-0003\.safetensors is not the file that .*manifest\.json"):
        run_forks(config, copy, progress=False)
    assert contents(copy) == contents(finished.path)


def test_metrics_have_a_row_for_each_epoch_of_the_run(finished):
    def epochs(path):
        with path.open(encoding="utf-8", newline="") as file:
            return [int(row["epoch"]) for row in csv.DictReader(file)]

    assert epochs(finished.parent.path / "metrics.csv") == [1, 2, 3]
    assert epochs(finished.child(0, 1).path / "metrics.csv") == [1, 2, 3]
    assert epochs(finished.child(2, 0).path / "metrics.csv") == [3]


def test_damaged_metrics_are_named_and_written_again(finished, config, copy):
    path = copy / "parent" / "metrics.csv"
    path.write_bytes(path.read_bytes().replace(b"0.1", b"0.2", 1))
    with pytest.warns(UserWarning, match=r"parent.metrics\.csv is not the file that .*manifest\.json"):
        run_forks(config, copy, progress=False)
    assert contents(copy) == contents(finished.path)


@pytest.mark.parametrize(
    "text",
    [
        '{"status": "diverged"}',
        '{"status": "finished", "message": "", "made_with": {}, "sha256": ["a"]}',
        '{"status": "done", "message": "", "made_with": {}, "sha256": {}}',
        '{"status": ["finished"], "message": 3}',
        "[" * 100_000,
    ],
)
def test_a_manifest_that_is_none_is_made_anew(finished, config, copy, text):
    (copy / "parent" / "manifest.json").write_text(text)
    run_forks(config, copy, progress=False)
    assert contents(copy) == contents(finished.path)


@pytest.mark.parametrize("metadata", [{}, {"epoch": 3}, {"epoch": "x", "history": []}, {"epoch": 3, "history": [[1]]}])
def test_a_snapshot_that_does_not_tell_its_epoch_is_named(tmp_path, metadata):
    write_snapshot(tmp_path / "s.safetensors", {}, {}, metadata)
    with pytest.raises(CheckpointError, match=r"s\.safetensors does not tell how far the training has come"):
        TrainingState.load(tmp_path / "s.safetensors")


@pytest.mark.parametrize("text", ['{"data": 3}', '{"made_with": "torch"}', "[]"])
def test_a_record_that_is_none_is_explained(copy, text):
    (copy / "provenance.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"provenance\.json is damaged.* Delete it if the data are still those"):
        load_fork_data(copy)


def test_a_snapshot_from_a_newer_release_is_left_alone(config, copy):
    path = copy / "fork-0000" / "child-1" / "epoch-0003.safetensors"
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["lmc_curvature"])
    save_file(load_file(path), path, {"lmc_curvature": json.dumps({**header, "version": "99"})})
    written = path.read_bytes()
    with pytest.raises(NewerVersionError, match=r"Upgrade lmc_curvature\.$"):
        load_child(copy, 0, 1)
    with pytest.raises(NewerVersionError, match=r"epoch-0003\.safetensors has format version '99'.*Upgrade"):
        run_forks(config, copy, progress=False)
    assert path.read_bytes() == written
