"""Networks that are spread over processes are refused by every function, before one rank waits for another."""

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
from lmc_curvature.errors import UnsupportedModelError
from lmc_curvature.objective.sharding import sharded_part
from tests.support.ranks import crew


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
    "predict, differences": lambda *args: predict_barrier(*args, method="differences", group="world"),
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
def test_sharded_networks_are_refused_on_all_ranks_and_whole_ones_are_what_they_were():
    with crew(2) as ranks:
        for found in ranks.run(_what_is_said):
            assert found.pop("after a pass").startswith("Parameter '3.0.weight'")
            assert set(found) == set(CALLS)
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
