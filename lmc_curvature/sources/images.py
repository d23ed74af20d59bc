"""Labelled images, held as one tensor, and loaders of normalised batches of them."""

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from lmc_curvature.errors import DataError, OptionError, counted
from lmc_curvature.sources.augmentation import Crops
from lmc_curvature.sources.preparation import Statistics, statistics

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")

_SAMPLE_SEED = 0
_ORDER_SEED = 1


@dataclasses.dataclass(frozen=True, eq=False)
class ImageDataset:
    """Images and their labels, uncompressed on one device.

    Attributes:
        images: Pixels, 0 to 255.
        targets: The index of each image's class.
        class_names: The name of each class.
        mean: What is subtracted from each channel, pixels scaled to [0, 1]; as a rule its mean over the training split.
        std: What it is divided by then, likewise its standard deviation.

    Raises:
        DataError: There are no images, or labels are missing or out of range.
    """

    images: UInt8[Tensor, "examples channels height width"]
    targets: Int64[Tensor, " examples"]
    class_names: tuple[str, ...]
    mean: Float32[Tensor, " channels"]
    std: Float32[Tensor, " channels"]

    def __post_init__(self) -> None:
        if len(self.images) == 0:
            raise DataError("A data set needs at least one image.")
        if len(self.images) != len(self.targets):
            raise DataError(f"{len(self.images)} images have {len(self.targets)} targets; expected one each.")
        low, high = int(self.targets.min()), int(self.targets.max())
        if low < 0 or high >= len(self.class_names):
            raise DataError(
                f"Targets range from {low} to {high}; with {len(self.class_names)} classes they must lie in "
                f"0 to {len(self.class_names) - 1}."
            )

    @classmethod
    def normalized_by(
        cls,
        training_images: UInt8[Tensor, "training channels height width"],
        images: UInt8[Tensor, "examples channels height width"],
        targets: Int64[Tensor, " examples"],
        class_names: tuple[str, ...],
    ) -> "ImageDataset":
        """Return the data set of a split, with the mean and standard deviation of the training split."""
        # Counting the 256 values gives exact moments without a float copy of all the pixels.
        channels = training_images.unbind(1)
        counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in channels]).double()
        counts /= counts.sum(dim=1, keepdim=True)
        values = torch.arange(256, dtype=torch.float64) / 255
        mean = counts @ values
        std = (counts * (values - mean[:, None]) ** 2).sum(dim=1).sqrt()
        # A constant channel has no scale to divide by.
        return cls(images, targets, class_names, mean.float(), torch.where(std > 0, std, 1.0).float())

    def normalized(self, mean: Statistics, std: Statistics) -> "ImageDataset":
        """Return the data set with a mean and standard deviation of one's own: those that networks were trained with.

        Args:
            mean: A number a channel, or one for all, of pixels scaled to [0, 1].
            std: Likewise.

        Raises:
            OptionError: They do not fit the channels, or are not those of pixels in [0, 1].
        """
        means, stds = statistics(mean, std, self.images.shape[1])
        return dataclasses.replace(self, mean=means.to(self.images.device), std=stds.to(self.images.device))

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> "ImageDataset":
        """Return the data set with its tensors on `device`."""
        tensors = {name: getattr(self, name).to(device) for name in ("images", "targets", "mean", "std")}
        return dataclasses.replace(self, **tensors)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the images, their labels and their normalisation: all that training sees of them."""
        digest = hashlib.sha256(str(tuple(self.images.shape)).encode())
        for tensor in (self.images, self.targets, self.mean, self.std):
            digest.update(tensor.cpu().reshape(-1).numpy().data)
        return digest.hexdigest()

    def batches(
        self, batch_size: int, *, order: Int64[Tensor, " selected"] | None = None, crops: Crops | None = None
    ) -> "Batches":
        """Return a loader of normalised batches.

        Args:
            batch_size: Examples a batch; the last one may have fewer.
            order: Indices of the examples, in the order in which they are visited. By default all examples in a fixed
                random order: in their own they would come class by class, where files lie in a folder for each class.
            crops: Images are augmented by these, drawn for as many positions as the loader has examples, and on the
                device of the images.

        Raises:
            OptionError: The batch size is not positive.
        """
        order = mixed_order(len(self)).to(self.images.device) if order is None else order
        return Batches(self, batch_size, order, crops)

    def subset(self, selection: int | Int64[Tensor, " selected"]) -> "ImageDataset":
        """Return some of the examples, normalised as before.

        Args:
            selection: Indices of examples; or a number of examples, for a fixed random sample in which the
                smaller is part of the larger.

        Raises:
            DataError: There are fewer examples than asked for.
        """
        if isinstance(selection, int):
            if not 1 <= selection <= len(self):
                raise DataError(f"A subset of {counted(selection, 'example')} was asked for; there are {len(self)}.")
            selection = fixed_sample(len(self), selection)
        return dataclasses.replace(self, images=self.images[selection], targets=self.targets[selection])


def fixed_sample(count: int, limit: int | None) -> Int64[Tensor, " selected"]:
    """Indices of at most `limit` of so many examples, rising; all of them for None.

    Raises:
        OptionError: The limit is not positive.
    """
    if limit is not None and limit < 1:
        raise OptionError(f"limit={limit} must be at least 1.")
    if limit is None or limit >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(_SAMPLE_SEED))[:limit].sort().values


def mixed_order(count: int) -> Int64[Tensor, " examples"]:
    """The fixed random order of so many examples."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(_ORDER_SEED))


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """A loader over an `ImageDataset`: `(x, y)` batches, the same in every pass, the last one possibly short.

    `x` is float32, (batch, channels, height, width), normalised by the data set's mean and standard deviation, so with
    zero mean and unit variance per channel where these are the training split's; `y` is int64, (batch,).

    Raises:
        OptionError: The batch size is not positive.
    """

    dataset: ImageDataset
    batch_size: int
    order: Int64[Tensor, " selected"]
    crops: Crops | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise OptionError(f"batch_size={self.batch_size} must be at least 1.")

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        data = self.dataset
        mean, std = data.mean.view(-1, 1, 1), data.std.view(-1, 1, 1)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            chosen = self.order[start : start + self.batch_size]
            images = data.images[chosen]
            pixels = (images if self.crops is None else self.crops.apply(images, start)).to(torch.float32)
            yield pixels.div_(255).sub_(mean).div_(std), data.targets[chosen]
