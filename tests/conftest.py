"""Fixtures for all tests, and which variants of a test run when."""

import os
from collections import Counter

import jaxtyping
import pytest
import torch

pytest_plugins = ["tests.support.drawing"]

# Lightning has torch look for a driver whenever it is asked whether there is a device: captures ask all the time.
if not torch.cuda.is_available():
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_addoption(parser):
    parser.addoption("--variants", type=int, help="run at most so many variants of a test with parameters")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Leave out what `--variants` says; the first n variants of a test marked `check(after=n)` lose that mark."""
    most = config.getoption("--variants") or len(items)
    seen: Counter[str] = Counter()
    kept, left = [], []
    for item in items:
        test = item.nodeid.partition("[")[0]
        seen[test] += 1
        (kept if seen[test] <= most else left).append(item)
        item.own_markers = [
            mark for mark in item.own_markers if mark.name != "check" or seen[test] > mark.kwargs.get("after", 0)
        ]
    items[:] = kept
    config.hook.pytest_deselected(items=left)


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
