"""Claim: a file that was made to do harm takes neither memory nor time, leaves its folder alone, and is named."""

import json
import pickle
import re
import resource
import struct
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lmc_curvature.checkpoints import load_checkpoint
from lmc_curvature.checkpoints.files import shards_of
from lmc_curvature.checkpoints.streaming import MappedCheckpoint
from lmc_curvature.errors import CheckpointError
from lmc_curvature.merging.files import merge_checkpoints, plan_merge

GIB = 1 << 30


def memory():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.fixture
def saved(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "a.pt")
    return tmp_path / "a.pt"


def with_zeros(path, member, megabytes, *, new_name=None):
    """Put many compressed zeros behind a member of an archive."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in members if name.endswith(member))
    with zipfile.ZipFile(path, "w") as archive:
        for each, data in members.items():
            if each != name:
                archive.writestr(each, data)
        archive.compression = zipfile.ZIP_DEFLATED
        with archive.open(new_name or name, "w") as stream:
            stream.write(members[name])
            for _ in range(megabytes):
                stream.write(bytes(1 << 20))


@pytest.mark.check(after=1)
@pytest.mark.parametrize("member", ["data.pkl", "data/0", "version"])
def test_an_archive_that_unpacks_to_more_than_it_is(saved, member):
    with_zeros(saved, member, 100)
    before = memory()
    for read in (lambda: load_checkpoint(nn.Linear(2, 2), saved), lambda: MappedCheckpoint(saved)):
        with pytest.raises(CheckpointError, match=r"a\.pt is refused: it unpacks to far more than its size"):
            read()
    assert memory() - before < 50 << 20


def test_an_archive_that_says_that_it_unpacks_to_little(saved):
    with_zeros(saved, "data.pkl", 100)
    contents = bytearray(saved.read_bytes())
    # In the directory at the end: 24 bytes behind the beginning of the last entry, and four bytes long.
    entry = contents.rindex(b"PK\x01\x02")
    contents[entry + 24 : entry + 28] = struct.pack("<I", 100)
    saved.write_bytes(contents)
    before = memory()
    for read in (lambda: load_checkpoint(nn.Linear(2, 2), saved), lambda: MappedCheckpoint(saved)):
        with pytest.raises(CheckpointError, match=r"a\.pt"):
            read()
    assert memory() - before < 50 << 20


def test_an_archive_whose_end_is_of_another_kind(saved):
    contents = saved.read_bytes()
    # The locator of a larger directory, which says that there are several disks, stands before the end.
    place = contents.rindex(b"PK\x05\x06")
    saved.write_bytes(contents[:place] + b"PK\x06\x07" + b"\xff" * 16 + contents[place:])
    for read in (lambda: load_checkpoint(nn.Linear(2, 2), saved), lambda: MappedCheckpoint(saved)):
        with pytest.raises(CheckpointError, match=r"a\.pt is damaged"):
            read()


class Code:
    def __reduce__(self):
        return print, ("the checkpoint ran code",)


def test_code_in_an_archive_that_unpacks_to_much_does_not_run(saved, capfd):
    torch.save({"a": Code()}, saved)
    with_zeros(saved, "data.pkl", 100)
    with pytest.raises(CheckpointError, match=r"a\.pt is refused"):
        load_checkpoint(nn.Linear(2, 2), saved)
    assert "ran code" not in capfd.readouterr().out


def header(text, length=None, order="little"):
    """The beginning of a safetensors file."""
    return (len(text) if length is None else length).to_bytes(8, order) + text.encode()


def entry(shape, end, dtype="F32"):
    return json.dumps({"weight": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}})


@pytest.mark.parametrize(
    "contents",
    [
        header("{}", 2**64 - 1),
        header("{}", 10**12),
        header("{}", 99_999_999),
        header("{}", order="big"),
        header(entry([2**40], 2**42)),
        header(entry([2**62, 2**62], 16)),
        header(entry([2**62, 2**62, 0], 0)),
        header(entry([-1], 4)) + bytes(4),
        header(entry([4], 4)) + bytes(4),
        header(entry([1], 4, "F99")) + bytes(4),
        header('{"__metadata__": {"lmc_curvature": "' + "[" * 50_000 + '"}}'),
        header('{"a": ' * 50_000),
        header('{"__metadata__": {"lmc_curvature": "[1, 2"}}'),
        header('{"__metadata__": {"lmc_curvature": "7"}}'),
    ],
)
def test_headers_that_promise_what_is_not_there(tmp_path, contents):
    path = tmp_path / "a.safetensors"
    path.write_bytes(contents)
    before = memory()
    for read in (lambda: load_checkpoint(nn.Linear(2, 2), path), lambda: MappedCheckpoint(path)):
        with pytest.raises(CheckpointError, match=r"a\.safetensors"):
            read()
    assert memory() - before < 200 << 20


def test_wrong_endian_archives_are_read_as_they_were_meant(tmp_path):
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    torch.save(source.state_dict(), tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        for name, data in members.items():
            # As a machine with the other order of bytes writes.
            if name.endswith("byteorder"):
                data = b"big"
            elif "/data/" in name:
                data = b"".join(data[place : place + 4][::-1] for place in range(0, len(data), 4))
            archive.writestr(name, data)
    load_checkpoint(target, tmp_path / "b.pt")
    assert torch.equal(target.weight, source.weight)


@pytest.mark.parametrize(
    "shard",
    [
        "../a.safetensors",
        "/etc/passwd",
        "sub/a.safetensors",
        "a\0.safetensors",
        "..",
        ".",
        "",
        "model.safetensors.index.json",
    ],
)
def test_an_index_reaches_no_further_than_its_folder(tmp_path, shard):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(nn.Linear(2, 2).state_dict(), tmp_path / "a.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"weight": shard, "bias": shard}}))
    for read in (lambda: load_checkpoint(nn.Linear(2, 2), folder), lambda: shards_of(index)):
        with pytest.raises(CheckpointError, match=r"index\.json names '.*' as a part .* names of files beside it"):
            read()


def test_an_index_that_is_nested_without_end(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": ' + "[" * 100_000)
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        load_checkpoint(nn.Linear(2, 2), tmp_path)


def test_mappings_that_hold_themselves(tmp_path):
    contents = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    contents["again"] = contents
    deep = contents
    for _ in range(30):
        deep = {"a": deep, "b": deep}
    for name, value in {"loop.pt": contents, "deep.pt": deep}.items():
        torch.save(value, tmp_path / name)
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(nn.Linear(2, 2), tmp_path / name)
        with pytest.raises(CheckpointError, match=name):
            MappedCheckpoint(tmp_path / name)
    assert MappedCheckpoint(tmp_path / "loop.pt", key="").forms["bias"].shape == (2,)


def test_entries_that_stand_for_more_than_the_file_holds(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"weight": torch.ones(1).expand(1 << 20, 1 << 20)}, path)
    with pytest.raises(CheckpointError, match=r"'weight' of shape \(1048576, 1048576\), which stands for more numbers"):
        MappedCheckpoint(path)
    counts = nn.Module()
    counts.register_buffer("weight", torch.ones(2, dtype=torch.int32))
    torch.save({"weight": torch.ones(1, dtype=torch.int64).expand(1 << 40)}, path)
    with pytest.raises(CheckpointError, match=r"1 of another shape \(weight \(1099511627776,\) instead of \(2,\)\)"):
        load_checkpoint(counts, path)


def test_pickles_that_ask_for_memory(tmp_path):
    # What torch lets pickles call, with sizes that are not there.
    calls = {
        "bytes": b"\x80\x02cbuiltins\nbytearray\n(J\xff\xff\xff\x7ftR.",
        "more bytes": b"\x80\x02cbuiltins\nbytearray\n(\x8a\x06\x00\x00\x00\x00\x00\x10tR.",
        "long": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 50) + b"a.",
        "text": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 50) + b"a.",
    }
    before = memory()
    for name, contents in calls.items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(contents)
        with pytest.raises(CheckpointError, match=re.escape(path.name)):
            load_checkpoint(nn.Linear(2, 2), path)
    assert memory() - before < GIB


NAMES = [
    "../../outside",
    "/tmp/outside",
    "a\0b",
    "<script>alert(1)</script>",
    "a/b.weight",
    "..",
    "x" * 5000,
    "\u202e\u2028",
]


def test_names_of_entries_are_no_paths(tmp_path):
    folder, entries = tmp_path / "in", {name: torch.arange(3.0) for name in NAMES}
    folder.mkdir()
    for name in ("a.pt", "b.pt"):
        torch.save(entries, folder / name)
    before = sorted(tmp_path.rglob("*"))
    plan = plan_merge(folder / "a.pt", folder / "b.pt")
    merge_checkpoints(plan, folder / "out" / "merged.safetensors", mergekit=folder / "out" / "merged.yaml")
    assert load_file(folder / "out" / "merged.safetensors").keys() == entries.keys()
    added = {str(path.relative_to(folder)) for path in tmp_path.rglob("*") if path not in before}
    assert added == {"out", "out/merged.safetensors", "out/merged.yaml"}


@pytest.mark.parametrize("name", ["__metadata__", "half of a character: \ud800"])
def test_names_that_no_file_can_have(tmp_path, name):
    for each in ("a.pt", "b.pt"):
        torch.save({name: torch.ones(2), "weight": torch.ones(2)}, tmp_path / each)
    plan = plan_merge(tmp_path / "a.pt", tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="which no entry of a safetensors file can be"):
        merge_checkpoints(plan, tmp_path / "merged.safetensors")
    assert not (tmp_path / "merged.safetensors").exists()


def test_damage_of_any_kind_to_a_pickle_is_an_error_of_ours(tmp_path):
    # One for every way in which unpickling stumbles.
    pickles = [b"\x80\x02" + bytes([code]) + b"0\n1\nxyz." for code in range(256)]
    for number, contents in enumerate([*pickles, pickle.dumps(torch.Size((1,)))]):
        path = tmp_path / f"{number}.pt"
        path.write_bytes(contents)
        with pytest.raises(CheckpointError, match=rf"{number}\.pt"):
            load_checkpoint(nn.Linear(2, 2), path)
