"""How the pixels of an image become what a network takes: their size, and their mean and standard deviation."""

import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float32
from torch import Tensor

from lmc_curvature.errors import OptionError, counted

if TYPE_CHECKING:
    from PIL.Image import Image

Statistics = Sequence[float] | float
"""A number a channel, or one for all."""

Size = int | tuple[int, int]
"""Images are scaled until the shorter side has so many pixels, and the middle square of that many, or of the second
number, is cut out."""


def statistics(
    mean: Statistics, std: Statistics, channels: int
) -> tuple[Float32[Tensor, " channels"], Float32[Tensor, " channels"]]:
    """Mean and standard deviation of each channel, of pixels scaled to [0, 1].

    Raises:
        OptionError: They do not fit the channels, or are not those of pixels in [0, 1].
    """
    expanded = []
    for option, values in {"mean": mean, "std": std}.items():
        given = tuple(values) if isinstance(values, Iterable) else (values,)
        if len(given) not in (1, channels):
            raise OptionError(
                f"{option}={given} has {counted(len(given), 'number')}, and the images {counted(channels, 'channel')}: "
                "expected one each, or one for all."
            )
        for value in given:
            low = value > 0 if option == "std" else value >= 0
            if not (isinstance(value, numbers.Real) and math.isfinite(value) and low and value <= 1):
                raise OptionError(
                    f"{option}={given}: {value} is not the {option} of pixels scaled to [0, 1]; divide those of pixels "
                    "from 0 to 255 by 255."
                )
        expanded.append(torch.tensor(given, dtype=torch.float32).expand(channels).clone())
    return expanded[0], expanded[1]


def check_both(mean: Statistics | None, std: Statistics | None) -> None:
    """Refuse one of them without the other.

    Raises:
        OptionError: Only one is given.
    """
    if (mean is None) != (std is None):
        given, absent = ("mean", "std") if std is None else ("std", "mean")
        raise OptionError(f"{given} is given without {absent}: both, or those of the training split, normalise images.")


def resizing(resize: Size | None) -> "Callable[[Image], Image]":
    """A function that scales an image and cuts out its middle, as `Size` says; None changes nothing.

    Raises:
        OptionError: The numbers are not positive, or more is to be cut out than there will be.
    """
    if resize is None:
        return lambda image: image
    size, crop = (resize, resize) if isinstance(resize, int) else resize
    if not 1 <= crop <= size:
        raise OptionError(
            f"resize={resize}: expected the pixels of the shorter side, or these and the side of the square to cut out "
            "of the middle, such as (256, 224)."
        )
    from torchvision.transforms import CenterCrop, Compose, Resize

    # Bilinear, as torchvision's own transforms for evaluation.
    return Compose([Resize(size), CenterCrop(crop)])
