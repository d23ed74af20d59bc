"""Claim: a network is known by its entries and its structure, and one that cannot move is refused at once."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

from lmc_curvature import HessianOperator, Objective, Segment, measure_barrier, predict_barrier
from lmc_curvature.errors import UnsupportedModelError
from lmc_curvature.objective.network import as_leaves, movable_entries
from lmc_curvature.objective.wrappers import unwrap
from tests.support.cases import TiedNet
from tests.support.networks import NETWORKS, joined, plain_loss, untouched

networks = pytest.mark.parametrize("case", NETWORKS.values(), ids=NETWORKS)
IMAGES = NETWORKS["conv, interpolate"]
VECTORS = NETWORKS["LayerNorm and GELU"]


@networks
def test_the_copy_of_the_network_holds_no_values_to_fall_back_on(case):
    network = Objective(case.model(), [], **case.options).network
    for tensor in [*network.parameters(), *network.buffers()]:
        assert tensor.untyped_storage().nbytes() == tensor.element_size()
        assert not tensor.is_floating_point() or tensor.isnan().all()


def test_a_network_whose_train_returns_nothing():
    class Forgetful(nn.Linear):
        def train(self, mode=True):
            super().train(mode)

    model = Forgetful(5, 3).double()
    expected = plain_loss(model, joined(VECTORS.batches())).item()
    assert Objective(model, VECTORS.batches()).loss() == pytest.approx(expected)


def _with_parameter(tensor):
    model = nn.Linear(2, 2)
    model.extra = nn.Parameter(tensor, requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: _with_parameter(torch.arange(3)),
            "'extra' has type torch.int64.*real floating.*Register it as a bu",
        ),
        (lambda: _with_parameter(torch.ones(3, dtype=torch.complex64)), "'extra' has type torch.complex64"),
        (
            lambda: nn.Sequential(nn.LazyLinear(3)),
            "Parameter '0.weight' is uninitialised: run the network on one",
        ),
        (lambda: nn.LazyBatchNorm1d(affine=False), "Buffer 'running_mean' is uninitialised: run the network on one"),
    ],
)
def test_networks_that_cannot_move_are_refused_at_once(make, message):
    with pytest.raises(UnsupportedModelError, match=message):
        Objective(make(), [])


def test_movable_entries_are_parameters_once_and_statistics_by_policy():
    parameters = ("encoder.weight", "encoder.bias", "middle.weight", "middle.bias", "decoder.bias")
    assert movable_entries(TiedNet(), "interpolate") == parameters
    conv = IMAGES.model()
    statistics = ("bn1.running_mean", "bn1.running_var", "bn2.running_mean", "bn2.running_var")
    parameters = tuple(name for name, _ in conv.named_parameters())
    assert set(movable_entries(conv, "interpolate")) == {*parameters, *statistics}
    in_order = tuple(name for name in conv.state_dict() if "num_batches" not in name)
    assert movable_entries(conv, "interpolate") == in_order
    assert movable_entries(conv, "batch") == movable_entries(conv, "recalibrate") == parameters


def test_leaves_are_new_and_leave_the_state_alone():
    state = {"a": torch.ones(2), "b": torch.ones(2, requires_grad=True) * 2}
    leaves = as_leaves(state)
    assert all(leaf.is_leaf and leaf.requires_grad for leaf in leaves.values())
    assert not state["a"].requires_grad
    torch.testing.assert_close(leaves, state, rtol=0, atol=0)


def test_what_is_no_network_is_refused(untyped):
    with pytest.raises(UnsupportedModelError, match="model is a mapping.*expected a torch.nn.Module. Load a"):
        Objective(VECTORS.model().state_dict(), [])
    with pytest.raises(UnsupportedModelError, match="model_b is an object of type int; expected a torch.nn.Module"):
        Segment(VECTORS.model(), 3)


def test_the_type_of_a_mixed_network_holds_all_its_entries():
    mixed = nn.Sequential(nn.Linear(5, 4).bfloat16(), nn.Linear(4, 3))
    assert Objective(mixed, []).dtype == torch.float32


# --- Wrappers, and what is computed from entries


def _plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def _compiled_in_place(network):
    network.compile(backend="eager")
    return network


WRAPPERS = {
    "data parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "compiled": lambda network: torch.compile(network, backend="eager"),
    "compiled and parallel": lambda network: nn.DataParallel(torch.compile(network, backend="eager")),
    "compiled in place": _compiled_in_place,
    "parts": lambda n: nn.Sequential(torch.compile(n[0], backend="eager"), n[1], nn.DataParallel(n[2])),
    "checkpoint wrapper": lambda n: nn.Sequential(checkpoint_wrapper(n[0]), n[1], n[2]),
}


@pytest.mark.check(after=2)
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_networks_are_the_networks_inside(wrap):
    batch = (torch.randn(9, 4).double(), torch.arange(9) % 3)
    plain = _plain()
    expected = HessianOperator(Objective(plain, [batch])).to_dense()
    network = wrap(_plain())
    before = list(network.state_dict())
    objective = Objective(network, [batch])
    assert list(objective.state()) == list(plain.state_dict())
    torch.testing.assert_close(HessianOperator(objective).to_dense(), expected, rtol=0, atol=0)
    assert list(network.state_dict()) == before


def test_a_network_without_wrappers_is_itself():
    network = _plain()
    assert unwrap(network) is network
    shared = nn.DataParallel(network[0])
    found = unwrap(nn.ModuleList([shared, shared]))
    assert found[0] is found[1] is network[0]


@pytest.mark.parametrize("kind", ["pruned", "pruned twice", "weight norm", "spectral norm"])
def test_entries_that_hooks_compute_others_from_are_differentiated(kind):
    network, x = _plain(), torch.randn(9, 4).double()
    if kind.startswith("pruned"):
        prune.l1_unstructured(network[0], "weight", 0.4)
        if kind == "pruned twice":
            prune.random_unstructured(network[0], "weight", 0.2)
    else:
        {"weight norm": nn.utils.weight_norm, "spectral norm": nn.utils.spectral_norm}[kind](network[0])
        network(x)
        network.eval()
    batch = (x, torch.arange(9) % 3)
    objective = Objective(network, [batch])
    assert objective.loss() == pytest.approx(F.cross_entropy(network(x), batch[1]).item(), rel=1e-12)
    direction = {name: torch.randn_like(tensor) for name, tensor in objective.state().items()}
    gradient = objective.gradient()
    found = sum(float((gradient[name] * tensor).sum()) for name, tensor in direction.items())
    h = 1e-6
    ahead, back = (objective.loss({n: t + s * h * direction[n] for n, t in objective.state().items()}) for s in (1, -1))
    assert found == pytest.approx((ahead - back) / (2 * h), rel=1e-6)
    assert set(network.state_dict()) == {*objective.state(), *(n for n, _ in network.named_buffers())}


def test_half_precision_is_computed_in_single_precision_and_said():
    network = _plain().bfloat16()
    batch = (torch.randn(9, 4).bfloat16(), torch.arange(9) % 3)
    objective = Objective(network, [batch])
    assert objective.dtype == torch.float32
    assert objective.notes == ("computed in float32, of entries in bfloat16",)
    assert Objective(network.double(), [batch]).notes == ()


@pytest.mark.check
@pytest.mark.parametrize(("dtype", "percent"), [(torch.bfloat16, "0.39%"), (torch.float16, "0.049%")])
def test_half_precision_that_was_asked_for_is_said_with_its_rounding(dtype, percent):
    note = f"computed in {str(dtype).removeprefix('torch.')}, which rounds every number by up to {percent}"
    for network, expected in ((_plain().to(dtype), note), (_plain(), note), (_plain().double(), note)):
        assert Objective(network, [], dtype=dtype).notes == (expected,)
    numbers = torch.linspace(1, 2, 10_001, dtype=torch.float64)
    worst = float((numbers.to(dtype).double() / numbers - 1).abs().max()) * 100
    assert worst == pytest.approx(float(percent.rstrip("%")), rel=0.05)
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    of = f"computed in {str(dtype).removeprefix('torch.')}, of entries in {str(other).removeprefix('torch.')}, which"
    assert Objective(_plain().to(other), [], dtype=dtype).notes[0].startswith(of)
    pair, batches = (
        [_plain(), nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()],
        [(torch.randn(9, 4), torch.arange(9) % 3)],
    )
    for compute in (predict_barrier, measure_barrier):
        assert note in str(compute(*pair, batches, dtype=dtype, progress=False))
        assert "rounds" not in str(compute(*pair, batches, dtype=torch.float32, progress=False))


# --- Entries that differ between training and evaluation mode


class Adapter(nn.Linear):
    """An update of low rank, merged in place into the weight in evaluation mode, as loralib does."""

    def __init__(self, inputs, outputs, scale=0.7):
        super().__init__(inputs, outputs)
        self.down = nn.Parameter(torch.randn(2, inputs) / 2)
        self.up = nn.Parameter(torch.randn(outputs, 2) / 2)
        self.scale, self.merged = scale, False

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            self.weight.data += (-1 if mode else 1) * self.scale * self.up @ self.down
            self.merged = not mode
        return self

    def forward(self, x):
        out = super().forward(x)
        return out if self.merged else out + self.scale * x @ self.down.T @ self.up.T


class Folded(nn.Module):
    """A linear layer and a factor for its outputs, which is folded into its weight in evaluation mode."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear, self.factor = nn.Linear(inputs, outputs), nn.Parameter(1 + torch.rand(outputs, 1))

    @torch.no_grad()
    def train(self, mode=True):
        if mode != self.training:
            self.linear.weight *= 1 / self.factor if mode else self.factor
        return super().train(mode)

    def forward(self, x):
        return F.linear(x, self.linear.weight * self.factor if self.training else self.linear.weight, self.linear.bias)


