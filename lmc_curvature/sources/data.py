"""Data sets by name: scikit-learn's digits, CIFAR-10, or a folder of image files."""

import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import UInt8
from torch import Tensor
from tqdm.auto import tqdm

from lmc_curvature.errors import DataError, OptionError, check_choice
from lmc_curvature.sources.images import SPLITS, ImageDataset, Split
from lmc_curvature.sources.preparation import Size, Statistics, check_both, resizing, statistics

if TYPE_CHECKING:
    from PIL.Image import Image
    from torchvision.datasets import ImageFolder

_DIGITS_TEST_EXAMPLES = 360
_CIFAR10_ROOT = "data"
_CLASSES_SHOWN = 5


def load_data(
    spec: str | os.PathLike[str],
    split: Split = "train",
    limit: int | None = None,
    *,
    mean: Statistics | None = None,
    std: Statistics | None = None,
    resize: Size | None = None,
    progress: bool | None = None,
) -> ImageDataset:
    """Load a data set by name.

    Args:
        spec: `"digits"`; `"cifar10"` or `"cifar10:ROOT"` (see `load_cifar10`); or the root of a folder of images (see
            `load_image_folder`).
        split: `"train"` or `"test"`.
        limit: Keep at most this many examples, a fixed random sample. The normalisation is that of the whole
            training split all the same.
        mean: Mean that images are normalised by, with `std`, each a number a channel or one for all, of pixels scaled
            to [0, 1]: those that a network was trained with. By default those of the training split.
        std: Standard deviation, likewise.
        resize: Images of a folder are scaled; see `load_image_folder`.
        progress: Show a bar while images are decoded; by default on a terminal and in notebooks.

    Raises:
        DataError: There is no such data set, or it is not what it should be.
        OptionError: The split is unknown, or another option is not what it should be.
    """
    if limit is not None and limit < 1:
        raise OptionError(f"limit={limit} must be at least 1.")
    check_both(mean, std)
    if is_image_folder(spec):
        data = load_image_folder(spec, split, mean=mean, std=std, resize=resize, progress=progress)
    elif resize is not None:
        raise OptionError(f"resize={resize} is for folders of images; those of {os.fspath(spec)!r} have one size.")
    else:
        _, _, root = os.fspath(spec).partition(":")
        data = load_digits(split) if spec == "digits" else load_cifar10(root or _CIFAR10_ROOT, split)
        data = data if mean is None or std is None else data.normalized(mean, std)
    return data if limit is None or limit >= len(data) else data.subset(limit)


def is_image_folder(spec: str | os.PathLike[str]) -> bool:
    """Whether a data set's name is that of a folder, there or not, and not of one that the library knows."""
    name, colon, _ = os.fspath(spec).partition(":")
    return spec != "digits" and not (name == "cifar10" and (colon or not Path(name).is_dir()))


