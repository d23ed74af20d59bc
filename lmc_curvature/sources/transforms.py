"""Folders of images that a function of one's own turns into tensors, decoded whenever a batch is taken."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lmc_curvature.errors import DataError, OptionError, check_choice
from lmc_curvature.sources.data import list_images, open_image
from lmc_curvature.sources.images import SPLITS, Split, fixed_sample, mixed_order

if TYPE_CHECKING:
    import os

Transform = Callable[[Any], Tensor]
"""From an image of Pillow, in RGB, to a tensor of floating-point numbers; of one shape for all images."""


@dataclass(frozen=True, eq=False)
class TransformedImages:
    """A loader of `(x, y)` batches of image files, in a fixed random order.

    Attributes:
        paths: The files, in the order in which they are visited.
        targets: The index of each one's class.
        transform: What makes a tensor of an image.
        batch_size: Examples a batch; the last one may have fewer.

    Raises:
        OptionError: The batch size is not positive.
        DataError: The first image does not become a tensor of floating-point numbers.
    """

    paths: tuple[Path, ...]
    targets: Tensor
    transform: Transform
    batch_size: int

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise OptionError(f"batch_size={self.batch_size} must be at least 1.")
        self._image(self.paths[0])

    def __len__(self) -> int:
        return -(-len(self.paths) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.paths), self.batch_size):
            chosen = slice(start, start + self.batch_size)
            yield self._stacked(self.paths[chosen]), self.targets[chosen].clone()

    def fingerprint(self) -> str:
        """Return the SHA-256 of the image files and their labels; the transform is not part of it."""
        digest = hashlib.sha256()
        for path, target in sorted(zip(self.paths, self.targets.tolist(), strict=True)):
            digest.update(f"{target} ".encode() + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()

    def _stacked(self, paths: tuple[Path, ...]) -> Tensor:
        images = [self._image(path) for path in paths]
        for path, image in zip(paths, images, strict=True):
            if image.shape != images[0].shape:
                raise DataError(
                    f"transform makes {path} of shape {tuple(image.shape)} and {paths[0]} of {tuple(images[0].shape)}; "
                    "all must have one shape, so resize or crop images in it."
                )
        return torch.stack(images)

    def _image(self, path: Path) -> Tensor:
        image = open_image(str(path))
        try:
            made = self.transform(image)
        except TypeError as error:
            raise DataError(
                f"transform cannot be called with an image ({error}); expected a function from an image of Pillow to a "
                "tensor."
            ) from error
        if not (isinstance(made, Tensor) and made.is_floating_point()):
            kind = str(made.dtype) if isinstance(made, Tensor) else type(made).__name__
            raise DataError(f"transform makes {kind} of {path}; expected a tensor of floating-point numbers.")
        return made


def transformed_folder(
    root: "str | os.PathLike[str]",
    transform: Transform,
    batch_size: int,
    *,
    split: Split = "train",
    limit: int | None = None,
) -> TransformedImages:
    """Return a loader of a folder of images, in the layout of `load_image_folder`, transformed one by one.

    Args:
        root: The directory.
        transform: From an image of Pillow to a tensor.
        batch_size: Examples a batch.
        split: `"train"` or `"test"`.
        limit: Keep at most this many examples, a fixed random sample: the same as `load_data` keeps.

    Raises:
        DataError: The directory or its classes are missing, or the transform does not make tensors.
        OptionError: The split is unknown, or the limit or the batch size is not positive.
    """
    check_choice("split", split, SPLITS)
    samples = list_images(root, split).samples
    chosen = fixed_sample(len(samples), limit)
    visited = chosen[mixed_order(len(chosen))].tolist()
    paths, targets = zip(*(samples[index] for index in visited), strict=True)
    return TransformedImages(tuple(map(Path, paths)), torch.tensor(targets), transform, batch_size)
