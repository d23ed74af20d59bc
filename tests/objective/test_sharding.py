"""Networks that are spread over processes: predicted by differences, and refused by all else before a rank waits."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lmc_curvature import (
    LayerPartition,
    Objective,
    Segment,
    measure_barrier,
    measure_barriers,
    merge,
    predict_barrier,
    predict_barriers,
)
from lmc_curvature.errors import LMCCurvatureError, UnsupportedModelError
from lmc_curvature.objective.gathering import gathering
from lmc_curvature.objective.network import graph_nodes
from lmc_curvature.objective.sharding import sharded_part
from tests.support.ranks import crew


@pytest.fixture(scope="module")
def ranks():
    with crew(2) as both:
        yield both


def _networks():
    networks = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        inner = nn.Sequential(nn.Linear(5, 7), nn.Tanh())
        networks.append(nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), inner, nn.Linear(7, 3)).double())
    return networks


def _sharded():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    networks = _networks()
    for network in networks:
        fully_shard(network[3], mesh=mesh)
        fully_shard(network, mesh=mesh)
    return networks


def _batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 6, generator=generator).double(), torch.arange(8) % 3) for _ in range(3)]


CALLS = {
    "predict": predict_barrier,
    "measure": measure_barrier,
    "predict many": lambda one, other, loader: predict_barriers([one, other], loader),
    "measure many": lambda one, other, loader: measure_barriers([one, other], loader),
    "merge": lambda one, other, loader: merge(one, other, 0.5),
    "segment": lambda one, other, loader: Segment(one, other),
    "partition": lambda one, other, loader: LayerPartition.of(one),
    "objective": lambda one, other, loader: Objective(one, loader),
    "second network": lambda one, other, loader: Segment(_networks()[0], other),
}


def _what_is_said(rank):
    networks, found = _sharded(), {}
    for name, call in CALLS.items():
        try:
            call(*networks, _batches())
        except UnsupportedModelError as error:
            found[name] = str(error)
    # After a pass the outermost module holds whole parameters for a while.
    networks[0](_batches()[0][0])
    found["after a pass"] = sharded_part(networks[0])
    return found


class _Attending(nn.Module):
    """Parameters of a part are used by the module around it; one operation has no second derivative."""

    def __init__(self):
        super().__init__()
        self.bag, self.norm = nn.EmbeddingBag(11, 6), nn.BatchNorm1d(6)
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, words):
        hidden = torch.stack([self.norm(self.bag(words[:, half])) for half in (slice(4), slice(4, 8))], dim=1)
        return self.head(torch.tanh(self.attention(hidden, hidden, hidden)[0]).mean(1))


def _attending():
    networks = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        network = _Attending().double().eval()
        network.norm.running_mean.normal_(std=0.3)
        networks.append(network)
    return networks


def _words():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randint(11, (6, 8), generator=generator), torch.arange(6) % 3) for _ in range(2)]


def _predict(networks, loader, method="differences", **options):
    found = predict_barrier(*networks, loader, method=method, anchors=2, progress=False, **options)
    numbers = [found.barrier(), found.standard_error(), found.cosine, *found.layer_barriers(), *found.distances]
    return [*numbers, *found.errors], found.notes


def _sharded_attending():
    networks, mesh = _attending(), init_device_mesh("cpu", (dist.get_world_size(),))
    for network in networks:
        fully_shard(network.attention, mesh=mesh)
        fully_shard(network, mesh=mesh)
    return networks


# Of few layers: every gather waits for all ranks.
ALL = {"all": [".*"]}

# Networks, their sharded form, batches and options.
PREDICTIONS = {
    "differences": (_attending, _sharded_attending, _words, {"layers": {"bag": ["bag.*"], "others": [".*"]}}),
    "losses": (_networks, _sharded, _batches, {"layers": ALL}),
}


def _predict_sharded(rank, method):
    _, make, data, options = PREDICTIONS[method]
    networks, batches = make(), data()
    before = [parameter.to_local().clone() for parameter in networks[0].parameters()]
    networks[1](batches[0][0])
    # Ranks of a job seldom have the same generators.
    torch.manual_seed(rank)
    found = _predict(networks, batches, method, **options)
    assert all(torch.equal(p.to_local(), was) for p, was in zip(networks[0].parameters(), before, strict=True))
    networks[0](batches[0][0]).sum().backward()
    return found


@pytest.mark.check
@pytest.mark.parametrize("method", PREDICTIONS)
def test_sharded_networks_are_predicted_by_differences(ranks, method):
    make, _, data, options = PREDICTIONS[method]
    expected, notes = _predict(make(), data(), method, **options)
    (numbers, said), other = ranks.run(_predict_sharded, method)
    assert (numbers, said) == other
    assert [note.partition(" by about")[0] for note in said] == [note.partition(" by about")[0] for note in notes]
    np.testing.assert_allclose(numbers, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.check
def test_the_graph_of_a_sharded_network_holds_no_whole_matrix(ranks):
    assert ranks.run(_graph_of_a_pass) == [[], []]


@pytest.mark.check
@pytest.mark.parametrize("name", ["auto", "group", "batches", "lengths", "one"])
def test_what_sharded_networks_cannot_do_is_told_on_all_ranks(ranks, name):
    assert all(REFUSED[name] in said for said in ranks.run(_refused, name))


def _graph_of_a_pass(rank):
    """Whole matrices that the graph of a loss holds."""
    networks = _sharded()
    with gathering(*networks, method="differences", group=None) as (network, _):
        loss = network(_batches()[0][0]).sum()
        shapes = {p.shape for p in network.parameters() if p.ndim > 1}
        held = []
        for node in graph_nodes([loss]):
            saved = [getattr(node, n) for n in dir(node) if n.startswith("_raw_saved") and n != "_raw_saved_tensors"]
            held += [each.data for each in saved if isinstance(each.data, torch.Tensor)]
        loss.backward()
        assert all(p.grad is not None for p in network.parameters())
        return [tuple(h.shape) for h in held if h.shape in shapes or (h.ndim > 1 and h.mT.shape in shapes)]


class _Failing:
    def __iter__(self):
        yield from _batches()[:1]
        raise OSError("the disk is gone")


REFUSED = {
    "auto": "and such networks are not differentiated twice, as by method='auto': predict with method='differences'",
    "group": "on the same batches. Leave group out.",
    "batches": "The ranks' loaders yield different batches (batch 0)",
    "lengths": "The ranks' loaders yield different batches (batch 2)",
    "one": "Parameter '0.weight' is spread over several processes, and the library",
}


def _refused(rank, name):
    networks, loader, options = _sharded(), _batches(), {"method": "differences", "layers": ALL}
    if name == "auto":
        options = {}
    elif name == "group":
        options |= {"group": "world"}
    elif name == "batches":
        loader = loader[rank:] + loader[:rank]
    elif name == "lengths":
        loader = loader[: 3 - rank]
    elif name == "one":
        networks[1] = _networks()[1]
    try:
        predict_barrier(*networks, loader, progress=False, **options)
    except LMCCurvatureError as error:
        return str(error)


def _with_a_failing_loader(rank):
    loader = _Failing() if rank else _batches()
    try:
        predict_barrier(*_sharded(), loader, method="differences", layers=ALL, progress=False)
    except Exception as error:  # noqa: BLE001
        return str(error)


@pytest.mark.check
def test_a_loader_that_fails_on_one_rank_ends_all(ranks):
    first, second = ranks.run(_with_a_failing_loader)
    assert first == "The loader of another rank failed: OSError: the disk is gone."
    assert second == "the disk is gone"


def _whole(rank):
    """The barrier that rank 0 predicts as the message tells."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    states = [get_model_state_dict(network, options=options) for network in _sharded()]
    if rank:
        return None
    networks = _networks()[::-1]
    for network, state in zip(networks, states, strict=True):
        network.load_state_dict(state)
    return predict_barrier(*networks, _batches(), progress=False).barrier()


@pytest.mark.check
def test_sharded_networks_are_refused_on_all_ranks_and_whole_ones_are_what_they_were(ranks):
    for found in ranks.run(_what_is_said):
        assert found.pop("after a pass").startswith("Parameter '3.0.weight'")
        assert set(found) == set(CALLS)
        assert found.pop("predict").endswith("predict with method='differences'.")
        for said in found.values():
            assert said.startswith("Parameter '0.weight' is spread over several processes")
            assert "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True" in said
    barrier, _ = ranks.run(_whole)
    assert barrier == pytest.approx(predict_barrier(*_networks(), _batches(), progress=False).barrier(), rel=1e-12)


def test_a_network_that_holds_whole_parameters_for_a_while_is_spread_all_the_same():
    class FSDPModule(nn.Linear):
        """Named as torch's."""

    FSDPModule.__module__ = "torch.distributed.fsdp"
    assert sharded_part(nn.Linear(2, 2)) == ""
    assert sharded_part(nn.Sequential(FSDPModule(2, 2))) == "Module '0'"
    with pytest.raises(UnsupportedModelError, match="^The network is spread over several processes"):
        Objective(FSDPModule(2, 2), _batches())
