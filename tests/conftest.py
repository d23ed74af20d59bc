"""Fixtures for all tests."""

import jaxtyping
import pytest
import torch

pytest_plugins = ["tests.support.drawing"]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Networks this small compute as fast on one thread, and many times faster when the cores are shared."""
    torch.set_num_threads(1)


@pytest.fixture
def untyped(monkeypatch):
    """Switch the checks of annotations off: what the library itself says about a bad argument is then visible."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def small_files():
    """No file may be larger than it was told to be: the system then refuses as a full disk does."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
