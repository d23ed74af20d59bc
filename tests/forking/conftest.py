"""One experiment that takes half a second, trained once for all tests."""

import shutil

import pytest

from lmc_curvature.forking import ForkConfig, run_forks
from tests.support.experiments import WATCH

SETTINGS = {
    "training": {"epochs": 3, "learning_rate": 0.1, "batch_size": 50},
    "fork_epochs": [0, 2],
    "snapshot_epochs": 1,
    "limit": 150,
    "model": "tests.support.experiments:watched",
}


@pytest.fixture(scope="session")
def settings():
    """Three steps an epoch: the first of each run are 1 for the parent, 10 and 19 at fork 0, 28 and 31 at fork 2."""
    return SETTINGS


@pytest.fixture(scope="session")
def config():
    return ForkConfig(**SETTINGS)


@pytest.fixture(scope="session")
def finished(config, tmp_path_factory):
    return run_forks(config, tmp_path_factory.mktemp("forks"), progress=False)


@pytest.fixture
def copy(finished, tmp_path):
    """A finished experiment that a test may damage."""
    shutil.copytree(finished.path, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def watch(finished):
    """Watches what is trained from here on."""
    WATCH.reset()
    yield WATCH
    WATCH.reset()
