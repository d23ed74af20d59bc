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
