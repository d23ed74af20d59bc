"""Claim: a normalisation belongs to the weights right before it, and where it normalises an input, to what it feeds."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lmc_curvature import LayerPartition
from lmc_curvature.segment.norms import weights_of_norms


def _modules(**children):
    """A module with these children, registered in this order."""
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def _linear():
    return nn.Linear(2, 2)


def _norm():
    return nn.LayerNorm(2)


class LlamaRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


class NormedBlock(nn.Sequential):
    """Has a norm in its name and is none."""


@pytest.mark.parametrize(
    ("modules", "joined"),
    [
        # Right after the weights.
        ([_linear(), _norm()], {"1": "0"}),
        ([_linear(), nn.ReLU(), nn.GroupNorm(1, 2)], {"2": "0"}),
        ([_linear(), LlamaRMSNorm()], {"1": "0"}),
        ([_linear(), _norm(), _norm()], {"1": "0"}),
        ([_linear(), nn.BatchNorm1d(2, affine=False)], {"1": "0"}),
        ([_linear(), _linear(), nn.InstanceNorm1d(2, affine=True)], {"2": "1"}),
        ([weight_norm(_linear()), _norm()], {"1": "0"}),
        ([_linear(), weight_norm(nn.Conv1d(3, 3, 1, bias=False)), nn.BatchNorm1d(3)], {"2": "1"}),
        ([_linear(), nn.Sequential(_norm())], {"1.0": "0"}),
        # Before them.
        ([_norm(), _linear()], {"0": "1"}),
        ([nn.BatchNorm1d(2, affine=False), _linear()], {"0": "1"}),
        ([nn.Identity(), _norm(), nn.ReLU(), weight_norm(_linear())], {"1": "3"}),
        ([_norm(), _linear(), _norm(), _linear(), _norm()], {"0": "1", "2": "3", "4": "3"}),
        ([_linear(), NormedBlock(_norm(), _linear())], {"1.0": "1.1"}),
        ([nn.Sequential(_norm()), _linear()], {"0.0": "1"}),
        ([_norm(), _norm(), _linear()], {"1": "2"}),
        ([_norm(), _norm(), _linear(), _linear()], {"0": "2", "1": "3"}),
        # Without weights or statistics, it says nothing of its parent.
        ([nn.LayerNorm(2, elementwise_affine=False), _linear(), _norm()], {"2": "1"}),
        ([_norm()], {}),
    ],
)
def test_which_norms_join_which_weights(modules, joined):
    assert weights_of_norms(nn.Sequential(*modules)) == joined


def _gpt(blocks=2):
    """Named as GPT-2 names its modules."""
    block = [
        _modules(
            ln_1=_norm(),
            attn=_modules(c_attn=_linear(), c_proj=_linear()),
            ln_2=_norm(),
            mlp=_modules(c_fc=_linear(), act=nn.GELU(), c_proj=_linear()),
        )
        for _ in range(blocks)
    ]
    parts = {"wte": nn.Embedding(5, 2), "drop": nn.Dropout(), "h": nn.ModuleList(block), "ln_f": _norm()}
    return _modules(transformer=_modules(**parts), lm_head=_linear())


def _holders(partition, layer):
    return {entry.rpartition(".")[0] for entry in partition.entries(layer)}


def test_in_blocks_like_gpt2_moving_one_moves_no_norm_of_another():
    partition = LayerPartition.of(_gpt())
    for number in (0, 1):
        block = f"transformer.h.{number}"
        assert _holders(partition, f"{block}.attn.c_attn") == {f"{block}.ln_1", f"{block}.attn.c_attn"}
        assert _holders(partition, f"{block}.mlp.c_fc") == {f"{block}.ln_2", f"{block}.mlp.c_fc"}
    assert _holders(partition, "transformer.h.0.mlp.c_proj") == {"transformer.h.0.mlp.c_proj"}
    assert _holders(partition, "transformer.h.1.mlp.c_proj") == {"transformer.h.1.mlp.c_proj", "transformer.ln_f"}
    assert _holders(partition, "lm_head") == {"lm_head"}


ATTENTION = {"num_attention_heads": 2, "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16}


def _transformers(name, **options):
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**options))


def test_norms_of_transformers_own_networks():
    gpt2 = weights_of_norms(_transformers("GPT2", n_layer=2, n_embd=8, n_head=2, vocab_size=20))
    expected = {f"h.{n}.ln_1": f"h.{n}.attn.c_attn" for n in (0, 1)}
    expected |= {f"h.{n}.ln_2": f"h.{n}.mlp.c_fc" for n in (0, 1)} | {"ln_f": "h.1.mlp.c_proj"}
    assert gpt2 == expected
    # Registered after what they feed.
    llama = weights_of_norms(_transformers("Llama", **ATTENTION, num_key_value_heads=2, vocab_size=20))
    assert llama["layers.1.input_layernorm"] == "layers.1.self_attn.q_proj"
    assert llama["layers.1.post_attention_layernorm"] == "layers.1.mlp.gate_proj"
    assert llama["norm"] == "layers.1.mlp.down_proj"
    # Side by side, before both.
    neox = weights_of_norms(_transformers("GPTNeoX", **ATTENTION, vocab_size=20))
    assert neox["layers.1.input_layernorm"] == "layers.1.attention.query_key_value"
    assert neox["layers.1.post_attention_layernorm"] == "layers.1.mlp.dense_h_to_4h"
    # After the sum.
    bert = weights_of_norms(_transformers("Bert", **ATTENTION, vocab_size=20))
    assert bert["encoder.layer.0.attention.output.LayerNorm"] == "encoder.layer.0.attention.output.dense"
    assert bert["encoder.layer.0.output.LayerNorm"] == "encoder.layer.0.output.dense"


def test_torchs_own_layers_say_what_their_norms_feed():
    with torch.device("meta"):
        encoders = {first: nn.TransformerEncoderLayer(8, 2, 16, norm_first=first) for first in (True, False)}
        decoder = nn.TransformerDecoderLayer(8, 2, 16, norm_first=True)
    assert weights_of_norms(encoders[True]) == {"norm1": "self_attn", "norm2": "linear1"}
    assert weights_of_norms(encoders[False]) == {"norm1": "linear2"}
    assert weights_of_norms(decoder) == {"norm1": "self_attn", "norm2": "multihead_attn", "norm3": "linear1"}


def test_norms_between_what_they_feed_are_told_by_norm_first():
    block = _modules(attn=_linear(), norm1=_norm(), fc1=_linear(), fc2=_linear(), norm2=_norm())
    assert weights_of_norms(block) == {"norm1": "attn", "norm2": "fc2"}
    block.norm_first = True
    assert weights_of_norms(block) == {"norm1": "attn", "norm2": "fc1"}


def test_the_last_norm_of_a_stack_that_says_norm_first_follows_its_last_block():
    with torch.device("meta"):
        blocks = [nn.TransformerEncoderLayer(8, 2, 16, norm_first=True) for _ in range(2)]
        stack = _modules(layers=nn.ModuleList(blocks), norm=nn.LayerNorm(8))
    stack.norm_first = True
    assert weights_of_norms(stack)["norm"] == "layers.1.linear2"


def test_a_switch_that_is_no_truth_says_nothing():
    block = _modules(attn=_linear(), norm_first=_norm(), fc=_linear())
    assert weights_of_norms(block) == {"norm_first": "attn"}


def test_norms_of_shared_blocks_have_the_name_of_their_first_place():
    block = _modules(norm=_norm(), fc=_linear())
    network = nn.Sequential(_linear(), block, nn.Sequential(block, _norm()))
    assert weights_of_norms(network) == {"1.norm": "1.fc", "2.1": "1.fc"}


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        ("swin_t", {"features.1.1.norm1": "features.1.1.attn", "features.1.1.norm2": "features.1.1.mlp.0"}),
        # The convolution between two stages is normalised before.
        ("convnext_tiny", {"features.1.0.block.2": "features.1.0.block.0", "features.2.0": "features.2.1"}),
        ("resnet18", {"layer1.0.bn1": "layer1.0.conv1", "layer2.0.downsample.1": "layer2.0.downsample.0"}),
    ],
)
def test_norms_of_torchvisions_blocks(make, expected):
    with torch.device("meta"):
        joined = weights_of_norms(getattr(torchvision.models, make)())
    assert {norm: joined[norm] for norm in expected} == expected
