"""Fixtures for tests of benchmarks."""

import pytest


@pytest.fixture(autouse=True)
def _untyped(untyped):
    """Annotations are checked by the tests of the library; here that would take most of the time."""
