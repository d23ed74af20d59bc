"""Claim: a partition holds every entry exactly once, grouped as its specification says."""

import re

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lmc_curvature import LayerPartition
from lmc_curvature.errors import PartitionError
from lmc_curvature.objective.network import movable_entries, tied_names
from lmc_curvature.segment.partition import layer_indices
from tests.support.cases import ConvNet, TiedNet
from tests.support.networks import NETWORKS, untouched


def _norm_entries(name):
    return tuple(f"{name}.{entry}" for entry in ("weight", "bias", "running_mean", "running_var"))


CONV = {
    "fused": {
        "conv1": ("conv1.weight", *_norm_entries("bn1")),
        "conv2": ("conv2.weight", *_norm_entries("bn2")),
        "fc": ("fc.weight", "fc.bias"),
    },
    "module": {
        "conv1": ("conv1.weight",),
        "bn1": _norm_entries("bn1"),
        "conv2": ("conv2.weight",),
        "bn2": _norm_entries("bn2"),
        "fc": ("fc.weight", "fc.bias"),
    },
    "tensor": {name: (name,) for name in movable_entries(ConvNet(), "interpolate")},
}


@pytest.mark.parametrize(("spec", "groups"), CONV.items())
def test_named_partitions_of_a_convolutional_network(spec, groups):
    model = ConvNet()
    with untouched(model):
        partition = LayerPartition.of(model, spec)
    assert dict(partition.groups) == groups
    assert partition.names == tuple(groups)
    for layer, entries in groups.items():
        assert partition.entries(layer) == entries
        assert {partition.layer_of(entry) for entry in entries} == {layer}


def test_the_default_is_fused():
    assert LayerPartition.of(ConvNet()) == LayerPartition.of(ConvNet(), "fused")


@pytest.mark.parametrize("policy", ["batch", "recalibrate"])
@pytest.mark.parametrize("spec", CONV)
def test_running_statistics_are_entries_only_where_they_move(spec, policy):
    partition = LayerPartition.of(ConvNet(), spec, batch_norm=policy)
    parameters = {
        layer: tuple(entry for entry in entries if "running_" not in entry) for layer, entries in CONV[spec].items()
    }
    assert dict(partition.groups) == {layer: entries for layer, entries in parameters.items() if entries}


def _on_meta(make):
    with torch.device("meta"):
        return make()


def test_resnet_joins_every_convolution_with_its_norm():
    model = _on_meta(torchvision.models.resnet18)
    partition = LayerPartition.of(model, "fused")
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 20
    assert partition.names == (*convolutions, "fc")
    for name in convolutions:
        norm = name.replace("downsample.0", "downsample.1").replace("conv", "bn")
        assert sorted(partition.entries(name)) == sorted((f"{name}.weight", *_norm_entries(norm)))


def test_densenet_joins_norms_with_the_convolution_that_they_feed():
    partition = LayerPartition.of(_on_meta(torchvision.models.densenet121), "fused")
    # 120 convolutions and the classifier.
    assert len(partition.names) == 121
    block = "features.denseblock1.denselayer"
    for norm, convolution in {
        "features.norm0": "features.conv0",
        f"{block}1.norm1": f"{block}1.conv1",
        f"{block}1.norm2": f"{block}1.conv2",
        f"{block}2.norm1": f"{block}2.conv1",
        "features.transition1.norm": "features.transition1.conv",
        # After it comes the pooling.
        "features.norm5": "features.denseblock4.denselayer16.conv2",
    }.items():
        assert {partition.layer_of(entry) for entry in _norm_entries(norm)} == {convolution}


def _vision_transformer():
    return torchvision.models.VisionTransformer(
        image_size=4, patch_size=2, num_layers=2, num_heads=1, hidden_dim=4, mlp_dim=4, num_classes=2
    )


def test_vision_transformer_layers():
    model = _on_meta(_vision_transformer)
    fused, block = LayerPartition.of(model), "encoder.layers.encoder_layer_"
    joined = {
        name: tuple(sorted({entry.removeprefix(block).rpartition(".")[0] for entry in fused.entries(name)}))
        for name in fused.names
    }
    attention = "0.self_attention"
    assert joined["class_token"] == ("",)
    assert joined["encoder"] == ("encoder",)
    assert joined[f"{block}{attention}"] == ("0.ln_1", attention)
    assert joined[f"{block}{attention}.out_proj"] == (f"{attention}.out_proj",)
    assert joined[f"{block}0.mlp.0"] == ("0.ln_2", "0.mlp.0")
    assert joined[f"{block}0.mlp.3"] == ("0.mlp.3",)
    assert joined[f"{block}1.mlp.3"] == ("1.mlp.3", "encoder.ln")
    assert joined["heads.head"] == ("heads.head",)
    assert len(fused.names) == 4 + 2 * 4

    assert LayerPartition.of(model, "module").layer_of("class_token") == "class_token"
    assert LayerPartition.of(model, "block").names == ("class_token", "conv_proj", "encoder", "heads")
    assert LayerPartition.of(model, "block:3").names == (
        *("class_token", "conv_proj", "encoder"),
        *(f"{block}0", f"{block}1"),
        *("encoder.ln", "heads.head"),
    )


