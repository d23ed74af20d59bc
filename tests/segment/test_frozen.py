"""Claim: what is frozen is at one network's entries at both ends, in no layer, and named when it is not there."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from lmc_curvature import LayerPartition, Segment, measure_barrier, predict_barrier
from lmc_curvature.errors import ArchitectureMismatchError, NonFiniteError, OptionError, PartitionError
from tests.support.cases import CASES
from tests.support.networks import randomized, state_of, untouched

CONV = CASES["conv, interpolate"]
BN1 = {"bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"}
CONV1 = {"conv1.weight", *BN1}
STATISTICS = {f"bn{number}.running_{kind}" for number in (1, 2) for kind in ("mean", "var")}


def _networks():
    return randomized(CONV.model(), 1), randomized(CONV.model(), 2)


FROZEN = {
    "a layer": ("fc", {"fc.weight", "fc.bias"}, ("conv1", "conv2")),
    "a layer with its normalisation": ("conv1", CONV1, ("conv2", "fc")),
    "a module within a layer": (r"^bn1\.", BN1, ("conv1", "conv2", "fc")),
    "a pattern": (["running_"], STATISTICS, ("conv1", "conv2", "fc")),
    "several": (("conv1", "fc"), {*CONV1, "fc.weight", "fc.bias"}, ("conv2",)),
}


@pytest.mark.parametrize("base", ["a", "b"])
@pytest.mark.parametrize(("frozen", "entries", "layers"), FROZEN.values(), ids=FROZEN)
def test_frozen_entries_are_those_of_the_base_at_both_ends(frozen, entries, layers, base):
    a, b = _networks()
    with untouched(a, b):
        segment = Segment(a, b, frozen=frozen, base=base)
    assert segment.layers == layers
    fixed = state_of(a if base == "a" else b)
    for end, network in ((segment.start, a), (segment.end, b)):
        own = state_of(network)
        assert end.keys() == own.keys()
        expected = {name: (fixed if name in entries else own)[name] for name in own}
        torch.testing.assert_close(end, expected, rtol=0, atol=0)
    directions = segment.directions()
    assert {name for direction in directions.values() for name in direction} == segment.start.keys() - entries
    half = segment.point(0.5)
    for name in entries:
        assert torch.equal(half[name], fixed[name])
        assert torch.equal(segment.reversed().to(dtype=torch.float32).point(0.3)[name], fixed[name].float())


def test_it_is_noted():
    a, b = _networks()
    # What can be read once is read once.
    assert Segment(a, b, frozen=iter(["conv1", "fc"])).notes == (
        "frozen at model_a: conv1, fc (7 entries, 7 of which are others in model_b)",
    )
    assert Segment(a, b).notes == ()
    segment = Segment(a, b, frozen="fc")
    assert segment.notes == ("frozen at model_a: fc (2 entries, 2 of which are others in model_b)",)
    assert segment.reversed().to(dtype=torch.float32).notes == segment.notes
    assert Segment(a, b, frozen=["fc", "bn1"], base="b").notes == (
        "frozen at model_b: fc, bn1 (6 entries, 6 of which are others in model_a)",
    )
    b.fc.requires_grad_(False)
    note = "frozen at model_b: what does not require gradients (2 entries, 2 of which are others in model_a)"
    assert Segment(a, b, frozen="requires_grad", base="b").notes == (note,)


@pytest.mark.parametrize(("policy", "statistics"), [("interpolate", True), ("batch", False), ("recalibrate", False)])
def test_what_does_not_require_gradients_stays_with_its_statistics(policy, statistics):
    a, b = _networks()
    a.conv1.requires_grad_(False)
    a.bn1.requires_grad_(False)
    a.bn2.weight.requires_grad_(False)
    segment = Segment(a, b, frozen="requires_grad", batch_norm=policy)
    moved = {name for layer in segment.layers for name in segment.partition.entries(layer)}
    stays = {"conv1.weight", "bn1.weight", "bn1.bias", "bn2.weight"}
    stays |= {"bn1.running_mean", "bn1.running_var"} if statistics else set()
    assert segment.start.keys() - moved == stays
    # Of the other network everything requires gradients.
    with pytest.raises(
        PartitionError,
        match="every parameter of the network whose entries stay.*requires gradients.*Name the layers that stay",
    ):
        Segment(a, b, frozen="requires_grad", base="b", batch_norm=policy)


def test_statistics_of_a_normalisation_without_parameters_move():
    a, b = (
        randomized(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False), nn.Linear(3, 2)), seed)
        for seed in (1, 2)
    )
    a[0].requires_grad_(False)
    assert Segment(a, b, frozen="requires_grad").partition.groups == {
        "0": ("1.running_mean", "1.running_var"),
        "2": ("2.weight", "2.bias"),
    }


PARTITIONS = {
    "mapping": {"rest": ["conv", "bn"]},
    "mapping that has it, too": {"head": ["fc"], "rest": [".*"]},
    "partition of the others": LayerPartition.of(CONV.model(), {"rest": ["conv", "bn"]}, frozen="fc"),
    "partition of all": LayerPartition.of(CONV.model(), {"head": ["fc"], "rest": [".*"]}),
    "function": lambda entry: "head" if entry.startswith("fc") else "rest",
}


@pytest.mark.parametrize("layers", PARTITIONS.values(), ids=PARTITIONS)
def test_a_partition_need_not_cover_what_is_frozen(layers):
    segment = Segment(*_networks(), layers=layers, frozen=r"^fc\.")
    assert segment.layers == ("rest",)
    assert segment.start.keys() - set(segment.partition.entries("rest")) == {"fc.weight", "fc.bias"}


def test_what_moves_must_be_covered_all_the_same():
    with pytest.raises(PartitionError, match="No layer matches 'bn1.weight'.*Add a last layer"):
        Segment(*_networks(), layers={"convs": ["conv"]}, frozen="fc")
    with pytest.raises(PartitionError, match="leaves out 'fc.weight', 'fc.bias'"):
        Segment(*_networks(), layers=PARTITIONS["partition of the others"], frozen="conv1")


def test_layers_go_before_patterns():
    a, b = (nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(12)]) for _ in range(2))
    assert Segment(a, b, frozen="1").layers == tuple(str(n) for n in range(12) if n != 1)
    assert Segment(a, b, frozen="1\\D").layers == tuple(str(n) for n in range(12) if n not in (1, 11))


@pytest.mark.parametrize(
    ("frozen", "error", "message"),
    [
        ("conv9", PartitionError, "frozen='conv9' matches no layer and no entry: did you mean 'conv"),
        (["fc", "fc.wieght"], PartitionError, "'fc.wieght' matches no layer and no entry: did you mean 'fc.weight'"),
        ("(", PartitionError, r"frozen='\(' is neither a layer nor a regular expression: missing \)"),
        (".", OptionError, r"freezes all 12 entries: leave at least one layer that moves"),
        (["conv1", "conv2", "fc"], OptionError, "freezes all 12 entries"),
        (True, OptionError, "frozen=True: expected names of layers, regular expressions for entries, or"),
        ([3], OptionError, r"frozen=\[3\]: expected names"),
    ],
)
def test_bad_choices_are_named(frozen, error, message, untyped):
    with pytest.raises(error, match=message):
        Segment(*_networks(), frozen=frozen)


def test_everything_without_gradients_is_everything(untyped):
    a, b = _networks()
    with pytest.raises(OptionError, match="freezes all"):
        Segment(a.requires_grad_(False), b, frozen="requires_grad")
    with pytest.raises(OptionError, match="base='c' is not a choice"):
        Segment(a, b, frozen="fc", base="c")


def test_other_shapes_are_refused_with_the_entry():
    a = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    b = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 5))
    with pytest.raises(ArchitectureMismatchError, match=r"1.weight: shape \(4, 3\) in model_a, \(5, 3\) in model_b"):
        Segment(a, b, frozen="1")


def test_values_that_are_not_used_may_be_anything():
    a, b = _networks()
    b.fc.weight.data.fill_(torch.nan)
    assert Segment(a, b, frozen="fc").layers == ("conv1", "conv2")
    with pytest.raises(NonFiniteError, match="'fc.weight' of model_b has 12 of 12"):
        Segment(a, b, frozen="fc", base="b")
    with pytest.raises(NonFiniteError, match="'fc.weight' of model_b"):
        Segment(a, b, frozen="conv1")


def test_equal_ends_are_noted_where_nothing_that_moves_differs():
    a, b = _networks()
    same = copy.deepcopy(a)
    same.fc = b.fc
    assert not Segment(a, same).is_point
    segment = Segment(a, same, frozen="fc")
    assert segment.is_point
    assert segment.notes == (
        "frozen at model_a: fc (2 entries, 2 of which are others in model_b)",
        "model_a and model_b are equal in every entry that moves",
    )


class Tied(nn.Module):
    """Tied layers, normalisations with and without entries, a parameter of its own, and buffers that stay."""

    def __init__(self):
        super().__init__()
        self.encoder, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.middle, self.plain_norm = nn.Linear(6, 6), nn.BatchNorm1d(6, affine=False)
        self.decoder = nn.Linear(6, 6)
        self.decoder.weight = self.encoder.weight
        self.head = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("places", torch.tensor([2, 0, 1]))

    def forward(self, x):
        x = torch.tanh(self.plain_norm(self.middle(torch.tanh(self.norm(self.encoder(x))))))
        return (self.head(self.decoder(x)) * self.scale)[:, self.places]


def _tied_networks():
    a, b = (randomized(Tied().double(), seed) for seed in (1, 2))
    for part in (a.middle, a.norm, b.head, b.decoder.weight):
        part.requires_grad_(False)
    return a.eval(), b.eval()


NORM = {"norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"}
PLAIN_NORM = {"plain_norm.running_mean", "plain_norm.running_var"}
MIDDLE, HEAD = {"middle.weight", "middle.bias"}, {f"head.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")}
DECODER = {"encoder.weight", "decoder.bias"}
CHOICES = {
    "a layer": ("encoder", {"encoder.weight", "encoder.bias", *NORM}),
    "a layer whose weight is tied to another's": ("decoder", DECODER),
    "a pattern for a tied layer": (r"^decoder\.", DECODER),
    "a pattern for a tied name": (r"coder\.w", {"encoder.weight"}),
    "a tied name": ("decoder.weight", {"encoder.weight"}),
    "a layer with statistics": ("middle", MIDDLE | PLAIN_NORM),
    "a container": ("head", HEAD),
    "a module in it": ("head.0", {"head.0.weight", "head.0.bias"}),
    "a normalisation": ("norm", NORM),
    "a parameter of the network": ("scale", {"scale"}),
    "some of everything": ("bias$", {f"{name}.bias" for name in ("encoder", "norm", "middle", "decoder")} | {
        "head.0.bias", "head.2.bias"
    }),
    "what does not require gradients": ("requires_grad", {"a": MIDDLE | NORM, "b": HEAD | {"encoder.weight"}}),
    "several": (["requires_grad", "decoder", "head.0"], {
        "a": MIDDLE | NORM | DECODER | {"head.0.weight", "head.0.bias"},
        "b": HEAD | DECODER,
    }),
}  # fmt: skip


def _plain_loss(network, state, policy, batches):
    """The mean loss of a network at a state, by torch's own modules."""
    network = copy.deepcopy(network)
    norms = {name: module for name, module in network.named_modules() if isinstance(module, nn.BatchNorm1d)}
    inputs = {name: [] for name in norms}
    for name, module in norms.items():
        module.train(policy != "interpolate")
        module.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0].detach()))

    def total():
        copies = lambda: {name: tensor.clone() for name, tensor in state.items()}  # noqa: E731
        losses = [len(y) * F.cross_entropy(functional_call(network, copies(), x), y) for x, y in batches]
        return sum(losses).item() / sum(len(y) for _, y in batches)

    if policy == "recalibrate":
        total()
        for name, module in norms.items():
            weights = torch.tensor([len(part) for part in inputs[name]]).double()
            for kind, statistics in (
                ("mean", [p.mean(0) for p in inputs[name]]),
                ("var", [p.var(0) for p in inputs[name]]),
            ):
                state = {**state, f"{name}.running_{kind}": weights @ torch.stack(statistics) / weights.sum()}
            module.eval()
    return total()