def _by_mode(kind, seed, mode):
    torch.manual_seed(seed)
    network = nn.Sequential(kind(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double().eval()
    network(torch.randn(3, 4).double())
    return network.train(mode)


MERGED = pytest.mark.parametrize("kind", [Adapter, Folded])


@pytest.mark.check(after=1)
@MERGED
@pytest.mark.parametrize("mode", [False, True])
@pytest.mark.parametrize("wrap", [lambda network: network, nn.DataParallel, AveragedModel])
def test_ends_are_the_networks_in_evaluation_mode(kind, mode, wrap):
    x, y = torch.randn(12, 4).double(), torch.arange(12) % 3
    models = [wrap(_by_mode(kind, seed, mode)) for seed in (0, 1)]
    expected = [F.cross_entropy(_by_mode(kind, seed, False)(x), y).item() for seed in (0, 1)]
    with untouched(*models):
        prediction = predict_barrier(*models, [(x, y)], progress=False)
        measurement = measure_barrier(*models, [(x, y)], alphas=3, progress=False)
        segment = Segment(*models)
    assert [end.loss for end in prediction.endpoints] == pytest.approx(expected, rel=1e-12)
    assert measurement.ends() == pytest.approx(expected, rel=1e-12)
    found = [Objective(models[0], [(x, y)]).loss(state) for state in (segment.start, segment.end)]
    assert found == pytest.approx(expected, rel=1e-12)


@MERGED
@pytest.mark.parametrize("batch_norm", ["interpolate", "batch"])
def test_derivatives_are_those_of_the_network_in_evaluation_mode(kind, batch_norm):
    x, y = torch.randn(12, 4).double(), torch.arange(12) % 3
    trained, evaluated = (_by_mode(kind, 0, mode) for mode in (True, False))
    with untouched(trained):
        found = HessianOperator(Objective(trained, [(x, y)], batch_norm=batch_norm)).to_dense()
    evaluated[1].train(batch_norm == "batch")
    names = list(Objective(evaluated, [], batch_norm=batch_norm).state())
    state = {name: tensor.detach().clone() for name, tensor in evaluated.state_dict().items()}

    def loss(*entries):
        at = {**state, **dict(zip(names, entries, strict=True))}
        mean, variance = (at[f"1.running_{kind}"] for kind in ("mean", "var"))
        first = "0." if "0.weight" in at else "0.linear."
        h = F.linear(x, at[f"{first}weight"], at[f"{first}bias"])
        if batch_norm == "batch":
            mean, variance = h.mean(0), h.var(0, unbiased=False)
        h = torch.tanh((h - mean) / (variance + 1e-5).sqrt() * at["1.weight"] + at["1.bias"])
        return F.cross_entropy(F.linear(h, at["3.weight"], at["3.bias"]), y)

    blocks = torch.autograd.functional.hessian(loss, tuple(state[name] for name in names))
    sizes = [state[name].numel() for name in names]
    rows = [[b.reshape(n, m) for b, m in zip(row, sizes, strict=True)] for row, n in zip(blocks, sizes, strict=True)]
    expected = torch.cat([torch.cat(row, 1) for row in rows])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@MERGED
def test_a_network_in_evaluation_mode_is_not_copied(kind):
    network = _by_mode(kind, 0, False)
    assert unwrap(network) is network
    assert unwrap(network.train()) is not network
    plain = _plain().train()
    assert unwrap(plain) is plain


class Sums(nn.Linear):
    """Merges again at every call of eval(), and cannot do so without values of its own."""

    def train(self, mode=True):
        self.weight.data += 1
        return super().train(mode)


def test_a_change_of_mode_that_does_not_bear_repetition_is_refused():
    with pytest.raises(
        UnsupportedModelError, match=r"Sums cannot be put into evaluation mode \(RuntimeError: .*a flag"
    ):
        Objective(Sums(4, 3), [])


def test_a_closure_over_a_network_that_changes_by_mode_is_refused():
    network = _by_mode(Adapter, 0, True)
    inner = network[3].forward
    network[3].forward = lambda x: inner(x)
    with pytest.raises(UnsupportedModelError, match=r"entry '3.(weight|bias)' of the network itself"):
        Objective(network, [(torch.randn(9, 4).double(), torch.arange(9) % 3)]).loss()


# --- Compiled methods


def _compile_forward(network):
    network.forward = torch.compile(network.forward, backend="eager")
    return network


def _compile_parts(network):
    for part in (network[0], network[2]):
        part.forward = torch.compile(part.forward, backend="eager")
    return network


def _compile_parts_and_whole(network):
    return _compile_forward(_compile_parts(network))


class Method(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network
        self.call = torch.compile(self.block, backend="eager")
        self.inner = torch.compile(network.forward, backend="eager")

    def block(self, x):
        return self.inner(x)

    def forward(self, x):
        return self.call(x)


@pytest.mark.check(after=1)
@pytest.mark.parametrize(
    "wrap",
    [
        _compile_forward,
        _compile_parts,
        _compile_parts_and_whole,
        Method,
        lambda network: Method(nn.DataParallel(network)),
        lambda network: _compile_forward(nn.Sequential(*_compile_parts(network), nn.DataParallel(nn.Identity()))),
    ],
)
def test_compiled_methods_are_the_methods(wrap):
    batch = (torch.randn(9, 4).double(), torch.arange(9) % 3)
    plain, network = _plain(), wrap(_plain())
    with untouched(network):
        found = HessianOperator(Objective(network, [batch])).to_dense()
    torch.testing.assert_close(found, HessianOperator(Objective(plain, [batch])).to_dense(), rtol=0, atol=0)
    ends = measure_barrier(network, wrap(_plain()), [batch], progress=False).ends()
    assert ends == pytest.approx([Objective(plain, [batch]).loss()] * 2)


def test_a_function_around_a_compiled_one_is_kept():
    network = _plain()
    compiled = torch.compile(network.forward, backend="eager")
    network.forward = functools.wraps(compiled)(lambda x: 2 * compiled(x))
    with pytest.raises(UnsupportedModelError, match="of the network itself"):
        Objective(network, [(torch.randn(9, 4).double(), torch.arange(9) % 3)]).loss()


class _Standardizing(nn.DataParallel):
    def forward(self, *inputs):
        return super().forward(*((x - 0.5) / 0.25 for x in inputs))


class _Tempered(AveragedModel):
    def forward(self, x):
        return super().forward(x) / 3


class _Shifted(nn.Module):
    """Calls its child as torch's wrappers call theirs, and has an entry of its own."""

    def __init__(self, network, name):
        super().__init__()
        self.add_module(name, network)
        self.name, self.shift = name, nn.Parameter(torch.ones(3).double())

    def forward(self, x):
        return 2 * getattr(self, self.name)(x) + self.shift


COMPUTING = {
    "data parallel": _Standardizing,
    "averaged": _Tempered,
    "like a compiled one": lambda network: _Shifted(network, "_orig_mod"),
    "like a checkpointed one": lambda network: _Shifted(network, "_checkpoint_wrapped_module"),
    "a part": lambda network: nn.Sequential(_Standardizing(network[0]), *network[1:]),
}


@pytest.mark.parametrize("wrap", COMPUTING.values(), ids=COMPUTING)
def test_a_wrapper_that_computes_is_part_of_the_network(wrap):
    x, y = torch.randn(9, 4).double(), torch.arange(9) % 3
    network = wrap(_plain())
    expected = torch.nn.functional.cross_entropy(network(x), y).item()
    objective = Objective(network, [(x, y)])
    assert objective.loss() == pytest.approx(expected, rel=1e-12)
    assert objective.state().keys() == dict(network.named_parameters()).keys()


@pytest.mark.parametrize("wrap", [WRAPPERS[name] for name in ("data parallel", "averaged", "compiled")])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_a_wrapper_are_not_lost(wrap, register):
    wrapper = wrap(_plain())
    getattr(wrapper, register)(lambda _module, args, *output: None)
    with pytest.raises(UnsupportedModelError, match="Hooks are registered on .* register them on the network"):
        Objective(wrapper, [(torch.randn(9, 4).double(), torch.arange(9) % 3)])
