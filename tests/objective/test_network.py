"""Claim: a network is known by its entries and its structure, and one that cannot move is refused at once."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

from lmc_curvature import HessianOperator, Objective, Segment
from lmc_curvature.errors import UnsupportedModelError
from lmc_curvature.objective.network import as_leaves, movable_entries, unwrap
from tests.support.cases import TiedNet
from tests.support.networks import NETWORKS, joined, plain_loss

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
    assert Objective(network, [batch], dtype=torch.bfloat16).notes == ()
    assert Objective(network.double(), [batch]).notes == ()