def test_blocks_are_prefixes_of_the_modules_name():
    model = _on_meta(torchvision.models.resnet18)
    assert LayerPartition.of(model, "block") == LayerPartition.of(model, "block:1")
    stages = [f"layer{stage}" for stage in (1, 2, 3, 4)]
    assert LayerPartition.of(model, "block").names == ("conv1", "bn1", *stages, "fc")
    blocks = [f"{stage}.{index}" for stage in stages for index in (0, 1)]
    assert LayerPartition.of(model, "block:2").names == ("conv1", "bn1", *blocks, "fc")
    # A depth beyond all names is the partition by modules.
    assert LayerPartition.of(model, "block:99") == LayerPartition.of(model, "module")


def _entries(partition):
    return [entry for layer in partition.names for entry in partition.entries(layer)]


@pytest.mark.parametrize("spec", ["fused", "module", "block"])
def test_parametrised_weights_belong_to_their_module(spec):
    partition = LayerPartition.of(NETWORKS["weight norm"].model(), spec)
    originals = ("parametrizations.weight.original0", "parametrizations.weight.original1")
    assert dict(partition.groups) == {
        "0": ("0.bias", *(f"0.{name}" for name in originals)),
        "2": tuple(f"2.{name}" for name in originals),
    }


@pytest.mark.parametrize("spec", ["fused", "module", "block"])
def test_tied_parameters_belong_once_to_the_first_name(spec):
    assert dict(LayerPartition.of(TiedNet(), spec).groups) == {
        "encoder": ("encoder.weight", "encoder.bias"),
        "middle": ("middle.weight", "middle.bias"),
        "decoder": ("decoder.bias",),
    }
    assert tied_names(TiedNet()) == {"decoder.weight": "encoder.weight"}


# Mappings, functions, partitions


@pytest.mark.parametrize(
    ("patterns", "groups"),
    [
        (
            {"norms": ["bn"], "first": ["^conv1"], "rest": [".*"]},
            {
                "first": ("conv1.weight",),
                "norms": _norm_entries("bn1") + _norm_entries("bn2"),
                "rest": ("conv2.weight", "fc.weight", "fc.bias"),
            },
        ),
        (
            {"ends": ["^conv1", re.compile("FC", re.IGNORECASE)], "middle": "bn|conv2"},
            {
                "ends": ("conv1.weight", "fc.weight", "fc.bias"),
                "middle": (*_norm_entries("bn1"), "conv2.weight", *_norm_entries("bn2")),
            },
        ),
    ],
)
def test_the_first_pattern_that_matches_takes_the_entry(untyped, patterns, groups):
    found = LayerPartition.of(ConvNet(), patterns).groups
    assert {layer: sorted(entries) for layer, entries in found.items()} == {
        layer: sorted(entries) for layer, entries in groups.items()
    }


@given(st.lists(st.sampled_from("abcd"), min_size=13, max_size=13))
def test_a_function_covers_every_entry_exactly_once(letters):
    model = ConvNet()
    rule = dict(zip(movable_entries(model, "interpolate"), letters, strict=False))
    partition = LayerPartition.of(model, rule.__getitem__)
    assert sorted(_entries(partition)) == sorted(rule)
    for entry, layer in rule.items():
        assert partition.layer_of(entry) == layer
        assert entry in partition.entries(layer)
    assert partition.names == tuple(dict.fromkeys(rule.values()))
    assert LayerPartition.of(model, partition) == partition


def test_a_partition_keeps_its_own_order():
    groups = {"b": ("0.bias",), "a": ("0.weight",)}
    partition = LayerPartition.of(nn.Sequential(nn.Linear(2, 2)), LayerPartition(groups))
    assert partition.names == ("b", "a")
    assert dict(partition.groups) == groups


