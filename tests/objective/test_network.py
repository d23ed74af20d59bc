"""Claim: a network is known by its entries and its structure, and one that cannot move is refused at once."""

import pytest
import torch
from torch import nn

from lmc_curvature import Objective, Segment
from lmc_curvature.errors import UnsupportedModelError
from lmc_curvature.objective.network import as_leaves, movable_entries
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
