"""Claim: two low-rank adapters are not moved factor by factor; their updates are."""

import copy

import pytest
import torch
from torch import nn

from lmc_curvature import Segment, measure_barrier, predict_barrier
from lmc_curvature.errors import UnsupportedModelError


class Adapted(nn.Module):
    """A linear layer with adapters named as PEFT names them."""

    def __init__(self, names=("lora_A", "lora_B")):
        super().__init__()
        self.base_layer = nn.Linear(3, 3)
        for name, shape in zip(names, [(3, 2), (2, 3)], strict=True):
            self.add_module(name, nn.ModuleDict({"default": nn.Linear(*shape, bias=False)}))
        self.names = names

    def forward(self, x):
        first, second = (getattr(self, name)["default"] for name in self.names)
        return self.base_layer(x) + second(first(x))

    def merged(self):
        first, second = (getattr(self, name)["default"].weight for name in self.names)
        layer = copy.deepcopy(self.base_layer)
        with torch.no_grad():
            layer.weight += second @ first
        return layer


class LoraLinear(nn.Linear):
    """As loralib has them: parameters of the layer itself."""

    def __init__(self):
        super().__init__(3, 3)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(3, 2))


class LoraEmbedding(nn.Embedding):
    """As PEFT has them: in dictionaries of parameters."""

    def __init__(self):
        super().__init__(4, 3)
        self.lora_embedding_A = nn.ParameterDict({"default": nn.Parameter(torch.randn(2, 4))})
        self.lora_embedding_B = nn.ParameterDict({"default": nn.Parameter(torch.randn(3, 2))})


BATCHES = [(torch.randn(6, 3, generator=torch.Generator().manual_seed(5)), torch.tensor([0, 1, 2, 0, 1, 2]))]


@pytest.mark.parametrize(
    ("make", "pair"),
    [
        (Adapted, "lora_A.default.weight and lora_B.default.weight"),
        (lambda: Adapted(("lora_a", "lora_b")), "lora_a.default.weight and lora_b.default.weight"),
        (lambda: Adapted(("lora_down", "lora_up")), "lora_down.default.weight and lora_up.default.weight"),
        (lambda: nn.Sequential(LoraLinear()), "0.lora_A and 0.lora_B"),
        (LoraEmbedding, "lora_embedding_A.default and lora_embedding_B.default"),
    ],
)
@pytest.mark.parametrize("layers", ["fused", "tensor", {"all": ".*"}])
def test_factors_that_both_move_are_refused(make, pair, layers):
    with pytest.raises(UnsupportedModelError, match=f"{pair} are the factors.*merge_and_unload"):
        Segment(make(), make(), layers=layers)


@pytest.mark.parametrize("compute", [predict_barrier, measure_barrier])
def test_predictions_and_measurements_refuse_them_before_the_data_are_read(compute):
    def batches():
        raise AssertionError("the data were read")
        yield

    with pytest.raises(UnsupportedModelError, match="low-rank update"):
        compute(Adapted(), Adapted(), batches(), progress=False)


def test_all_pairs_are_counted():
    networks = [nn.Sequential(Adapted(), Adapted(), Adapted()) for _ in range(2)]
    with pytest.raises(UnsupportedModelError, match=r"both move \(and 2 other pairs\)"):
        Segment(*networks)


def test_merged_adapters_move_as_the_update():
    networks = [Adapted(), Adapted()]
    networks[1].base_layer.load_state_dict(networks[0].base_layer.state_dict())
    merged = [network.merged() for network in networks]
    found = Segment(*merged).point(0.5)["weight"]
    updates = [m.weight - n.base_layer.weight for m, n in zip(merged, networks, strict=True)]
    assert torch.allclose(found, networks[0].base_layer.weight + sum(updates) / 2, atol=1e-6)
    assert not torch.allclose(found, networks[0].base_layer.weight, atol=1e-2)


@pytest.mark.parametrize("same", ["lora_A", "lora_B"])
def test_with_one_factor_in_common_the_update_moves_straight(same):
    networks = [Adapted(), Adapted()]
    getattr(networks[1], same).load_state_dict(getattr(networks[0], same).state_dict())
    middle = Segment(*networks).point(0.5)
    halfway = copy.deepcopy(networks[0])
    halfway.load_state_dict(middle)
    mean = sum(network.merged().weight for network in networks) / 2
    assert torch.allclose(halfway.merged().weight, mean, atol=1e-6)


def test_frozen_factors_do_not_move():
    assert "lora_A.default" not in Segment(Adapted(), Adapted(), frozen="lora_A").layers


def test_a_name_without_its_partner_is_no_adapter():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.explora_B = nn.Linear(2, 2)
            self.lora_Alone = nn.Linear(2, 2)

    assert len(Segment(Plain(), Plain()).layers) == 2
