"""The loader that the options of a comparison stand for."""

import dataclasses
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lmc_curvature.cli.parsing import image_options
from lmc_curvature.errors import DataError, OptionError
from lmc_curvature.sources import Batches, transformed_folder
from lmc_curvature.sources.augmentation import Crops
from lmc_curvature.sources.data import is_image_folder, load_data
from lmc_curvature.sources.libraries import is_of_text
from lmc_curvature.sources.models import import_function

if TYPE_CHECKING:
    from lmc_curvature.cli.options import Comparison
    from lmc_curvature.sources import Split

_PREPARATION = ("mean", "std", "resize", "transform")
# What a loader of one's own has decided itself.
_CHOICE = ("split", "limit", "batch_size")


def make_batches(comparison: "Comparison", *, augment: bool = False) -> Iterable[Any]:
    """The loader of a data set known by name, or what a factory returns.

    Args:
        comparison: The options.
        augment: Crop and mirror the images of a data set known by name, as training does.

    Raises:
        LMCCurvatureError: There is no such data set or factory, or an option does not go with it.
    """
    if not is_known_by_name(comparison.data):
        return _own_batches(comparison)
    if is_of_text(comparison.model):
        raise OptionError(
            f"--model {comparison.model} reads text, and --data {comparison.data} are images. Pass --data "
            "package.module:factory, a function that returns batches such as {'input_ids': …, 'attention_mask': …, "
            "'labels': …}, with --loss own or, of causal language models, next-token."
        )
    is_folder = is_image_folder(comparison.data)
    if comparison.transform is not None:
        if not is_folder:
            raise OptionError(f"--transform is for folders of images; {comparison.data} takes --mean and --std.")
        if augment:
            raise OptionError(
                "Images of a --transform are not augmented here: pass --recalibration package.module:factory with a "
                "loader of images as in training, or --augmentation none."
            )
        transform = import_function(comparison.transform, what=f"--transform {comparison.transform}")
        options = {"split": comparison.split, "limit": comparison.limit}
        return transformed_folder(comparison.data, transform, comparison.batch_size, **options)
    prepared = image_options(comparison.mean, comparison.std, comparison.resize, None)
    data = load_data(comparison.data, comparison.split, comparison.limit, **prepared, progress=comparison.progress)
    if is_folder and comparison.mean is None:
        mean, std = (",".join(f"{value:.3f}" for value in values.tolist()) for values in (data.mean, data.std))
        warnings.warn(
            f"{comparison.data}: images are normalised by the mean {mean} and standard deviation {std} of their own "
            "training split; networks that were trained with others need --mean and --std, or --transform.",
            stacklevel=2,
        )
    crops = Crops.draw(len(data), torch.Generator().manual_seed(0)) if augment else None
    return data.batches(comparison.batch_size, crops=crops)


def make_recalibration_batches(comparison: "Comparison") -> Iterable[Any] | None:
    """The loader to re-estimate statistics on, of the training split; None for the loader of the data themselves.

    Raises:
        LMCCurvatureError: There is no such data set or factory, or an option does not go with it.
    """
    if comparison.recalibration is None and not is_known_by_name(comparison.data):
        return None
    data = comparison.recalibration or comparison.data
    augmentation = comparison.augmentation or ("none" if data == "digits" else "crop-flip")
    other = dataclasses.replace(comparison, data=data, split="train")
    if not is_known_by_name(data):
        if comparison.augmentation is not None:
            raise OptionError(f"--augmentation is for images known by name; {data} makes its own loader.")
        other = _for_own_loader(other)
    return make_batches(other, augment=augmentation == "crop-flip")


def with_other_data(comparison: "Comparison", data: str, split: "Split", loader: Iterable[Any]) -> "Comparison":
    """The options for other data, of which images are prepared as those of the loader are."""
    prepared: dict[str, Any] = {}
    if not is_known_by_name(data):
        return _for_own_loader(dataclasses.replace(comparison, data=data))
    if isinstance(loader, Batches):
        statistics = {"mean": loader.dataset.mean, "std": loader.dataset.std}
        prepared = {name: ",".join(map(repr, values.tolist())) for name, values in statistics.items()}
    return dataclasses.replace(comparison, data=data, split=split, **prepared)


def is_known_by_name(data: str) -> bool:
    """Whether data are a data set known by name, and not a function that makes a loader."""
    module, colon, _ = data.partition(":")
    # A path may hold a colon, too; an existing folder is meant as such, and cifar10:ROOT is a data set.
    return not colon or module == "cifar10" or Path(data).exists()


def _for_own_loader(comparison: "Comparison") -> "Comparison":
    return dataclasses.replace(comparison, **_defaults(comparison))


def _defaults(comparison: "Comparison") -> dict[str, Any]:
    """What prepares and chooses examples, as it is where it is not given."""
    defaults = {field.name: field.default for field in dataclasses.fields(comparison)}
    return {name: defaults[name] for name in (*_PREPARATION, *_CHOICE)}


def _own_batches(comparison: "Comparison") -> Iterable[Any]:
    make_loader = import_function(comparison.data, what=f"--data {comparison.data}")
    try:
        loader = make_loader()
    except TypeError as error:
        raise DataError(
            f"--data {comparison.data}: {error}. Expected a function without arguments that returns a loader."
        ) from error
    for name, default in _defaults(comparison).items():
        if getattr(comparison, name) != default:
            option = f"--{name.replace('_', '-')}"
            raise OptionError(f"{option} is for images known by name; {comparison.data} makes its own loader.")
    return loader
