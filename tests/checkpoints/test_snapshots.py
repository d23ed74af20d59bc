"""Claim: snapshots come back as they were written, and are told from files of others and from damaged ones."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lmc_curvature.checkpoints import load_checkpoint, read_snapshot, write_snapshot
from lmc_curvature.errors import CheckpointError, NewerVersionError

MODEL = {
    "scalar": torch.tensor(3),
    "empty": torch.zeros(0, 2),
    "brain_float": torch.ones(2, dtype=torch.bfloat16),
    "truth": torch.tensor([True, False]),
    "model.nested": torch.arange(6.0).view(2, 3),
}
OPTIMIZER = {"nested": torch.ones(2, 3)}
METADATA = {"epoch": 3, "history": [[1, 0.5]]}


@pytest.fixture
def path(tmp_path):
    write_snapshot(tmp_path / "own.safetensors", MODEL, OPTIMIZER, METADATA)
    return tmp_path / "own.safetensors"


def test_entries_of_every_kind_come_back(path):
    *found, metadata = read_snapshot(path)
    assert metadata == METADATA
    for entries, expected in zip(found, (MODEL, OPTIMIZER), strict=True):
        assert entries.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (entries[name].dtype, entries[name].shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(entries[name], tensor)


def test_the_same_state_gives_the_same_bytes(path, tmp_path):
    write_snapshot(tmp_path / "again", MODEL, OPTIMIZER, METADATA)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("read", [read_snapshot, lambda path: load_checkpoint(nn.Linear(2, 2), path)])
def test_a_flipped_bit_is_noticed(path, read):
    contents = bytearray(path.read_bytes())
    contents[-3] ^= 4
    path.write_bytes(contents)
    with pytest.raises(CheckpointError, match=r"own\.safetensors is damaged: .*checksum"):
        read(path)


def test_files_of_others_are_no_snapshots(tmp_path):
    save_file(MODEL, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="is not a snapshot of a training run; load it with load_checkpoint"):
        read_snapshot(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"Snapshot .*none does not exist"):
        read_snapshot(tmp_path / "none")


def test_a_snapshot_of_another_release_is_refused(tmp_path):
    header = json.dumps({"kind": "training state", "version": "99"})
    save_file({"model.a": torch.zeros(1)}, tmp_path / "b.safetensors", {"lmc_curvature": header})
    with pytest.raises(NewerVersionError, match="format version '99'.*Upgrade"):
        read_snapshot(tmp_path / "b.safetensors")
