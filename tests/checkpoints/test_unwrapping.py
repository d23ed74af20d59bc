"""Claim: a network's entries are found where people keep them; of several ways to read them none is chosen."""

import collections
import json
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lmc_curvature.checkpoints import load_checkpoint
from lmc_curvature.errors import CheckpointError


def network(seed=None):
    if seed is not None:
        torch.manual_seed(seed)
    backbone = nn.Sequential(collections.OrderedDict(conv=nn.Conv2d(1, 2, 3), norm=nn.BatchNorm2d(2)))
    return nn.Sequential(collections.OrderedDict(backbone=backbone, head=nn.Linear(2, 3)))


@pytest.fixture
def source():
    return network(5)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.pt"


def under(prefix, entries):
    return {prefix + name: value for name, value in entries.items()}


def assert_same(target, source):
    expected, found = source.state_dict(), target.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def lightning(source, prefix):
    return {
        "epoch": 3,
        "global_step": 120,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": under(prefix, source.state_dict()),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 3}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5), "best": "a.ckpt"}},
        "optimizer_states": [{"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}],
        "hyper_parameters": {"lr": 0.1, "layers": [2, 3], "name": "net"},
    }


def averaged(source):
    return AveragedModel(source).state_dict()


def wrapped_inside(source):
    source.backbone = nn.DataParallel(source.backbone)
    return source.state_dict()


FORMS = {
    "Lightning, net": lambda source: lightning(source, "net."),
    "Lightning, model": lambda source: lightning(source, "model."),
    "Lightning, two deep": lambda source: lightning(source, "task.encoder."),
    "Lightning of a compiled network": lambda source: lightning(source, "model._orig_mod."),
    "net": lambda source: {"net": source.state_dict(), "acc": 0.9, "epoch": 200},
    "network": lambda source: {"network": source.state_dict(), "epoch": torch.tensor(200)},
    "ema alone": lambda source: {"ema": source.state_dict(), "step": 1},
    "ema, two deep": lambda source: {"ema": {"decay": 0.9, "shadow": source.state_dict()}, "config": {"a": {"b": 1}}},
    "state_dict_ema": lambda source: {"state_dict_ema": under("module.", source.state_dict()), "arch": "net"},
    "model and optimizer": lambda source: {
        "model": source.state_dict(),
        "optimizer": torch.optim.SGD(source.parameters(), 0.1).state_dict(),
        "lr_scheduler": {"last_epoch": 3},
    },
    "flat, with other values": lambda source: {**source.state_dict(), "epoch": 3, "args": {"lr": 0.1}},
    "AveragedModel": averaged,
    "AveragedModel under a key": lambda source: {"swa": averaged(source), "epoch": 3},
    "AveragedModel of DataParallel": lambda source: averaged(nn.DataParallel(source)),
    "DataParallel of a part": wrapped_inside,
    "FSDP": lambda source: {
        "_fsdp_wrapped_module." + name.replace("backbone.", "backbone._fsdp_wrapped_module."): value
        for name, value in source.state_dict().items()
    },
    "activation checkpoints": lambda source: {
        name.replace("conv.", "conv._checkpoint_wrapped_module."): value for name, value in source.state_dict().items()
    },
    "compiled": lambda source: torch.compile(source, backend="eager").state_dict(),
}


@pytest.mark.check(after=6)
@pytest.mark.parametrize("form", FORMS)
def test_what_can_be_read_in_one_way_is_read(form, source, path):
    expected = network()
    expected.load_state_dict(source.state_dict())
    torch.save(FORMS[form](source), path)
    assert_same(load_checkpoint(network(), path), expected)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda net: torch.compile(net, backend="eager")])
def test_wrapped_networks_take_what_plain_ones_saved(wrap, source, path):
    torch.save(source.state_dict(), path)
    target = network()
    load_checkpoint(wrap(target), path)
    assert_same(target, source)


def test_two_networks_are_not_chosen_between(source, path):
    other = network(6)
    torch.save({"model": source.state_dict(), "model_ema": under("module.", other.state_dict())}, path)
    target = network(7)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    message = r"in 2 places\. Choose one of key='model'; key='model_ema' \(--key, --strip-prefix on the command line\)"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(target, path)
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())
    assert_same(load_checkpoint(network(), path, key="model"), source)
    assert_same(load_checkpoint(network(), path, key="model_ema"), other)
    with pytest.raises(CheckpointError, match=r"no state dict under key='ema'; .* under 'model', 'model_ema'"):
        load_checkpoint(target, path, key="ema")


