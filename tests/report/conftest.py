import dataclasses

import pytest

from tests.figures.conftest import anchored, traces  # noqa: F401
from tests.support.browser import browser
from tests.tracing.conftest import config, settings, traced  # noqa: F401


@pytest.fixture(scope="session")
def open_page():
    """Open a page in Chromium."""
    with browser() as open_page:
        yield open_page


@pytest.fixture(scope="session")
def pair(forks):
    """A prediction and its measurement, each layer alone among it."""
    return forks[3]


@pytest.fixture(scope="session")
def named():
    """A prediction whose layers have other names."""

    def named(prediction, names):
        groups = None if prediction.groups is None else dict(zip(names, prediction.groups.values(), strict=True))
        return dataclasses.replace(prediction, layers=tuple(names), groups=groups)

    return named
