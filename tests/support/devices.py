"""Tests that need a device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch


def gpu(test: Callable[..., Any]) -> Any:
    """Mark a test that needs a CUDA device; it is skipped where there is none."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(skip(test))
