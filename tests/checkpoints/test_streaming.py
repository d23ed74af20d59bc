"""Claim: entries are read one at a time as they stand in the file, and what is written is a safetensors file."""

import json

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lmc_curvature.checkpoints import write_snapshot
from lmc_curvature.checkpoints.streaming import EntryForm, MappedCheckpoint, digests_of, metadata_of, write_stream
from lmc_curvature.errors import CheckpointError

ENTRIES = {
    "truth": torch.tensor([True, False, True]),
    "scalar": torch.tensor(3),
    "empty": torch.zeros(0, 2),
    "brain_float": torch.randn(5).bfloat16(),
    "double": torch.randn(3, 2, dtype=torch.float64),
    "nested.weight": torch.arange(6.0).view(2, 3),
    "half": torch.randn(4).half(),
}


def _equal(found, expected):
    assert found.keys() == expected.keys()
    for name, entry in expected.items():
        assert (found[name].dtype, found[name].shape) == (entry.dtype, entry.shape), name
        assert torch.equal(found[name], entry), name


def _forms(entries):
    return {name: EntryForm(entry.dtype, tuple(entry.shape)) for name, entry in entries.items()}


def test_what_is_written_is_read_by_safetensors(tmp_path):
    path = tmp_path / "sub" / "x.safetensors"
    # In parts of two, and from a view that is not contiguous.
    entries = ENTRIES | {"turned": torch.randn(3, 4).t()}
    write_stream(path, _forms(entries), lambda name: entries[name].reshape(-1).split(2), {"origin": "é"})
    _equal(load_file(path), entries)
    assert metadata_of(path) == {"format": "pt", "origin": "é"}
    # Data begin at multiples of eight, entries at multiples of their size.
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])
    assert length % 8 == 0
    for name, entry in entries.items():
        assert header[name]["data_offsets"][0] % entry.dtype.itemsize == 0


def test_nothing_is_left_of_a_file_that_could_not_be_written(tmp_path):
    def parts(name):
        raise RuntimeError("no numbers")

    with pytest.raises(RuntimeError, match="no numbers"):
        write_stream(tmp_path / "x", _forms(ENTRIES), parts, {})
    with pytest.raises(CheckpointError, match=r"'z' is of type torch\.complex128"):
        write_stream(tmp_path / "x", {"z": EntryForm(torch.complex128, (1,))}, parts, {})
    assert not list(tmp_path.iterdir())


def _shards(folder, entries):
    places = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(entries)}
    for shard in set(places.values()):
        save_file({name: entries[name] for name in entries if places[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "torch", "legacy", "wrapped", "snapshot", "shards"])
def test_every_entry_of_every_kind_of_file_is_read_again_and_again(kind, tmp_path):
    path = tmp_path / "x"
    if kind == "safetensors":
        save_file(ENTRIES, path)
    elif kind == "snapshot":
        write_snapshot(path, ENTRIES, {"step": torch.ones(2)}, {})
    elif kind == "shards":
        path = _shards(tmp_path, ENTRIES)
    else:
        contents = {"state_dict": {f"module.{n}": t for n, t in ENTRIES.items()}} if kind == "wrapped" else ENTRIES
        torch.save(contents, path, _use_new_zipfile_serialization=kind != "legacy")
    mapped = MappedCheckpoint(path)
    for _ in range(2):
        _equal({name: mapped[name].clone() for name in mapped.forms}, ENTRIES)
    assert all(form.is_meta for form in mapped.forms.values())
    assert mapped.ties == {}
    assert {len(digest) for digest in digests_of(path).values()} == {64}


def test_ties_of_a_torch_file_are_known(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    torch.save(model.state_dict(), tmp_path / "x")
    assert torch.equal(MappedCheckpoint(tmp_path / "x")["0.weight"], MappedCheckpoint(tmp_path / "x")["1.weight"])
    assert MappedCheckpoint(tmp_path / "x").ties == {"1.weight": "0.weight"}


def test_what_cannot_be_streamed_is_named(tmp_path):
    torch.save({"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}}, tmp_path / "two")
    with pytest.raises(CheckpointError, match=r"state dicts under 'a', 'b'.*--model"):
        MappedCheckpoint(tmp_path / "two")
    assert torch.equal(MappedCheckpoint(tmp_path / "two", key="b")["w"], torch.ones(1))
    with pytest.raises(CheckpointError, match=r"no name that begins with 'net\.'"):
        MappedCheckpoint(tmp_path / "two", key="b", strip_prefix="net")
    torch.save({"w": torch.eye(2).to_sparse()}, tmp_path / "sparse")
    with pytest.raises(CheckpointError, match="'w' that is no dense tensor"):
        MappedCheckpoint(tmp_path / "sparse")


def test_a_damaged_archive_has_no_digest(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"w": torch.arange(5000.0)}, path)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="do not match their checksums"):
        digests_of(path)


def test_metadata_are_those_of_the_header(tmp_path):
    save_file(ENTRIES, tmp_path / "x", {"origin": "here"})
    with safetensors.safe_open(tmp_path / "x", "pt") as file:
        assert metadata_of(tmp_path / "x") == file.metadata() == {"origin": "here"}
    torch.save(ENTRIES, tmp_path / "y")
    assert metadata_of(tmp_path / "y") == {}
