"""Claim: residual networks for small images are those of the paper."""

import inspect
import re

import pytest
import torch
import torchvision
from torch import nn

from lmc_curvature.errors import OptionError
from lmc_curvature.sources import cifar_resnet18, digits_resnet, make_model, resnet, resnet20


def weight_modules(model):
    return [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def parameter_count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_resnet20_with_projections_has_22_weight_modules():
    assert len(weight_modules(resnet20())) == 22


def test_resnet20_with_parameter_free_shortcuts_has_the_size_of_the_paper():
    model = resnet20(shortcut="identity")
    assert len(weight_modules(model)) == 20
    # 19 convolutions without bias, two numbers a channel of normalisation, and the classifier.
    convolutions = 9 * (3 * 16 + 6 * 16**2 + 16 * 32 + 5 * 32**2 + 32 * 64 + 5 * 64**2)
    assert parameter_count(model) == convolutions + 2 * (7 * 16 + 6 * 32 + 6 * 64) + 64 * 10 + 10
    assert round(parameter_count(model) / 1e6, 2) == 0.27


def test_digits_resnet_has_10_weight_modules():
    assert len(weight_modules(digits_resnet())) == 10
    assert digits_resnet()(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("shortcut", ["projection", "identity"])
@pytest.mark.parametrize(("depth", "blocks"), [(8, 1), (20, 3), (32, 5)])
def test_depth_counts_the_layers_of_the_longest_path(depth, blocks, shortcut):
    model = resnet(depth, width=4, num_classes=7, in_channels=2, shortcut=shortcut)
    assert [len(stage) for stage in (model.stage1, model.stage2, model.stage3)] == [blocks] * 3
    assert model(torch.zeros(3, 2, 16, 16)).shape == (3, 7)


def test_stages_halve_the_resolution_and_double_the_channels():
    model = resnet20(width=4)
    x = model.conv(torch.zeros(1, 3, 32, 32))
    shapes = [tuple((x := stage(x)).shape[1:]) for stage in (model.stage1, model.stage2, model.stage3)]
    assert shapes == [(4, 32, 32), (8, 16, 16), (16, 8, 8)]


@pytest.mark.parametrize("shortcut", ["projection", "identity"])
def test_each_norm_is_registered_right_after_its_convolution(shortcut):
    leaves = [m for m in resnet20(shortcut=shortcut).modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    assert all(isinstance(module, nn.Conv2d) for module in leaves[::2])
    assert all(isinstance(module, nn.BatchNorm2d) for module in leaves[1::2])
    assert all(c.out_channels == n.num_features for c, n in zip(leaves[::2], leaves[1::2], strict=True))


def test_identity_shortcut_subsamples_and_pads_with_zeros():
    shortcut = resnet20(width=4, shortcut="identity").stage2[0].shortcut
    x = torch.randn(2, 4, 6, 6)
    y = shortcut(x)
    assert torch.equal(y[:, :4], x[:, :, ::2, ::2])
    assert y.shape == (2, 8, 3, 3)
    assert y[:, 4:].abs().max() == 0


def test_weights_have_the_variance_of_he_et_al():
    torch.manual_seed(0)
    model = resnet20(width=32)
    weight = model.stage3[1].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    assert model.linear.bias.abs().max() == 0


def test_direct_calls_check_their_options():
    with pytest.raises(OptionError, match=re.escape("depth=2 is not 6n + 2")):
        resnet(2)
    # The tests' own check of types would catch the choice before the library does.
    with pytest.raises(OptionError, match="shortcut='identify' is not a choice: did you mean 'identity'"):
        inspect.unwrap(resnet)(20, shortcut="identify")


@pytest.mark.check
@pytest.mark.parametrize("normalization", [True, False])
def test_resnet18_for_small_images_is_that_of_torchvision(normalization):
    model = make_model("cifar-resnet18", num_classes=7, normalization=normalization)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    # Features keep their resolution until the second stage: 32, 16, 8, 4.
    assert model.layer4(model.layer3(model.layer2(model.layer1(torch.randn(1, 64, 32, 32))))).shape == (1, 512, 4, 4)
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == normalization
    reference = torchvision.models.resnet18(num_classes=7)
    expected = {
        name: p.shape for name, p in reference.named_parameters() if normalization or p.ndim != 1 or "fc" in name
    }
    assert {name: p.shape for name, p in model.named_parameters()} == {**expected, "conv1.weight": (64, 3, 3, 3)}
    with pytest.raises(OptionError, match="num_classes=0 must be at least 1"):
        cifar_resnet18(num_classes=0)


def test_resnet20_without_projections_has_the_papers_size():
    model = make_model("resnet20", shortcut="identity")
    assert sum(parameter.numel() for parameter in model.parameters()) == 269_722
