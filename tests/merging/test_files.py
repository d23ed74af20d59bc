"""Claim: the merged file is the merged network, loads strictly anywhere, and is written without holding either."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from lmc_curvature import merge
from lmc_curvature.checkpoints import load_checkpoint
from lmc_curvature.errors import (
    ArchitectureMismatchError,
    CheckpointError,
    NonFiniteError,
    OptionError,
    PartitionError,
    UnsupportedModelError,
)
from lmc_curvature.merging.checking import check_checkpoints
from lmc_curvature.merging.files import KIND, merge_checkpoints, plan_merge
from lmc_curvature.merging.recipes import recipe
from lmc_curvature.sources import digits_resnet
from lmc_curvature.sources.data import load_data
from tests.support.cases import CASES
from tests.support.networks import randomized

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pair():
    return [randomized(digits_resnet(width=2), seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def paths(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    save_file(pair[0].state_dict(), folder / "a.safetensors", {"author": "me"})
    wrapped = {f"module.{name}": entry for name, entry in pair[1].state_dict().items()}
    torch.save(
        {"state_dict": wrapped, "optimizer": {"state": {0: {"step": torch.ones(1)}}}, "epoch": 3}, folder / "b.pt"
    )
    return folder / "a.safetensors", folder / "b.pt"


_LOSS = """
import sys, torch, torch.nn.functional as F
from safetensors.torch import load_file
from lmc_curvature.sources import digits_resnet
from lmc_curvature.sources.data import load_data
model = digits_resnet(width=2).eval()
model.load_state_dict(load_file(sys.argv[1]), strict=True)
(x, y), = load_data("digits", limit=50).batches(50)
print(F.cross_entropy(model(x), y).item())
"""


@pytest.mark.check
def test_a_fresh_process_loads_the_file_strictly_and_has_the_loss(pair, paths, tmp_path):
    options = {"layers": ["conv", "linear"], "alpha": 0.3}
    out = tmp_path / "merged.safetensors"
    merge_checkpoints(plan_merge(*paths, digits_resnet(width=2), **options), out)
    done = subprocess.run([sys.executable, "-c", _LOSS, out], cwd=ROOT, capture_output=True, text=True, check=True)
    ((x, y),) = load_data("digits", limit=50).batches(50)
    with torch.no_grad():
        expected = F.cross_entropy(merge(*pair, **options)(x), y).item()
    assert float(done.stdout) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 0.125, "layers": ["stage2.0.conv1"]},
        {"alpha": {"conv": 0.25, "linear": 1.0}},
        {"layers": ["linear"], "base": "b"},
        {"layers": ["norm"], "partition": "module"},
    ],
)
def test_files_and_networks_are_merged_alike(pair, paths, tmp_path, options):
    if "partition" in options:
        options = options | {"layers": [name for name in ("norm", "linear") if name in dict(pair[0].named_modules())]}
    plan = plan_merge(*paths, digits_resnet(width=2), **options)
    merge_checkpoints(plan, tmp_path / "m")
    expected = merge(*pair, **options).state_dict()
    torch.testing.assert_close(load_file(tmp_path / "m"), expected, rtol=1e-6, atol=1e-7)
    loaded = load_checkpoint(digits_resnet(width=2), tmp_path / "m")
    torch.testing.assert_close(loaded.state_dict(), load_file(tmp_path / "m"), rtol=0, atol=0)


def test_without_a_network_layers_are_told_by_names(pair, paths, tmp_path):
    merge_checkpoints(plan_merge(*paths), tmp_path / "all")
    torch.testing.assert_close(load_file(tmp_path / "all"), merge(*pair).state_dict(), rtol=1e-6, atol=1e-7)
    options = {"layers": ["stage1", "linear"], "partition": "block"}
    merge_checkpoints(plan_merge(*paths, **options), tmp_path / "some")
    expected = merge(*pair, **options).state_dict()
    torch.testing.assert_close(load_file(tmp_path / "some"), expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(PartitionError, match="'fused' asks the network .*--model"):
        plan_merge(*paths, layers=["linear"])
    with pytest.raises(PartitionError, match="no layer 'stage7'"):
        plan_merge(*paths, layers=["stage7"], partition="block")


def test_what_does_not_move_and_metadata_are_kept(paths, tmp_path):
    merge_checkpoints(plan_merge(*paths, layers=["linear"], partition="module"), tmp_path / "m")
    before, after = load_file(paths[0]), load_file(tmp_path / "m")
    for name, entry in before.items():
        assert torch.equal(entry, after[name]) != name.startswith("linear."), name
    with safetensors.safe_open(tmp_path / "m", "pt") as file:
        metadata = file.metadata()
    assert metadata["author"] == "me"
    header = json.loads(metadata["lmc_curvature"])
    record = header["metadata"]
    assert header["kind"] == KIND
    assert record["layers"] == ["linear"]
    assert record["alpha"]["linear"] == 0.5
    assert record["base"] == "a"
    assert record["versions"]["torch"] == torch.__version__
    for owner, path in zip("ab", paths, strict=True):
        done = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True)
        assert record["files"][owner] == {"path": str(path), "sha256": {path.name: done.stdout.split()[0]}}


def test_a_tied_parameter_may_be_stored_once_or_under_each_name(tmp_path):
    case = CASES["tied weights"]
    first, second = case.model(0), case.model(1)
    torch.save(first.state_dict(), tmp_path / "a.pt")
    once = {name: entry for name, entry in second.state_dict().items() if name != "encoder.weight"}
    save_file(once, tmp_path / "b.safetensors")
    for base in ("a", "b"):
        options = {"alpha": {"encoder": 0.25}, "base": base}
        plan = plan_merge(tmp_path / "a.pt", tmp_path / "b.safetensors", case.model(2), **options)
        merge_checkpoints(plan, tmp_path / "m")
        loaded = load_checkpoint(case.model(3), tmp_path / "m")
        expected = merge(first, second, **options).state_dict()
        torch.testing.assert_close(loaded.state_dict(), expected, rtol=1e-12, atol=1e-14)
    # By names alone, what is one tensor in the file is moved with its first name.
    torch.save(second.state_dict(), tmp_path / "c.pt")
    options = {"layers": ["encoder.weight"], "partition": "tensor"}
    merge_checkpoints(plan_merge(tmp_path / "a.pt", tmp_path / "c.pt", **options), tmp_path / "m")
    found = load_file(tmp_path / "m")
    assert torch.equal(found["encoder.weight"], found["decoder.weight"])
    assert not torch.equal(found["encoder.weight"], first.encoder.weight)


def test_halves_are_averaged_in_single_precision_and_keep_their_type(tmp_path):
    generator = torch.Generator().manual_seed(0)
    a, b = ({"w": torch.randn(100, generator=generator)} for _ in range(2))
    save_file({"w": a["w"].bfloat16()}, tmp_path / "a")
    save_file(b, tmp_path / "b")
    merge_checkpoints(plan_merge(tmp_path / "a", tmp_path / "b", alpha=0.3), tmp_path / "m")
    expected = (0.7 * a["w"].bfloat16().float() + 0.3 * b["w"]).bfloat16()
    torch.testing.assert_close(load_file(tmp_path / "m")["w"], expected, rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda e: e.pop("linear.bias"), ArchitectureMismatchError, r"linear\.bias: only in .*a\.safetensors"),
        (lambda e: e.update(more=torch.ones(2)), ArchitectureMismatchError, r"more: only in .*b, with shape \(2,\)"),
        (
            lambda e: e.update({"linear.bias": torch.ones(11)}),
            ArchitectureMismatchError,
            r"linear\.bias: shape \(10,\) in",
        ),
        (lambda e: e.update({"linear.bias": torch.ones(10).int()}), ArchitectureMismatchError, r"linear\.bias: type"),
    ],
)
def test_files_that_cannot_be_averaged_are_refused_by_their_headers(pair, paths, tmp_path, change, error, message):
    entries = dict(pair[1].state_dict())
    change(entries)
    save_file(entries, tmp_path / "b")
    with pytest.raises(error, match=message):
        plan_merge(paths[0], tmp_path / "b")
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'b'} does not fit .*ResNet|{tmp_path / 'b'} has the net"):
        plan_merge(paths[0], tmp_path / "b", digits_resnet(width=2))


def test_buffers_that_do_not_move_must_be_equal(tmp_path):
    class Net(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.register_buffer("scale", torch.tensor(value))
            self.register_buffer("index", torch.tensor([1, 2]))

    for name, value in zip("ab", (1.0, 2.0), strict=True):
        save_file(Net(value).state_dict(), tmp_path / name)
    with pytest.raises(ArchitectureMismatchError, match="'scale' differs between"):
        plan_merge(tmp_path / "a", tmp_path / "b", Net(0.0))
    # Without a network, a buffer of real numbers is not told from a parameter; one of whole numbers is.
    plan_merge(tmp_path / "a", tmp_path / "b")
    save_file(Net(1.0).state_dict() | {"index": torch.tensor([1, 3])}, tmp_path / "b")
    with pytest.raises(ArchitectureMismatchError, match="'index' differs between"):
        plan_merge(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("coarse", ["a", "b"])
@pytest.mark.parametrize("network", [None, nn.Linear(3, 2)])
def test_types_too_coarse_for_an_average_are_refused(dtype, coarse, network, tmp_path):
    for name in "ab":
        entries = nn.Linear(3, 2).state_dict()
        save_file({**entries, "weight": entries["weight"].to(dtype)} if name == coarse else entries, tmp_path / name)
    message = f"Entry 'weight' of {tmp_path / coarse} is of type {dtype}.*bring it to bfloat16"
    for compare in (plan_merge, check_checkpoints):
        with pytest.raises(CheckpointError, match=message):
            compare(tmp_path / "a", tmp_path / "b", network)


SPECTRAL = {"the older": nn.utils.spectral_norm, "a parametrisation": nn.utils.parametrizations.spectral_norm}


@pytest.mark.parametrize("norm", SPECTRAL.values(), ids=SPECTRAL)
@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 3), lambda: nn.Conv2d(2, 3, 3)])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("with_network", [False, True])
def test_vectors_of_spectral_normalisation_are_not_averaged(norm, make, inside, with_network, tmp_path):
    pair = [nn.Sequential(norm(make())) if inside else norm(make()) for _ in range(2)]
    network = pair[0] if with_network else None
    for name, own in zip("ab", pair, strict=True):
        torch.save(own.state_dict(), tmp_path / name)
    with pytest.raises(ArchitectureMismatchError, match=r"_u' differs between .* and is none that moves"):
        plan_merge(tmp_path / "a", tmp_path / "b", network)
    vectors = {name: tensor for name, tensor in pair[0].state_dict().items() if name.endswith(("_u", "_v"))}
    assert len(vectors) == 2
    torch.save({**pair[1].state_dict(), **vectors}, tmp_path / "b")
    merge_checkpoints(plan_merge(tmp_path / "a", tmp_path / "b", network), tmp_path / "m")
    merged = load_file(tmp_path / "m")
    for name, tensor in pair[0].state_dict().items():
        expected = tensor if name in vectors else (tensor + pair[1].state_dict()[name]) / 2
        torch.testing.assert_close(merged[name], expected)


def test_other_names_that_end_in_u_or_v_move(tmp_path):
    a, b = ({name: torch.randn(3) for name in ("u", "gate_u", "attn.w_v", "l.weight_v", "l.weight_g")} for _ in "ab")
    for name, entries in (("a", a), ("b", b)):
        save_file(entries, tmp_path / name)
    assert set(plan_merge(tmp_path / "a", tmp_path / "b").entries) == set(a)


class Adapted(nn.Module):
    """Two linear layers, each with factors of an update of its own."""

    def __init__(self, names):
        super().__init__()
        for layer in "qv":
            factors = {name: nn.Linear(*shape, bias=False) for name, shape in zip(names, [(4, 2), (2, 4)], strict=True)}
            self.add_module(layer, nn.ModuleDict({"base": nn.Linear(4, 4), **factors}))


@pytest.mark.parametrize("names", [("lora_A", "lora_B"), ("lora_a", "lora_b"), ("lora_down", "lora_up")])
@pytest.mark.parametrize("with_network", [False, True])
def test_low_rank_factors_are_refused_as_between_networks(names, with_network, tmp_path):
    torch.manual_seed(0)
    pair = [Adapted(names) for _ in range(2)]
    files = tmp_path / "a", tmp_path / "b"

    def store():
        save_file(pair[0].state_dict(), files[0])
        torch.save({"state_dict": pair[1].state_dict()}, files[1])

    model = Adapted(names) if with_network else None
    store()
    some = {"layers": ["q.base"], "partition": "module"}
    message = rf"q\.{names[0]}\.weight and q\.{names[1]}\.weight are the factors.*1 other pair.*merge_and_unload"
    for compare in (plan_merge, check_checkpoints, lambda *args: plan_merge(*args, **some)):
        with pytest.raises(UnsupportedModelError, match=message):
            compare(*files, model)
    with pytest.raises(UnsupportedModelError, match=message):
        merge(*pair, **some)
    # With one factor of each update in common, updates move in a straight line.
    for layer in "qv":
        first, second = (getattr(network, layer)[names[0]] for network in pair)
        second.load_state_dict(first.state_dict())
    store()
    merge_checkpoints(plan_merge(*files, model), tmp_path / "m")
    torch.testing.assert_close(load_file(tmp_path / "m"), merge(*pair).state_dict(), rtol=1e-6, atol=1e-7)
    assert check_checkpoints(*files, model).entries == 8


def test_what_is_not_finite_is_named_and_nothing_written(tmp_path):
    save_file({"v": torch.ones(3), "w": torch.ones(3)}, tmp_path / "a")
    save_file({"v": torch.ones(3), "w": torch.tensor([1, torch.nan, 1])}, tmp_path / "b")
    with pytest.raises(NonFiniteError, match=r"'w' of the average of \S+a and \S+b has values"):
        merge_checkpoints(plan_merge(tmp_path / "a", tmp_path / "b"), tmp_path / "m")
    assert not (tmp_path / "m").exists()
    merge_checkpoints(plan_merge(tmp_path / "a", tmp_path / "b", layers=["v"], partition="tensor"), tmp_path / "m")


def _weight(setting, name):
    """mergekit's rule: the first filter that is a part of the entry's name, or that has no filter."""
    if isinstance(setting, float):
        return setting
    return next(row["value"] for row in setting if "filter" not in row or row["filter"] in name)


def test_the_recipe_gives_every_entry_its_weights(paths, tmp_path):
    # Names that are parts of one another.
    coordinates = {"w": 0.25, "a.w": 0.0, "b.a.w": 0.5, "b.c": 0.0, "d.w.e": 0.0, "f": 1.0}
    for base, name in (("a", paths[0]), ("b", paths[1])):
        found = recipe(*paths, base, coordinates)
        assert (found["merge_method"], found["base_model"]) == ("linear", str(name))
        assert [model["model"] for model in found["models"]] == [str(path) for path in paths]
        weights = [model["parameters"]["weight"] for model in found["models"]]
        for entry, alpha in coordinates.items():
            assert [_weight(weight, entry) for weight in weights] == [1 - alpha, alpha], entry
    same = recipe(*paths, "a", {"w": 0.25, "v": 0.25})["models"]
    assert [model["parameters"]["weight"] for model in same] == [0.75, 0.25]


def test_the_recipe_is_a_file_beside_the_network(tmp_path):
    for name in "ab":
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    plan = plan_merge(tmp_path / "a" / "model.safetensors", tmp_path / "b", alpha=0.25)
    merge_checkpoints(plan, tmp_path / "m", mergekit=tmp_path / "m.yaml")
    found = yaml.safe_load((tmp_path / "m.yaml").read_text())
    assert [model["model"] for model in found["models"]] == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert found["base_model"] == str(tmp_path / "a")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("x", "a.safetensors", "b.safetensors"), "a.safetensors is not what mergekit reads from .*one.*and not there"),
        (("one", "a.safetensors", "model.safetensors"), "which is model.safetensors: move it"),
        (("one", "model.safetensors", "pytorch_model.bin"), "bin is not what .* which is model.safetensors"),
        (("other", "a.safetensors", "model.safetensors"), "which is model.safetensors.index.json"),
    ],
)
def test_checkpoints_that_mergekit_would_not_read_are_refused(tmp_path, names, said):
    """Two files in one directory, of which it reads one at most."""
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for number, name in enumerate(names[1:]):
        save_file({"w": torch.full((2,), float(number))}, folder / name)
    if names[0] == "other":
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "a.safetensors"}}))
    plan = plan_merge(*(folder / name for name in names[1:]))
    with pytest.raises(CheckpointError, match=said):
        merge_checkpoints(plan, tmp_path / "m", mergekit=tmp_path / "m.yaml")
    assert not (tmp_path / "m").exists()
    assert not (tmp_path / "m.yaml").exists()


def test_a_recipe_has_no_statistics_that_were_estimated_anew(tmp_path):
    network = torch.nn.BatchNorm1d(2)
    for name in "ab":
        save_file(network.state_dict(), tmp_path / name)
    plan = plan_merge(tmp_path / "a", tmp_path / "b")
    with pytest.raises(OptionError, match="averages running statistics"):
        merge_checkpoints(plan, tmp_path / "m", mergekit=tmp_path / "m.yaml", recalibrated=network)
    assert not (tmp_path / "m").exists()


_PEAK = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from lmc_curvature.merging.files import merge_checkpoints, plan_merge

def merge(a, b, out):
    plan = plan_merge(a, b, layers=["w1", "w3"], partition="tensor") if "some" in sys.argv else plan_merge(a, b)
    merge_checkpoints(plan, out)

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

folder = Path(sys.argv[1])
save_file({f"w{number}": torch.ones(3) for number in range(4)}, folder / "tiny")
merge(folder / "tiny", folder / "tiny", folder / "out")
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
merge(folder / "a", folder / "b", folder / "out")
print(status("VmHWM") - before)
"""


