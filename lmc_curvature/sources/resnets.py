"""Residual networks for small images.

The networks follow He et al., "Deep Residual Learning for Image Recognition" (2015), section 4.2. Each
normalisation module is registered right after the convolution it normalises, so that the two form one layer.
"""

import functools
from collections import OrderedDict
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lmc_curvature.errors import OptionError, check_choice

Shortcut = Literal["projection", "identity"]


def resnet(
    depth: int = 20, *, width: int = 16, num_classes: int = 10, in_channels: int = 3, shortcut: Shortcut = "projection"
) -> "CifarResNet":
    """Build a residual network for small images, of `depth` = 6n + 2 layers in three stages of n blocks.

    Args:
        depth: Layers on the longest path: 8, 14, 20, 32, 44, 56, 110, …
        width: Channels of the first stage; the second has twice, the third four times as many.
        num_classes: Outputs.
        in_channels: Channels of the images.
        shortcut: What carries the input past a block that changes the shape. `"projection"`: a 1×1
            convolution with normalisation, which adds two weight-carrying modules to the `depth` others.
            `"identity"`: the input at every other pixel with channels of zeros, which has no parameters
            (option A, as in the paper).

    Raises:
        OptionError: The depth is not 6n + 2, a number is not positive, or the shortcut is unknown.
    """
    if depth < 8 or (depth - 2) % 6 != 0:
        raise OptionError(f"depth={depth} is not 6n + 2: choose 8, 14, 20, 32, 44, 56 or 110.")
    _check_positive(width=width, num_classes=num_classes, in_channels=in_channels)
    check_choice("shortcut", shortcut, ("projection", "identity"))
    blocks = (depth - 2) // 6
    return CifarResNet(blocks=blocks, width=width, num_classes=num_classes, in_channels=in_channels, shortcut=shortcut)


resnet20 = functools.partial(resnet, 20)
"""The 20-layer network of `resnet`: 0.27 million parameters, 22 weight-carrying modules with projections."""

digits_resnet = functools.partial(resnet, 8, width=8, in_channels=1)
"""The 8-layer network of `resnet` for 1×8×8 digits: 10 weight-carrying modules with projections."""


def cifar_resnet18(*, normalization: bool = True, num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Build torchvision's ResNet-18 for small images: 11 M parameters, 3×3 first convolution, no max-pooling.

    Args:
        normalization: With batch normalisation, or with nothing in its place. Without it the network needs a lower
            learning rate and a few epochs of warm-up.
        num_classes: Outputs.
        in_channels: Channels of the images.

    Raises:
        OptionError: A number is not positive.
    """
    from torchvision.models import resnet18

    _check_positive(num_classes=num_classes, in_channels=in_channels)
    # The identity takes the number of channels, as a normalisation does, and ignores it.
    norm_layer = None if normalization else nn.Identity
    model = resnet18(weights=None, num_classes=num_classes, norm_layer=norm_layer)
    width = model.conv1.out_channels
    model.conv1 = _conv3x3(in_channels, width, stride=1)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.set_submodule("maxpool", nn.Identity())
    return model


class CifarResNet(nn.Module):
    """The residual network of He et al. (2015) for CIFAR; see `resnet`, which checks the options.

    A 3×3 convolution, three stages of basic blocks at full, half and quarter resolution, the mean over
    pixels, and a linear classifier. Convolutions have no bias. Weights are drawn from N(0, 2 / fan-in) (He et
    al., "Delving Deep into Rectifiers", 2015).
    """

    def __init__(self, *, blocks: int, width: int, num_classes: int, in_channels: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv = _conv3x3(in_channels, width, stride=1)
        self.norm = nn.BatchNorm2d(width)
        self.stage1 = _stage(blocks, width, width, stride=1, shortcut=shortcut)
        self.stage2 = _stage(blocks, width, 2 * width, stride=2, shortcut=shortcut)
        self.stage3 = _stage(blocks, 2 * width, 4 * width, stride=2, shortcut=shortcut)
        self.linear = nn.Linear(4 * width, num_classes)
        self.apply(_initialise)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of a batch of images."""
        x = functional.relu(self.norm(self.conv(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        # Unlike adaptive pooling, a plain mean has a deterministic backward pass on every device.
        return self.linear(x.mean(dim=(2, 3)))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch normalisation, and a shortcut past both: relu(F(x) + shortcut(x))."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, out_channels, stride=stride)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels, stride=1)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride=stride, kind=shortcut)

    def forward(
        self, x: Float[Tensor, "batch in_channels in_height in_width"]
    ) -> Float[Tensor, "batch out_channels height width"]:
        """Return the block's features."""
        residual = functional.relu(self.norm1(self.conv1(x)))
        residual = self.norm2(self.conv2(residual))
        return functional.relu(residual + self.shortcut(x))


class ZeroPadShortcut(nn.Module):
    """The parameter-free shortcut (option A): every `stride`-th pixel, and channels of zeros after the others."""

    def __init__(self, extra_channels: int, *, stride: int) -> None:
        super().__init__()
        self.extra_channels = extra_channels
        self.stride = stride

    def forward(
        self, x: Float[Tensor, "batch in_channels in_height in_width"]
    ) -> Float[Tensor, "batch out_channels height width"]:
        """Return the input, subsampled and padded."""
        x = x[:, :, :: self.stride, :: self.stride]
        return functional.pad(x, (0, 0, 0, 0, 0, self.extra_channels))


def _check_positive(**options: int) -> None:
    for name, value in options.items():
        if value < 1:
            raise OptionError(f"{name}={value} must be at least 1.")


def _conv3x3(in_channels: int, out_channels: int, *, stride: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)


def _stage(blocks: int, in_channels: int, out_channels: int, *, stride: int, shortcut: Shortcut) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride=stride, shortcut=shortcut)
    others = (BasicBlock(out_channels, out_channels, stride=1, shortcut=shortcut) for _ in range(blocks - 1))
    return nn.Sequential(first, *others)


def _shortcut(in_channels: int, out_channels: int, *, stride: int, kind: Shortcut) -> nn.Module:
    if in_channels == out_channels and stride == 1:
        return nn.Identity()
    if kind == "identity":
        return ZeroPadShortcut(out_channels - in_channels, stride=stride)
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(out_channels)))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
