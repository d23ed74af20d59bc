"""Networks for images, in tiny configurations: those of torchvision and timm."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.regnet import BlockParams
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2
from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D, R2Plus1dStem, VideoResNet

from tests.support.zoo.specimen import CLASSES, CROSS_ENTROPY, POLICIES, Specimen, classified, labels, numbers

# The third differentiates as the second does; smaller networks are tried under it.
_POLICIES = POLICIES[:2]


def _image(make: Callable[[], nn.Module], pixels: int = 16, **options: Any) -> Specimen:
    return Specimen("torchvision", make, classified(3, pixels, pixels), CROSS_ENTROPY, **options)


def _normalized(make: Callable[[], nn.Module], pixels: int = 16) -> Specimen:
    return _image(make, pixels, policies=_POLICIES)


def _vgg() -> nn.Module:
    layers = [4, "M", 8, "M"]
    network = models.VGG(models.vgg.make_layers(layers, batch_norm=True), num_classes=CLASSES, init_weights=False)
    network.classifier = nn.Sequential(nn.Linear(8 * 49, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, CLASSES))
    return network


def _segmentation() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), FCNHead(8, CLASSES))


def _video() -> nn.Module:
    network = VideoResNet(BasicBlock, [Conv2Plus1D] * 4, [1, 0, 0, 0], R2Plus1dStem, num_classes=CLASSES)
    network.layer2 = network.layer3 = network.layer4 = nn.Identity()
    network.fc = nn.Linear(64, CLASSES)
    return network


def _swin(**options: Any) -> nn.Module:
    return models.SwinTransformer([2, 2], 8, [1, 1], [2, 2], [2, 2], num_classes=CLASSES, **options)


def _convnext() -> nn.Module:
    settings = [CNBlockConfig(4, 8, 1), CNBlockConfig(8, None, 1)]
    return models.ConvNeXt(settings, layer_scale=0.5, num_classes=CLASSES)


def _regnet() -> nn.Module:
    blocks = BlockParams([1, 1], [8, 16], [4, 4], [1.0, 1.0], [2, 2], se_ratio=0.25)
    return models.RegNet(blocks, num_classes=CLASSES, stem_width=4)


def _dense(generator: Any) -> Any:
    return numbers(generator, 3, 3, 4, 4), labels(generator, 3, 2, 2)


TORCHVISION = {
    "VGG": _normalized(_vgg),
    "DenseNet": _image(lambda: models.DenseNet(4, (2, 2), 8, num_classes=CLASSES), 32),
    "MobileNetV2": _image(
        lambda: models.MobileNetV2(CLASSES, 0.1, [[1, 8, 1, 1], [6, 16, 1, 2], [6, 16, 1, 1]], round_nearest=4)
    ),
    "MobileNetV3": _image(
        lambda: models.MobileNetV3([InvertedResidualConfig(8, 3, 16, 8, True, "HS", 2, 1, 0.5)], 16, CLASSES)
    ),
    "EfficientNet": _image(lambda: models.EfficientNet([MBConvConfig(2, 3, 2, 8, 8, 1)], 0.2, num_classes=CLASSES)),
    "ShuffleNetV2": _image(lambda: models.ShuffleNetV2([1, 1, 1], [4, 8, 8, 8, 16], CLASSES)),
    "RegNet": _image(_regnet),
    "ConvNeXt": _image(_convnext),
    "Swin": _image(_swin),
    "Swin v2": _image(partial(_swin, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2)),
    "VisionTransformer": _image(lambda: models.VisionTransformer(16, 8, 1, 2, 8, 16, num_classes=CLASSES)),
    "FCN": Specimen("torchvision", _segmentation, _dense, CROSS_ENTROPY, _POLICIES),
    "R(2+1)D": Specimen("torchvision", _video, classified(3, 2, 8, 8), CROSS_ENTROPY, _POLICIES),
}


def _timm(name: str, *, pixels: int = 16, policies: tuple[str, ...] = ("interpolate",), **options: Any) -> Specimen:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=CLASSES, **options)

    return Specimen("timm", make, classified(3, pixels, pixels), CROSS_ENTROPY, policies)


def _made(make: Callable[[Any], nn.Module], *, pixels: int = 16, **options: Any) -> Specimen:
    """A network of timm whose sizes no name of a configuration leaves open; it is made out of `timm.models`."""

    def made() -> nn.Module:
        import timm.models

        return make(timm.models)

    return Specimen("timm", made, classified(3, pixels, pixels), CROSS_ENTROPY, **options)


def _group_norm(channels: int, **options: Any) -> nn.Module:
    from timm.layers import GroupNormAct

    return GroupNormAct(channels, num_groups=2, **options)


def _gated_mixer(models: Any) -> nn.Module:
    from timm.layers import GatedMlp

    block = models.mlp_mixer.SpatialGatingBlock
    return models.MlpMixer(CLASSES, 16, 3, 8, 1, 8, mlp_ratio=4, block_layer=block, mlp_layer=GatedMlp)


def _pool_former(models: Any) -> nn.Module:
    return models.MetaFormer(
        num_classes=CLASSES,
        downsample_norm=None,
        mlp_act=nn.GELU,
        mlp_bias=True,
        norm_layers=models.metaformer.GroupNorm1,
        layer_scale_init_values=0.5,
        res_scale_init_values=None,
        use_mlp_head=False,
        **_STAGES,
    )


def _ghost(models: Any) -> nn.Module:
    return models.GhostNet([[[3, 8, 8, 0, 1]], [[3, 16, 8, 0.25, 2]]], CLASSES)


_PATCHES = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "num_heads": 2}
_STAGES = {"depths": (1, 1, 1, 1), "dims": (4, 4, 8, 8)}
_WIDTHS = {"layers": (1, 1, 1, 1), "channels": (4, 4, 8, 8)}
TIMM = {
    "ResNet-D": _timm("resnet18d", stem_width=4, **_WIDTHS),
    "SE-ResNet": _timm("seresnet18", **_WIDTHS),
    "BiT": _made(lambda models: models.ResNetV2((1, 1), (8, 16), CLASSES, stem_chs=4, norm_layer=_group_norm)),
    "NFNet": _made(lambda models: models.NormFreeNet(models.nfnet._nfres_cfg((1, 1), (8, 8)), CLASSES)),
    "ConvNeXt v2": _timm("convnextv2_atto", pixels=32, **_STAGES),
    "ConvMixer": _made(lambda models: models.ConvMixer(4, 2, 3, 4, num_classes=CLASSES), policies=_POLICIES),
    "PoolFormer": _made(_pool_former, pixels=32),
    "ConvFormer": _made(
        lambda models: models.MetaFormer(
            num_classes=CLASSES,
            token_mixers=models.metaformer.SepConv,
            norm_layers=models.metaformer.LayerNorm2dNoBias,
            **_STAGES,
        ),
        pixels=32,
    ),
    "PVT v2": _timm("pvt_v2_b0", pixels=32, depths=(1, 1, 1, 1), embed_dims=(4, 4, 8, 8), num_heads=(1, 1, 2, 2)),
    "FocalNet": _made(
        lambda models: models.FocalNet(
            num_classes=CLASSES, embed_dim=4, depths=(1, 1), focal_levels=(2, 2), focal_windows=(3, 3)
        )
    ),
    "GhostNet": _made(_ghost, policies=_POLICIES),
    "ViT": _timm("vit_tiny_patch16_224", depth=1, **_PATCHES),
    "BEiT": _timm("beit_base_patch16_224", depth=1, **_PATCHES),
    "EVA-02": _timm("eva02_tiny_patch14_224", depth=1, ref_feat_shape=None, **_PATCHES),
    "CaiT": _timm("cait_xxs24_224", depth=1, depth_token_only=1, **_PATCHES),
    "XCiT": _timm("xcit_nano_12_p16_224", depth=1, cls_attn_layers=1, **_PATCHES),
    "MLP-Mixer": _made(lambda models: models.MlpMixer(CLASSES, 16, 3, 8, 1, 8)),
    "gMLP": _made(_gated_mixer),
    "Sequencer": _timm(
        "sequencer2d_s", layers=(1, 1), patch_sizes=(4, 2), embed_dims=(8, 8), hidden_sizes=(2, 2), mlp_ratios=(2, 2)
    ),
}
