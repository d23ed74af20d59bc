"""Parents, and children forked from them: networks, data sets, training, and the files of an experiment."""

from lmc_curvature.checkpoints import load_checkpoint
from lmc_curvature.forking.directory import (
    ForkDirectory,
    load_child,
    load_parent,
    open_directory,
)
from lmc_curvature.forking.experiment import run_forks
from lmc_curvature.forking.plan import ForkConfig, TraceConfig, load_config
from lmc_curvature.forking.provenance import load_fork_data
from lmc_curvature.forking.training import EpochMetrics, TrainingConfig, TrainingState, evaluate, train
from lmc_curvature.sources.data import (
    Batches,
    ImageDataset,
    load_cifar10,
    load_data,
    load_digits,
    load_image_folder,
)
from lmc_curvature.sources.networks import (
    CifarResNet,
    cifar_resnet18,
    digits_resnet,
    make_model,
    model_names,
    resnet,
    resnet20,
)
from lmc_curvature.tracing.traces import Traces, read_traces
from lmc_curvature.tracing.tracing import trace_forks

__all__ = [
    "Batches",
    "CifarResNet",
    "EpochMetrics",
    "ForkConfig",
    "ForkDirectory",
    "ImageDataset",
    "TraceConfig",
    "Traces",
    "TrainingConfig",
    "TrainingState",
    "cifar_resnet18",
    "digits_resnet",
    "evaluate",
    "load_checkpoint",
    "load_child",
    "load_cifar10",
    "load_config",
    "load_data",
    "load_digits",
    "load_fork_data",
    "load_image_folder",
    "load_parent",
    "make_model",
    "model_names",
    "open_directory",
    "read_traces",
    "resnet",
    "resnet20",
    "run_forks",
    "trace_forks",
    "train",
]
