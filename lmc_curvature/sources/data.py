"""Labelled images, held as one tensor: scikit-learn's digits, CIFAR-10, and folders of image files."""

import dataclasses
import hashlib
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Float32, Int64, UInt8
from sklearn import datasets, model_selection
from torch import Tensor
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.datasets.folder import default_loader
from tqdm.auto import tqdm

from lmc_curvature.errors import DataError, OptionError, check_choice
from lmc_curvature.sources.augmentation import Crops

Split = Literal["train", "test"]

_DIGITS_TEST_EXAMPLES = 360
_SAMPLE_SEED = 0
_CIFAR10_ROOT = "data"


@dataclasses.dataclass(frozen=True, eq=False)
class ImageDataset:
    """Images and their labels, uncompressed on one device.

    Attributes:
        images: Pixels, 0 to 255.
        targets: The index of each image's class.
        class_names: The name of each class.
        mean: Mean of each channel over the training split, pixels scaled to [0, 1].
        std: Standard deviation of each channel over the training split, likewise.

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

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> "ImageDataset":
        """Return the data set with its tensors on `device`."""
        tensors = {name: getattr(self, name).to(device) for name in ("images", "targets", "mean", "std")}
        return dataclasses.replace(self, **tensors)

    def fingerprint(self) -> str:
        """SHA-256 of the images, their labels and their normalisation: all that training sees of a data set."""
        digest = hashlib.sha256(str(tuple(self.images.shape)).encode())
        for tensor in (self.images, self.targets, self.mean, self.std):
            digest.update(tensor.cpu().reshape(-1).numpy().data)
        return digest.hexdigest()

    def batches(
        self, batch_size: int, *, order: Int64[Tensor, " selected"] | None = None, crops: Crops | None = None
    ) -> "Batches":
        """Return a loader of normalised batches, in the order of the examples or of the indices in `order`.

        With `crops`, images are augmented; these are drawn for as many positions as the loader has examples.
        """
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
                raise DataError(f"A subset of {selection} examples was asked for; there are {len(self)}.")
            generator = torch.Generator().manual_seed(_SAMPLE_SEED)
            selection = torch.randperm(len(self), generator=generator)[:selection].sort().values
        selection = selection.to(self.images.device)
        return dataclasses.replace(self, images=self.images[selection], targets=self.targets[selection])


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """A loader over an `ImageDataset`: `(x, y)` batches, any number of times, the last one possibly short.

    `x` is float32, (batch, channels, height, width), with zero mean and unit variance per channel over the
    training split; `y` is int64, (batch,).

    Raises:
        OptionError: The batch size is not positive.
    """

    dataset: ImageDataset
    batch_size: int
    order: Int64[Tensor, " selected"] | None = None
    crops: Crops | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise OptionError(f"batch_size={self.batch_size} must be at least 1.")

    def __len__(self) -> int:
        count = len(self.dataset) if self.order is None else len(self.order)
        return -(-count // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        data = self.dataset
        mean, std = data.mean.view(-1, 1, 1), data.std.view(-1, 1, 1)
        order = None if self.order is None else self.order.to(data.images.device)
        crops = None if self.crops is None else self.crops.to(data.images.device)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            stop = start + self.batch_size
            chosen = slice(start, stop) if order is None else order[start:stop]
            images = data.images[chosen]
            pixels = (images if crops is None else crops.apply(images, start)).to(torch.float32)
            yield pixels.div_(255).sub_(mean).div_(std), data.targets[chosen]


def load_data(
    spec: str | os.PathLike[str], split: Split = "train", limit: int | None = None, *, progress: bool = True
) -> ImageDataset:
    """Load a data set by name.

    Args:
        spec: `"digits"`; `"cifar10"` or `"cifar10:ROOT"` (see `load_cifar10`); or the root of a folder of images (see
            `load_image_folder`).
        split: `"train"` or `"test"`.
        limit: Keep at most this many examples, a fixed random sample. The normalisation is that of the whole
            training split all the same.
        progress: Show a bar while images are decoded.

    Raises:
        DataError: There is no such data set, or it is not what it should be.
        OptionError: The split is unknown, or the limit is not positive.
    """
    if limit is not None and limit < 1:
        raise OptionError(f"limit={limit} must be at least 1.")
    name, colon, root = os.fspath(spec).partition(":")
    if spec == "digits":
        data = load_digits(split)
    elif name == "cifar10" and (colon or not Path(name).is_dir()):
        data = load_cifar10(root or _CIFAR10_ROOT, split)
    else:
        data = load_image_folder(spec, split, progress=progress)
    return data if limit is None or limit >= len(data) else data.subset(limit)


def load_digits(split: Split = "train") -> ImageDataset:
    """Load scikit-learn's handwritten digits: 1×8×8 images, 1,437 for training and 360 for testing.

    Pixels come as 0 to 16 and are scaled to 0 to 255. The split is fixed and stratified by class.

    Raises:
        OptionError: The split is unknown.
    """
    check_choice("split", split, ("train", "test"))
    bunch: Any = datasets.load_digits()
    pixels = torch.from_numpy(np.rint(bunch["images"] * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    targets = torch.from_numpy(bunch["target"].astype(np.int64))
    train, test = model_selection.train_test_split(
        np.arange(len(targets)), test_size=_DIGITS_TEST_EXAMPLES, stratify=bunch["target"], random_state=0
    )
    mean, std = _channel_statistics(pixels[torch.from_numpy(train)])
    chosen = torch.from_numpy(np.sort(train if split == "train" else test))
    names = tuple(str(name) for name in bunch["target_names"])
    return ImageDataset(pixels[chosen], targets[chosen], names, mean, std)


def load_cifar10(root: str | os.PathLike[str] = _CIFAR10_ROOT, split: Split = "train") -> ImageDataset:
    """Load CIFAR-10 (Krizhevsky 2009) through torchvision: 3×32×32 images, 50,000 for training and 10,000 for testing.

    Args:
        root: Directory with `cifar-10-batches-py`, which is downloaded and checked if it is not there.
        split: `"train"` or `"test"`.

    Raises:
        DataError: It is not there and cannot be downloaded.
        OptionError: The split is unknown.
    """
    check_choice("split", split, ("train", "test"))
    root = Path(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Of several processes, one downloads.
        with FileLock(root / ".lmc-curvature.lock"):
            train = CIFAR10(root, train=True, download=True)
            chosen = train if split == "train" else CIFAR10(root, train=False, download=True)
    except (OSError, RuntimeError, tarfile.TarError) as error:
        raise DataError(
            f"CIFAR-10 is not in {root} and cannot be downloaded ({error}). Put cifar-10-batches-py there, or "
            "name a folder of images, ROOT/train/CLASS/*.png and ROOT/test/CLASS/*.png, instead."
        ) from error
    images = [torch.from_numpy(np.asarray(part.data)).permute(0, 3, 1, 2).contiguous() for part in (train, chosen)]
    mean, std = _channel_statistics(images[0])
    return ImageDataset(images[1], torch.tensor(chosen.targets), tuple(chosen.classes), mean, std)


def load_image_folder(root: str | os.PathLike[str], split: Split = "train", *, progress: bool = True) -> ImageDataset:
    """Decode a folder of images in the layout of `torchvision.datasets.ImageFolder`.

    Images lie in `root/train/CLASS/` and `root/test/CLASS/`; a root with neither directory may hold the
    classes of the training split itself. They are read as RGB and must be of one size. The normalisation is
    that of the training split, which is therefore decoded for either split.

    Args:
        root: The directory.
        split: `"train"` or `"test"`.
        progress: Show a bar while images are decoded.

    Raises:
        DataError: The directory or its classes are missing, the test split has other classes than the
            training split, a file is not an image, or images differ in size.
        OptionError: The split is unknown.
    """
    check_choice("split", split, ("train", "test"))
    train_folder = _open_folder(_split_directory(Path(root), "train"))
    test_folder = None
    if split == "test":
        test_folder = _open_folder(_split_directory(Path(root), "test"))
        _check_same_classes(train_folder, test_folder)
    images = _decode(train_folder, progress=progress)
    mean, std = _channel_statistics(images)
    if test_folder is not None:
        images = _decode(test_folder, progress=progress)
    chosen = train_folder if test_folder is None else test_folder
    return ImageDataset(images, torch.tensor(chosen.targets), tuple(chosen.classes), mean, std)


def _split_directory(root: Path, split: Split) -> Path:
    root = root.expanduser()
    if not root.is_dir():
        raise DataError(
            f"Data {str(root)!r} is neither 'digits' nor 'cifar10' nor a directory; expected a directory of images, "
            "ROOT/train/CLASS/*.png and ROOT/test/CLASS/*.png."
        )
    directory = root / split
    if directory.is_dir():
        return directory
    if split == "train" and not (root / "test").is_dir():
        return root
    raise DataError(f"{root} has no {split!r} split; expected the directory {directory} with a directory per class.")


def _open_folder(directory: Path) -> ImageFolder:
    try:
        return ImageFolder(directory)
    except FileNotFoundError as error:
        raise DataError(
            f"{directory} is not a folder of images ({error}); expected {directory}/CLASS/*.png (or .jpg, …) with at "
            "least one image in the directory of each class."
        ) from error


def _check_same_classes(train: ImageFolder, test: ImageFolder) -> None:
    unknown = sorted(set(test.classes) - set(train.classes))
    missing = sorted(set(train.classes) - set(test.classes))
    if unknown or missing:
        found = [f"{name!r} is only in the test split" for name in unknown]
        found += [f"{name!r} is only in the training split" for name in missing]
        more = f", and {len(found) - 5} more" if len(found) > 5 else ""
        raise DataError(
            f"The splits {train.root} and {test.root} have different classes: {', '.join(found[:5])}{more}; expected "
            "the same directories in both."
        )


def _decode(folder: ImageFolder, *, progress: bool) -> UInt8[Tensor, "examples 3 height width"]:
    first = folder.samples[0][0]
    _, height, width = _read_image(first).shape
    images = torch.empty((len(folder.samples), 3, height, width), dtype=torch.uint8)
    bar = tqdm(folder.samples, desc=f"decoding {folder.root}", unit="image", disable=not progress)
    for index, (path, _) in enumerate(bar):
        image = _read_image(path)
        if image.shape != (3, height, width):
            raise DataError(
                f"{path} is {image.shape[2]}×{image.shape[1]} pixels but {first} is {width}×{height}; all images "
                "must have one size, so resize them first."
            )
        images[index] = image
    return images


def _read_image(path: str) -> UInt8[Tensor, "3 height width"]:
    try:
        pixels = np.array(default_loader(path))
    except (OSError, SyntaxError) as error:
        # Pillow reports some broken PNG files as a SyntaxError.
        raise DataError(f"{path} cannot be read as an image ({error}).") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _channel_statistics(
    images: UInt8[Tensor, "examples channels height width"],
) -> tuple[Float32[Tensor, " channels"], Float32[Tensor, " channels"]]:
    # Counting the 256 values gives exact moments without a float copy of all the pixels.
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    counts /= counts.sum(dim=1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = counts @ values
    std = (counts * (values - mean[:, None]) ** 2).sum(dim=1).sqrt()
    # A constant channel has no scale to divide by.
    return mean.float(), torch.where(std > 0, std, 1.0).float()
