"""Claim: a checkpoint of any origin is loaded as it was saved, or refused by name, and never runs code."""

import collections
import os
import re
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lmc_curvature.checkpoints import load_checkpoint, write_snapshot
from lmc_curvature.errors import CheckpointError
from lmc_curvature.sources.resnets import digits_resnet


@pytest.fixture
def source():
    torch.manual_seed(3)
    model = digits_resnet(width=2)
    model.norm.num_batches_tracked += 7
    return model


def assert_loads(path, source):
    target = digits_resnet(width=2)
    assert load_checkpoint(target, path) is target
    expected, got = source.state_dict(), target.state_dict()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


class Wrapped(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


def test_plain_state_dicts(source, tmp_path):
    torch.save(source.state_dict(), tmp_path / "a.pt")
    save_file(source.state_dict(), tmp_path / "a.safetensors")
    # A safetensors file is known by its contents, whatever it is called.
    save_file(source.state_dict(), tmp_path / "a.bin")
    for name in ("a.pt", "a.safetensors", "a.bin"):
        assert_loads(tmp_path / name, source)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict"])
def test_wrapped_state_dicts(source, tmp_path, wrapper):
    torch.save({wrapper: source.state_dict(), "epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "a.pt")
    assert_loads(tmp_path / "a.pt", source)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers(source, tmp_path, prefix):
    entries = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    torch.save(entries, tmp_path / "a.pt")
    save_file(entries, tmp_path / "a.safetensors")
    assert_loads(tmp_path / "a.pt", source)
    assert_loads(tmp_path / "a.safetensors", source)


def test_a_network_may_have_a_submodule_called_module(tmp_path):
    source, target = Wrapped(nn.Linear(2, 3)), Wrapped(nn.Linear(2, 3))
    torch.save(source.state_dict(), tmp_path / "a.pt")
    load_checkpoint(target, tmp_path / "a.pt")
    assert torch.equal(source.module.weight, target.module.weight)


def test_own_snapshots(source, tmp_path):
    write_snapshot(tmp_path / "own.safetensors", source.state_dict(), {"conv.weight": torch.ones(2)}, {})
    assert_loads(tmp_path / "own.safetensors", source)


def test_foreign_safetensors_of_a_network_with_a_submodule_called_model(tmp_path):
    source = nn.Sequential(collections.OrderedDict(model=nn.Linear(2, 3)))
    save_file(source.state_dict(), tmp_path / "a.safetensors")
    target = nn.Sequential(collections.OrderedDict(model=nn.Linear(2, 3)))
    load_checkpoint(target, tmp_path / "a.safetensors")
    assert torch.equal(source.model.weight, target.model.weight)


def test_batch_counters_may_be_missing(source, tmp_path):
    entries = {name: tensor for name, tensor in source.state_dict().items() if "num_batches" not in name}
    save_file(entries, tmp_path / "a.safetensors")
    target = load_checkpoint(digits_resnet(width=2), tmp_path / "a.safetensors")
    assert torch.equal(target.conv.weight, source.conv.weight)
    assert target.norm.num_batches_tracked == 0


@pytest.mark.parametrize("kept", ["0.weight", "1.weight"])
def test_a_tied_parameter_may_be_stored_under_one_of_its_names(tmp_path, kept):
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    save_file({kept: torch.ones(3, 3)}, tmp_path / "a.safetensors")
    load_checkpoint(model, tmp_path / "a.safetensors")
    assert torch.equal(model[0].weight, torch.ones(3, 3))
    assert model[1].weight is model[0].weight


def test_networks_without_numbers(tmp_path):
    source = nn.Linear(3, 2)
    torch.save(source.state_dict(), tmp_path / "a.pt")
    lazy = load_checkpoint(nn.LazyLinear(2), tmp_path / "a.pt")
    assert torch.equal(lazy.weight, source.weight)
    with pytest.raises(CheckpointError, match=r"a\.pt cannot be loaded: entry 'weight' .* meta device.*on the CPU"):
        load_checkpoint(nn.Linear(3, 2, device="meta"), tmp_path / "a.pt")
    # Nothing lies where nothing is, so two empty entries are not one.
    torch.save({"0.weight": torch.zeros(0, 2)}, tmp_path / "b.pt")
    empty = nn.Sequential(nn.Linear(2, 0, bias=False), nn.Linear(2, 0, bias=False))
    with pytest.raises(CheckpointError, match=r"1 missing \(1\.weight\)"):
        load_checkpoint(empty, tmp_path / "b.pt")


def test_a_mismatch_lists_what_differs(source, tmp_path):
    entries = source.state_dict()
    for name in [name for name in entries if name.startswith("stage3.0.conv")]:
        del entries[name]
    entries["head.weight"] = torch.zeros(1)
    entries["conv.weight"] = torch.zeros(2, 3, 3, 3)
    torch.save(entries, tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(digits_resnet(width=2), tmp_path / "a.pt")
    message = str(caught.value)
    assert "2 missing (stage3.0.conv1.weight, stage3.0.conv2.weight)" in message
    assert "1 unexpected (head.weight)" in message
    assert "1 of another shape (conv.weight (2, 3, 3, 3) instead of (2, 1, 3, 3))" in message


def test_a_mismatch_leaves_the_network_as_it_was(tmp_path):
    target = digits_resnet(width=2)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    torch.save(digits_resnet(width=4).state_dict(), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"\d+ of another shape \(.*, …\)"):
        load_checkpoint(target, tmp_path / "a.pt")
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())


class Malicious:
    def __reduce__(self):
        return (print, ("the checkpoint ran code",))


class Blocked:
    def __reduce__(self):
        return (os.system, ("echo the checkpoint ran code",))


@pytest.mark.parametrize("code", [r"lmc_curvature\.sources\.resnets\.CifarResNet", "print", "posix.system"])
def test_files_that_would_run_code_are_refused(source, tmp_path, capfd, code):
    contents = {"print": Malicious(), "posix.system": Blocked()}
    torch.save({"state_dict": contents[code]} if code in contents else source, tmp_path / "a.pt")
    message = rf"a\.pt is refused: .*run code that it names \({code}\)\. .*torch\.save\(model\.state_dict\(\), path\)"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(digits_resnet(width=2), tmp_path / "a.pt")
    assert "ran code" not in capfd.readouterr().out


def damaged_files(tmp_path, source):
    torch.save(source.state_dict(), tmp_path / "good.pt")
    save_file(source.state_dict(), tmp_path / "good.safetensors")
    for name in ("good.pt", "good.safetensors"):
        contents = (tmp_path / name).read_bytes()
        for index, size in enumerate((0, 5, 100, len(contents) // 2, len(contents) - 1)):
            path = tmp_path / f"cut{index}-{name}"
            path.write_bytes(contents[:size])
            yield path
    generator = torch.Generator().manual_seed(0)
    for index in range(40):
        path = tmp_path / f"noise{index}.pt"
        path.write_bytes(bytes(torch.randint(0, 256, (300,), generator=generator).tolist()))
        yield path
    for index, start in enumerate((b"\x80\x02", b"\x80\x04\x95", b"PK\x03\x04")):
        path = tmp_path / f"start{index}.pt"
        path.write_bytes(start + b"}q\x00(X\x01" * 9)
        yield path


def test_damaged_files_are_named(source, tmp_path):
    target = digits_resnet(width=2)
    for path in damaged_files(tmp_path, source):
        with pytest.raises(CheckpointError, match=re.escape(path.name)):
            load_checkpoint(target, path)


def test_files_without_a_state_dict(tmp_path):
    model = digits_resnet(width=2)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"list\.pt holds list; expected a state dict"):
        load_checkpoint(model, tmp_path / "list.pt")
    torch.save({"args": {"width": 2}, "epoch": 3}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"other\.pt holds no state dict.*at the top it has 'args', 'epoch'"):
        load_checkpoint(model, tmp_path / "other.pt")
    torch.save({"net": {"a": torch.zeros(1)}, "epoch": 3}, tmp_path / "strange.pt")
    with pytest.raises(CheckpointError, match=r"strange\.pt \(read with key='net'\) does not fit.*1 unexpected \(a\)"):
        load_checkpoint(model, tmp_path / "strange.pt")
    with pytest.raises(CheckpointError, match=r"none\.pt does not exist"):
        load_checkpoint(model, tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match=r"is a directory, and holds neither model\.safetensors nor"):
        load_checkpoint(model, tmp_path)


class Tied(nn.Module):
    """An embedding, the head of the same weight, and a buffer under two names."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", torch.ones(4, dtype=torch.bool))
        self.register_buffer("same_mask", self.mask)


@pytest.mark.parametrize(("name", "first"), [("head.weight", "embedding.weight"), ("same_mask", "mask")])
def test_one_parameter_has_one_value(tmp_path, name, first):
    entries = {entry: value.clone() for entry, value in Tied().state_dict().items()}
    entries["embedding.weight"][0, 0] = entries["head.weight"][0, 0] = float("nan")
    torch.save(entries, tmp_path / "a.pt")
    target = load_checkpoint(Tied(), tmp_path / "a.pt")
    assert torch.equal(target.head.weight[1:], entries["head.weight"][1:])
    entries[name] = entries[name].clone()
    entries[name][-1] = 0
    for path, save in {"a.pt": torch.save, "a.safetensors": save_file}.items():
        save(entries, tmp_path / path)
        with pytest.raises(
            CheckpointError, match=rf"1 tied to another, with other numbers \({name} is {first} in the network\)"
        ):
            load_checkpoint(Tied(), tmp_path / path)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda w: w.to(torch.int8), "torch.int8"),
        (lambda w: w.to(torch.bool), "torch.bool"),
        (lambda w: w.to(torch.complex64), "torch.complex64"),
        (lambda w: w.to("meta"), "torch.float32 without numbers"),
        (lambda w: w.to_sparse(), "torch.sparse_coo of torch.float32"),
        (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "torch.qint8"),
    ],
)
def test_entries_of_another_kind_of_type_are_refused(tmp_path, change, found):
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    before = target.weight.clone()
    torch.save({**source.state_dict(), "weight": change(source.weight.detach())}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=rf"1 of another type \(weight {found} instead of torch\.float32\)"):
        load_checkpoint(target, tmp_path / "a.pt")
    assert torch.equal(target.weight, before)


def test_types_that_hold_the_same_are_cast(tmp_path):
    source = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    source.register_buffer("mask", torch.tensor([True, False]))
    source.register_buffer("phases", torch.tensor([1j, 2.0]))
    source[1].num_batches_tracked += 100_000
    kinds = {"mask": torch.uint8, "phases": torch.complex128}
    for kind in (torch.float64, torch.bfloat16, torch.float16):
        entries = {name: value.to(kinds.get(name, kind)) for name, value in source.state_dict().items()}
        torch.save(entries, tmp_path / "a.pt")
        target = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        target.register_buffer("mask", torch.zeros(2, dtype=torch.bool))
        target.register_buffer("phases", torch.zeros(2, dtype=torch.complex64))
        load_checkpoint(target, tmp_path / "a.pt")
        assert torch.equal(target[0].weight, source[0].weight.to(kind).float())
        assert (target.mask.tolist(), target.phases.tolist()) == ([True, False], [1j, 2.0])
    torch.save({**entries, "mask": torch.tensor([2, 0])}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"mask torch\.int64 instead of torch\.bool"):
        load_checkpoint(target, tmp_path / "a.pt")


def places_of_numbers(path):
    """Where a file that `torch.save` wrote holds its pickle and its tensors."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.filename.endswith("data.pkl") or "/data/" in member.filename:
                contents = archive.read(member)
                yield path.read_bytes().index(contents) + len(contents) // 2


def test_a_flipped_bit_is_damage(tmp_path):
    path = tmp_path / "a.pt"
    torch.save(nn.Linear(40, 30).state_dict(), path)
    whole = path.read_bytes()
    places = list(places_of_numbers(path))
    assert len(places) == 3
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 8]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match=r"a\.pt is damaged: its contents do not match their checksums"):
            load_checkpoint(nn.Linear(40, 30), path)


def test_files_without_checksums_are_read(tmp_path):
    source, target = nn.Linear(4, 3), nn.Linear(4, 3)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(source.state_dict(), tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(load_checkpoint(target, tmp_path / "a.pt").weight, source.weight)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.bin"])
@pytest.mark.parametrize(
    "text",
    [
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n",
        "<!DOCTYPE html>\n<title>Not found: für immer</title>\n",
        "epoch,loss\n1,0.5\n",
        "a note",
        "é" * 300,
    ],
)
def test_a_text_is_called_one(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    message = rf"{name} is a text, which begins with '{re.escape(text.splitlines()[0][:60])}'\. Expected safetensors"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(nn.Linear(2, 2), tmp_path / name)


@pytest.mark.parametrize("contents", [b"\x80\x02e.", b"\x00" * 50, b"K\x65h\x65\x00", bytes(range(128, 256))])
def test_what_the_unpickler_stumbles_over_is_not_repeated(tmp_path, contents):
    (tmp_path / "a.pt").write_bytes(contents)
    with pytest.raises(CheckpointError, match=r"a\.pt cannot be read as a checkpoint: it is damaged, of another kind"):
        load_checkpoint(nn.Linear(2, 2), tmp_path / "a.pt")