# Bad input


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fussed", "layers='fussed' is not a partition: did you mean 'fused'"),
        ("block:0", "layers='block:0' is not a partition: did you mean 'block'"),
        ("block:", "layers='block:' is not a partition"),
        ("xyz", "layers='xyz' is not a partition: choose from 'fused', 'module', 'tensor', 'block'"),
        (3, "layers=3 is not a partition: expected 'fused', .*'block:DEPTH', a mapping.*, or a function"),
        (
            {"convs": ["conv"], "fc": ["fc"]},
            "No layer matches 'bn1.weight', 'bn1.bias', .* and 3 more: .*'.\\*' for the",
        ),
        ({"most": ["^[^f]"]}, "No layer matches 'fc.weight', 'fc.bias': a partition covers every entry"),
        ({"all": ".*", "conv3": "conv3"}, r"Layer 'conv3' matches no entry that an earlier layer has not taken\.$"),
        ({"all": ".*", "late": "conv"}, r"Layer 'late' matches no entry that an earlier layer has not taken\.$"),
        ({"all": [".*"], "bad": ["fine", "(conv"]}, r"Layer 'bad' has a bad regular expression '\(conv': missing \)"),
        (lambda entry: 3, "partition function returned 3 for entry 'conv1.weight'; expected a string"),
        (lambda entry: None, "partition function returned None for entry 'conv1.weight'; expected a string"),
    ],
)
def test_bad_specifications_are_explained(untyped, spec, message):
    with pytest.raises(PartitionError, match=message):
        LayerPartition.of(ConvNet(), spec)


def test_a_pattern_for_the_second_name_of_a_tied_parameter_is_explained():
    patterns = {"head": ["^decoder.weight"], "rest": [".*"]}
    with pytest.raises(PartitionError, match=r"'head' matches no .*\('decoder.weight' is tied to 'encoder.weight'\)"):
        LayerPartition.of(TiedNet(), patterns)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"a": ("weight",)}, "The partition leaves out 'bias': it must cover each entry of the network once"),
        ({"a": ("weight", "bias"), "b": ("bias",)}, "The partition holds twice 'bias'"),
        ({"a": ("weight", "bias", "wait")}, "The partition has unknown 'wait'"),
        ({"a": ("weight", "bias"), "b": ()}, "The partition has no entry in layer 'b'"),
        ({"a": ("weight", "weight", "x")}, "holds twice 'weight'; has unknown 'x'; leaves out 'bias'"),
    ],
)
def test_partitions_of_other_networks_are_refused(groups, message):
    with pytest.raises(PartitionError, match=message):
        LayerPartition.of(nn.Linear(2, 2), LayerPartition(groups))


def test_a_partition_with_statistics_does_not_fit_a_policy_without():
    with pytest.raises(PartitionError, match="unknown 'bn1.running_mean', 'bn1.running_var'"):
        LayerPartition.of(ConvNet(), LayerPartition.of(ConvNet()), batch_norm="batch")


def test_unknown_names_get_a_suggestion():
    partition = LayerPartition.of(ConvNet())
    with pytest.raises(PartitionError, match="no layer 'conv3': did you mean 'conv"):
        partition.entries("conv3")
    with pytest.raises(PartitionError, match="No layer holds an entry 'fc.wait': did you mean 'fc.weight'"):
        partition.layer_of("fc.wait")


@pytest.mark.parametrize(
    ("layers", "indices"),
    [
        (None, [0, 1, 2]),
        ("fc", [2]),
        (["fc", "conv1"], [0, 2]),
        (("conv2", "conv2"), [1]),
        ({"conv1": 1}.keys(), [0]),
        ((name for name in ["fc"]), [2]),
        ([], []),
    ],
)
def test_sets_of_layers_become_sorted_positions(layers, indices):
    assert layer_indices(("conv1", "conv2", "fc"), layers) == indices


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("fd", "no layer 'fd': did you mean 'fc'"),
        (["fc", "convv1"], "no layer 'convv1': did you mean 'conv1'"),
        ([3], "no layer 3: choose from 'conv1', 'conv2', 'fc'"),
    ],
)
def test_sets_with_unknown_layers_are_refused(untyped, layers, message):
    with pytest.raises(PartitionError, match=message):
        layer_indices(("conv1", "conv2", "fc"), layers)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bn1", "no layer 'bn1': bn1 is part of layer 'conv1'"),
        ("bn1.weight", "no layer 'bn1.weight': bn1.weight is part of layer 'conv1'"),
        ("stage", "no layer 'stage': stage is in layers 'stage.0', 'stage.1'"),
        # Of a name, a part that ends within a word is none.
        ("sta", "no layer 'sta': did you mean"),
        ("bn", "no layer 'bn': "),
    ],
)
def test_a_module_within_a_layer_is_told_from_an_unknown_one(name, message):
    groups = {
        "conv1": ("conv1.weight", "bn1.weight", "bn1.bias"),
        "stage.0": ("stage.0.weight",),
        "stage.1": ("stage.1.w",),
    }
    with pytest.raises(PartitionError, match=message) as raised:
        layer_indices(groups, name)
    assert ("part of" in str(raised.value)) == (name.startswith("bn1"))
    with pytest.raises(PartitionError, match=message):
        LayerPartition(groups).entries(name)
    assert layer_indices(groups, ["stage.1", "conv1"]) == [0, 2]


def test_layers_stand_in_the_order_of_the_network_also_when_one_holds_statistics_only():
    network = nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.Linear(3, 2))
    assert LayerPartition.of(network, "module").names == ("0", "1")
