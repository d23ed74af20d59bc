"""Fixtures for all tests."""

import jaxtyping
import pytest


@pytest.fixture
def untyped(monkeypatch):
    """Switch the checks of annotations off: what the library itself says about a bad argument is then visible."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
