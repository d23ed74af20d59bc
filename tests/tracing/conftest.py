"""One experiment that takes a second, trained and traced once for all tests."""

import shutil

import pytest

from lmc_curvature.forking import ForkConfig, run_forks
from lmc_curvature.tracing import trace_forks


@pytest.fixture(scope="session")
def settings():
    return {
        "training": {"epochs": 2, "learning_rate": 0.1, "batch_size": 50},
        "fork_epochs": [0, 1],
        "snapshot_epochs": [1],
        "limit": 100,
        "model": "tests.support.experiments:tiny",
        "threads": 1,
        "trace": {"examples": 80, "batch_size": 50, "alphas": 5, "layer_alphas": 3, "cumulative": "last"},
    }


@pytest.fixture(scope="session")
def config(settings):
    return ForkConfig(**settings)


@pytest.fixture(scope="session")
def traced(config, tmp_path_factory):
    """The directory and its tables: fork 0 at epochs 1 and 2, fork 1 at epoch 2."""
    path = tmp_path_factory.mktemp("traced")
    run_forks(config, path, progress=False)
    return path, trace_forks(path, progress=False)


@pytest.fixture
def copy(traced, tmp_path):
    """A traced experiment that a test may damage."""
    shutil.copytree(traced[0], tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def untraced(copy):
    """A trained experiment of which nothing is traced."""
    shutil.rmtree(copy / "traces")
    return copy