@pytest.mark.check
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are reset by Linux alone")
@pytest.mark.parametrize("what", ["all", "some"])
@pytest.mark.parametrize("save", [save_file, torch.save])
def test_less_than_a_checkpoint_and_its_largest_entry_is_in_memory(save, what, tmp_path):
    sizes = [3_000_000] * 16 + [6_000_000]
    for seed, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        save(
            {f"w{number}": torch.randn(size, generator=generator) for number, size in enumerate(sizes)}, tmp_path / name
        )
    command = [sys.executable, "-c", _PEAK, tmp_path, what]
    # What is freed is given back at once, or the peak is that of the allocator's habits.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
    peak, largest = int(done.stdout), 4 * max(sizes)
    assert peak < 4 * sum(sizes) + largest
    # And, of many entries, far less.
    assert peak < 0.75 * 4 * sum(sizes)


class _Inner(nn.Module):
    """A submodule is called `module`, as wrappers call theirs."""

    def __init__(self):
        super().__init__()
        self.first, self.module = nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x):
        return x + self.module(self.first(x))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_module_called_module_keeps_its_name(tmp_path, wrapped):
    pair = [_Inner() for _ in range(2)]
    for name, network in zip("ab", pair, strict=True):
        prefix = "module." if wrapped else ""
        torch.save({prefix + key: value for key, value in network.state_dict().items()}, tmp_path / name)
    merge_checkpoints(plan_merge(tmp_path / "a", tmp_path / "b"), tmp_path / "out.safetensors")
    merged = _Inner()
    merged.load_state_dict(load_file(tmp_path / "out.safetensors"), strict=True)
    expected = {name: (a + pair[1].state_dict()[name]) / 2 for name, a in pair[0].state_dict().items()}
    torch.testing.assert_close(merged.state_dict(), expected)