def test_two_prefixes_are_not_chosen_between(source, path):
    other = network(6)
    entries = under("student.", source.state_dict()) | under("teacher.module.", other.state_dict())
    torch.save({"state_dict": entries, "epoch": 3}, path)
    ways = "key='state_dict' and strip_prefix='student.'; key='state_dict' and strip_prefix='teacher.'"
    with pytest.raises(CheckpointError, match=ways):
        load_checkpoint(network(), path)
    assert_same(load_checkpoint(network(), path, strip_prefix="student."), source)
    for prefix in ("teacher.", "teacher", "teacher.module."):
        assert_same(load_checkpoint(network(), path, strip_prefix=prefix), other)
    with pytest.raises(CheckpointError, match=r"no name that begins with 'net'; its names are 'student\.backbone"):
        load_checkpoint(network(), path, strip_prefix="net")


def test_nothing_is_left_out_without_a_word(source, path):
    entries = under("net.", source.state_dict()) | {"criterion.weight": torch.ones(3)}
    torch.save(entries, path)
    with pytest.raises(CheckpointError, match=r"1 more \(criterion\.weight\)\. .* pass strip_prefix='net\.' \(--key"):
        load_checkpoint(network(), path)
    assert_same(load_checkpoint(network(), path, strip_prefix="net."), source)
    # A part of another network is no checkpoint of this one.
    torch.save(source.state_dict(), path)
    with pytest.raises(CheckpointError, match=r"beside them 7 more .* pass strip_prefix='head\.'"):
        load_checkpoint(nn.Linear(2, 3), path)


def test_the_top_can_be_chosen(source, path):
    other = network(6)
    torch.save({**source.state_dict(), "ema": other.state_dict()}, path)
    with pytest.raises(CheckpointError, match="Choose one of key=''; key='ema'"):
        load_checkpoint(network(), path)
    assert_same(load_checkpoint(network(), path, key=""), source)
    assert_same(load_checkpoint(network(), path, key="ema"), other)


def test_options_do_not_loosen_what_must_fit(source, path):
    torch.save({"net": {"stem.weight": torch.ones(2), **source.state_dict()}}, path)
    for options in ({"key": "net"}, {"strip_prefix": ""}):
        with pytest.raises(CheckpointError, match=r"1 unexpected \(stem\.weight\)"):
            load_checkpoint(network(), path, **options)
    torch.save(under("net.", source.state_dict()), path)
    with pytest.raises(CheckpointError, match=r"read with strip_prefix='net\.'\) does not fit .* of another shape"):
        load_checkpoint(nn.Sequential(collections.OrderedDict(network().named_children(), head=nn.Linear(2, 4))), path)


class Scaled(nn.Module):
    """A network that keeps something beside its tensors."""

    def __init__(self, scale):
        super().__init__()
        self.linear, self.scale = nn.Linear(2, 2), scale

    def get_extra_state(self):
        return {"scale": self.scale}

    def set_extra_state(self, state):
        self.scale = state["scale"]


def test_extra_state_comes_with_its_module(path):
    torch.save({"state_dict": under("net.", nn.Sequential(Scaled(3.0)).state_dict())}, path)
    target = nn.Sequential(Scaled(1.0))
    load_checkpoint(target, path)
    assert target[0].scale == 3.0
    # A network without such a state has no use for it.
    plain = nn.Sequential(collections.OrderedDict([("0", nn.Module())]))
    plain[0].linear = nn.Linear(2, 2)
    load_checkpoint(plain, path)
    entries = {"linear.weight": torch.ones(2, 2), "linear.bias": torch.ones(2)}
    torch.save(entries, path)
    with pytest.raises(CheckpointError, match=r"1 missing \(_extra_state\)"):
        load_checkpoint(Scaled(1.0), path)


def shards(source, folder, kind="safetensors", prefix=""):
    folder.mkdir()
    entries = under(prefix, source.state_dict())
    stem = "model" if kind == "safetensors" else "pytorch_model"
    files = [f"{stem}-0000{number}-of-00002.{kind}" for number in (1, 2)]
    weight_map = {name: files[index % 2] for index, name in enumerate(entries)}
    for file in files:
        part = {name: value for name, value in entries.items() if weight_map[name] == file}
        (save_file if kind == "safetensors" else torch.save)(part, folder / file)
    index = folder / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 99}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_joined(source, tmp_path, kind):
    index = shards(source, tmp_path / "a", kind, prefix="model.")
    for path in (index, index.parent, str(index.parent)):
        assert_same(load_checkpoint(network(), path), source)