@pytest.mark.check(after=4)
@pytest.mark.parametrize("base", ["a", "b"])
@pytest.mark.parametrize("policy", ["interpolate", "batch", "recalibrate"])
@pytest.mark.parametrize(("frozen", "entries"), CHOICES.values(), ids=CHOICES)
def test_losses_between_are_those_of_a_segment_made_by_hand(frozen, entries, policy, base):
    a, b = _tied_networks()
    stays = entries[base] if isinstance(entries, dict) else entries
    states = [{**dict(net.named_parameters()), **dict(net.named_buffers())} for net in (a, b)]
    fixed = states[0 if base == "a" else 1]

    def at(alpha):
        return {
            name: fixed[name].detach() if name in stays or not start.is_floating_point()
            else ((1 - alpha) * start + alpha * states[1][name]).detach()
            for name, start in states[0].items()
        }  # fmt: skip

    generator = torch.Generator().manual_seed(3)
    batches = [(torch.randn(n, 6, generator=generator, dtype=torch.float64), torch.arange(n) % 3) for n in (7, 5)]
    alphas = [0.0, 0.3, 0.5, 1.0]
    expected = [_plain_loss(a, at(alpha), policy, batches) for alpha in alphas]
    options = {"frozen": frozen, "base": base, "batch_norm": policy, "progress": False}
    with untouched(a, b):
        found = measure_barrier(a, b, batches, alphas=alphas, **options)
    assert found.values() == pytest.approx(expected, rel=1e-9)
    if policy == "interpolate" and isinstance(entries, dict):
        prediction = predict_barrier(a, b, batches, method="hvp", **options)
        for alpha, end in enumerate(prediction.endpoints):
            near = [_plain_loss(a, at(alpha + step * 1e-4), policy, batches) for step in (-1, 1)]
            assert end.slopes.sum() == pytest.approx((near[1] - near[0]) / 2e-4, rel=1e-5)


def test_a_module_is_meant_by_its_name_and_tied_ones_too():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.f, self.h = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
            self.h.weight = self.e.weight

    a, b = Net(), Net()
    segment = Segment(a, b, frozen="h")
    moved = {name for direction in segment.directions().values() for name in direction}
    assert moved == {"e.bias", "f.weight", "f.bias"}
