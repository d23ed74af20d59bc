"""Training of a parent, and of siblings forked from it, in a directory that any number of processes may work on."""

from lmc_curvature.forking.configuration import ForkConfig, TraceConfig, TrainingConfig, load_config
from lmc_curvature.forking.directory import ForkDirectory, initial_model, load_child, load_parent, open_directory
from lmc_curvature.forking.experiment import run_forks
from lmc_curvature.forking.provenance import load_fork_data
from lmc_curvature.forking.sharing import cpu_threads
from lmc_curvature.forking.state import EpochMetrics, TrainingState
from lmc_curvature.forking.trainer import Trainer
from lmc_curvature.forking.training import evaluate, train

__all__ = [
    "EpochMetrics",
    "ForkConfig",
    "ForkDirectory",
    "TraceConfig",
    "Trainer",
    "TrainingConfig",
    "TrainingState",
    "cpu_threads",
    "evaluate",
    "initial_model",
    "load_child",
    "load_config",
    "load_fork_data",
    "load_parent",
    "open_directory",
    "run_forks",
    "train",
]
