"""Networks, losses and data sets by name."""

from lmc_curvature.sources.data import load_cifar10, load_data, load_digits, load_image_folder
from lmc_curvature.sources.images import Batches, ImageDataset, Split
from lmc_curvature.sources.losses import find_loss
from lmc_curvature.sources.models import make_model, model_names
from lmc_curvature.sources.resnets import cifar_resnet18, digits_resnet, resnet, resnet20
from lmc_curvature.sources.transforms import TransformedImages, transformed_folder

__all__ = [
    "Batches",
    "ImageDataset",
    "Split",
    "TransformedImages",
    "cifar_resnet18",
    "digits_resnet",
    "find_loss",
    "load_cifar10",
    "load_data",
    "load_digits",
    "load_image_folder",
    "make_model",
    "model_names",
    "resnet",
    "resnet20",
    "transformed_folder",
]