def test_masks_of_infinities_that_are_equal_stay(tmp_path):
    mask = torch.full((3, 3), -torch.inf).triu(1)
    for name in "ab":
        save_file({"mask": mask, "weight": torch.randn(2, 2)}, tmp_path / name)
    merge_checkpoints(plan_merge(tmp_path / "a", tmp_path / "b"), tmp_path / "out.safetensors")
    assert torch.equal(load_file(tmp_path / "out.safetensors")["mask"], mask)
    found = check_checkpoints(tmp_path / "a", tmp_path / "b", None, partition="tensor", distances=True)
    assert found.distances is not None
    assert math.isfinite(found.distance)


def test_what_is_tied_in_one_file_alone_is_averaged_on_its_own(tmp_path):
    shared = torch.randn(2, 2)
    torch.save({"e": shared, "h": shared}, tmp_path / "a")
    torch.save({"e": torch.zeros(2, 2), "h": torch.ones(2, 2)}, tmp_path / "b")
    found = check_checkpoints(tmp_path / "a", tmp_path / "b", None, partition="tensor", distances=True)
    assert dict(zip(found.layers, found.distances, strict=True)) == pytest.approx(
        {"e": float(shared.norm()), "h": float((shared - 1).norm())}
    )


def test_an_option_that_fits_no_file_is_refused(tmp_path):
    for name in "ab":
        torch.save({"w": torch.randn(2)}, tmp_path / name)
    with pytest.raises(CheckpointError, match="key='model' fits neither"):
        plan_merge(tmp_path / "a", tmp_path / "b", key="model")