def load_digits(split: Split = "train") -> ImageDataset:
    """Load scikit-learn's handwritten digits: 1×8×8 images, 1,437 for training and 360 for testing.

    Pixels come as 0 to 16 and are scaled to 0 to 255. The split is fixed and stratified by class.

    Raises:
        OptionError: The split is unknown.
    """
    from sklearn import datasets, model_selection

    check_choice("split", split, SPLITS)
    bunch: Any = datasets.load_digits()
    pixels = torch.from_numpy(np.rint(bunch["images"] * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    targets = torch.from_numpy(bunch["target"].astype(np.int64))
    train, test = model_selection.train_test_split(
        np.arange(len(targets)), test_size=_DIGITS_TEST_EXAMPLES, stratify=bunch["target"], random_state=0
    )
    chosen = np.sort(train if split == "train" else test)
    names = tuple(str(name) for name in bunch["target_names"])
    return ImageDataset.normalized_by(pixels[train], pixels[chosen], targets[chosen], names)


def load_cifar10(root: str | os.PathLike[str] = _CIFAR10_ROOT, split: Split = "train") -> ImageDataset:
    """Load CIFAR-10 (Krizhevsky 2009) through torchvision: 3×32×32 images, 50,000 for training and 10,000 for testing.

    Args:
        root: Directory with `cifar-10-batches-py`, which is downloaded and checked if it is not there.
        split: `"train"` or `"test"`.

    Raises:
        DataError: It is not there and cannot be downloaded.
        OptionError: The split is unknown.
    """
    from torchvision.datasets import CIFAR10

    check_choice("split", split, SPLITS)
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
    known, images = (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in (train, chosen))
    return ImageDataset.normalized_by(known, images, torch.tensor(chosen.targets), tuple(chosen.classes))


def load_image_folder(
    root: str | os.PathLike[str],
    split: Split = "train",
    *,
    mean: Statistics | None = None,
    std: Statistics | None = None,
    resize: Size | None = None,
    progress: bool | None = None,
) -> ImageDataset:
    """Decode a folder of images in the layout of `torchvision.datasets.ImageFolder`.

    Images lie in `root/train/CLASS/` and `root/test/CLASS/`; a root with neither directory may hold the
    classes of the training split itself. They are read as RGB and must be of one size, or are resized to one.

    Args:
        root: The directory.
        split: `"train"` or `"test"`.
        mean: Mean that images are normalised by, with `std`; see `load_data`. By default both are those of the training
            split, which is then decoded for either split.
        std: Standard deviation, likewise.
        resize: Scale images, bilinearly, until their shorter side has this many pixels, and cut out the middle square;
            two numbers are the shorter side and the side of the square, such as (256, 224).
        progress: Show a bar while images are decoded; by default on a terminal and in notebooks.

    Raises:
        DataError: The directory or its classes are missing, the test split has other classes than the
            training split, a file is not an image, or images differ in size.
        OptionError: The split is unknown, or another option is not what it should be.
    """
    check_choice("split", split, SPLITS)
    check_both(mean, std)
    scaled = resizing(resize)
    listed = list_images(root, split)
    targets, classes = torch.tensor(listed.targets), tuple(listed.classes)
    if mean is not None and std is not None:
        means, stds = statistics(mean, std, channels=3)
        return ImageDataset(_decode(listed, scaled, progress=progress), targets, classes, means, stds)
    images = _decode(listed, scaled, progress=progress)
    training = images if split == "train" else _decode(list_images(root, "train"), scaled, progress=progress)
    return ImageDataset.normalized_by(training, images, targets, classes)


def list_images(root: str | os.PathLike[str], split: Split) -> "ImageFolder":
    """List the images of a split and their classes, which must be those of the training split if there is one.

    Raises:
        DataError: The directory or its classes are missing, or the splits have different classes.
    """
    root = Path(root).expanduser()
    listed = _list_split(root, split)
    if split == "test" and (root / "train").is_dir():
        _check_same_classes(root, listed.classes, _list_split(root, "train").classes)
    return listed


def _check_same_classes(root: Path, classes: Sequence[str], known: Sequence[str]) -> None:
    if classes != known:
        strange = [
            f"{name!r} is only in the {'training' if name in known else 'test'} split"
            for name in sorted(set(classes) ^ set(known))
        ]
        more = f", and {len(strange) - _CLASSES_SHOWN} more" if len(strange) > _CLASSES_SHOWN else ""
        raise DataError(
            f"The splits in {root} have different classes: {', '.join(strange[:_CLASSES_SHOWN])}{more}; expected the "
            "same directories in both."
        )


def _list_split(root: Path, split: Split) -> "ImageFolder":
    from torchvision.datasets import ImageFolder

    if not root.is_dir():
        raise DataError(
            f"Data {str(root)!r} is neither 'digits' nor 'cifar10' nor a directory; expected a directory of images, "
            "ROOT/train/CLASS/*.png and ROOT/test/CLASS/*.png."
        )
    # A root without splits is the training split itself.
    has_splits = any((root / each).is_dir() for each in SPLITS)
    directory = root / split if has_splits or split == "test" else root
    if not directory.is_dir():
        raise DataError(
            f"{root} has no {split!r} split; expected the directory {directory} with a directory per class."
        )
    try:
        return ImageFolder(directory, loader=open_image)
    except FileNotFoundError as error:
        raise DataError(
            f"{directory} is not a folder of images ({error}); expected {directory}/CLASS/*.png (or .jpg, …) with at "
            "least one image in the directory of each class."
        ) from error


def open_image(path: str) -> "Image":
    """An image file in RGB.

    Raises:
        DataError: It cannot be read, or its pixels are not of eight bits, which would all become the largest or the
            smallest value.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(
                    f"{path} has pixels of more than eight bits (mode {image.mode!r}); convert it to eight bits."
                )
            return image.convert("RGB")
    except DataError:
        raise
    # Pillow reports broken files as a SyntaxError or whatever else it stumbles over.
    except Exception as error:
        raise DataError(f"{path} cannot be read as an image ({error}).") from error


def _decode(
    folder: "ImageFolder", scaled: "Callable[[Image], Image]", *, progress: bool | None
) -> UInt8[Tensor, "examples 3 height width"]:
    from torchvision.transforms.functional import pil_to_tensor

    paths = [path for path, _ in folder.samples]
    images = torch.empty(0, dtype=torch.uint8)
    off = None if progress is None else not progress
    for index, path in enumerate(tqdm(paths, desc=f"decoding {folder.root}", unit="image", disable=off)):
        image = pil_to_tensor(scaled(folder[index][0]))
        if index == 0:
            images = image.new_empty((len(paths), *image.shape))
        if image.shape != images.shape[1:]:
            sizes = [f"{width}×{height}" for *_, height, width in (image.shape, images.shape)]
            raise DataError(
                f"{path} is {sizes[0]} pixels but {paths[0]} is {sizes[1]}; all images must have one size, so "
                "pass resize=SIZE (--resize on the command line)."
            )
        images[index] = image
    return images