def test_a_directory_with_one_file_is_that_file(source, tmp_path):
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert_same(load_checkpoint(network(), tmp_path), source)
    save_file(source.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(
        CheckpointError, match=r"several checkpoints \(model\.safetensors, other\.safetensors\).*name one"
    ):
        load_checkpoint(network(), tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_damage_to_shards_is_named(source, tmp_path, kind):
    index = shards(source, tmp_path / "a", kind)
    first, second = sorted(index.parent.glob(f"*.{kind}"))
    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=rf"{first.name} (is damaged|cannot be read)"):
        load_checkpoint(network(), index)
    first.write_bytes(second.read_bytes())
    with pytest.raises(CheckpointError, match=rf"{first.name} lacks '\S+', which \S+{index.name} says that it holds"):
        load_checkpoint(network(), index.parent)
    first.unlink()
    with pytest.raises(
        CheckpointError, match=rf"{first.name} is missing; \S+{index.name} says that it holds \d+ entries"
    ):
        load_checkpoint(network(), index)
    for contents in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}'):
        index.write_text(contents)
        with pytest.raises(CheckpointError, match=rf"{index.name} is damaged, or is not the index of a checkpoint"):
            load_checkpoint(network(), index)


def test_what_fits_but_for_an_entry_too_many_is_not_passed_over(source, path):
    other = network(3)
    model = {**source.state_dict(), "criterion.weight": torch.ones(3)}
    torch.save({"model": model, "ema": other.state_dict()}, path)
    with pytest.raises(CheckpointError, match="in 2 places.*key='ema'.*key='model'"):
        load_checkpoint(network(), path)
    assert_same(load_checkpoint(network(), path, key="ema"), other)


@pytest.mark.parametrize("prefix", ["ema.", "ema.module.", "teacher.backbone_ema."])
def test_plain_names_beside_prefixed_ones_can_be_chosen(source, path, prefix):
    other = network(6)
    torch.save({**source.state_dict(), **under(prefix, other.state_dict())}, path)
    short = prefix.replace("module.", "")
    for options in ({}, {"key": ""}):
        with pytest.raises(CheckpointError, match=rf"Choose one of key='' and strip_prefix=''; strip_prefix='{short}'"):
            load_checkpoint(network(), path, **options)
    for options in ({"strip_prefix": ""}, {"key": "", "strip_prefix": ""}):
        assert_same(load_checkpoint(network(), path, **options), source)
    assert_same(load_checkpoint(network(), path, strip_prefix=prefix), other)


def test_every_way_that_is_listed_is_one(source, path):
    networks = [source, network(6), network(7)]
    plain, prefixed, nested = (each.state_dict() for each in networks)
    torch.save({**plain, **under("ema.", prefixed), "best": nested}, path)
    with pytest.raises(CheckpointError, match="in 3 places") as caught:
        load_checkpoint(network(), path)
    ways = re.search(r"Choose one of (.*) \(--key", str(caught.value))[1].split("; ")
    assert len(ways) == 3
    read = []
    for way in ways:
        options = dict(re.findall(r"(\w+)='([^']*)'", way))
        read.append(load_checkpoint(network(), path, **options).head.weight)
    assert all(any(torch.equal(weight, each.head.weight) for weight in read) for each in networks)


def test_plain_names_with_a_part_of_another_network_beside_them(path):
    source = nn.Linear(2, 3)
    torch.save({**source.state_dict(), "critic.weight": torch.ones(1, 2)}, path)
    with pytest.raises(CheckpointError, match=r"1 more \(critic\.weight\)\. .* pass key='' and strip_prefix=''"):
        load_checkpoint(nn.Linear(2, 3), path)
    assert torch.equal(load_checkpoint(nn.Linear(2, 3), path, strip_prefix="").weight, source.weight)


@pytest.mark.parametrize("plain_first", [True, False])
def test_what_wrappers_inserted_tells_entries_apart(source, path, plain_first):
    other = network(6)
    both = [source.state_dict(), under("module.", other.state_dict())]
    first, second = both if plain_first else reversed(both)
    torch.save({**first, **second}, path)
    with pytest.raises(CheckpointError, match=r"Choose one of key='' and strip_prefix=''; strip_prefix='module\."):
        load_checkpoint(network(), path)
    assert_same(load_checkpoint(network(), path, strip_prefix=""), source)
    assert_same(load_checkpoint(network(), path, strip_prefix="module."), other)
    with pytest.raises(CheckpointError, match=r"does not fit DataParallel .*: 9 unexpected \(backbone"):
        load_checkpoint(nn.DataParallel(network()), path)
