"""Parents, and children forked from them: networks, data sets, training, and the files of an experiment."""

from lmc_curvature.forking.checkpoints import load_checkpoint
from lmc_curvature.forking.data import Batches, ImageDataset, load_data, load_digits, load_image_folder
from lmc_curvature.forking.directory import (
    ForkConfig,
    ForkDirectory,
    load_child,
    load_fork_data,
    load_parent,
    open_directory,
)
from lmc_curvature.forking.experiment import run_forks
from lmc_curvature.forking.models import CifarResNet, digits_resnet, make_model, model_names, resnet, resnet20
from lmc_curvature.forking.training import EpochMetrics, TrainingConfig, TrainingState, evaluate, train

__all__ = [
    "Batches",
    "CifarResNet",
    "EpochMetrics",
    "ForkConfig",
    "ForkDirectory",
    "ImageDataset",
    "TrainingConfig",
    "TrainingState",
    "digits_resnet",
    "evaluate",
    "load_checkpoint",
    "load_child",
    "load_data",
    "load_digits",
    "load_fork_data",
    "load_image_folder",
    "load_parent",
    "make_model",
    "model_names",
    "open_directory",
    "resnet",
    "resnet20",
    "run_forks",
    "train",
]
