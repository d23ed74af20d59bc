"""The name of a loss, which a file can hold where the loss itself cannot be written to one."""

import functools
from typing import Any

import numpy as np
import torch.nn.functional as F
from jaxtyping import Real

from lmc_curvature.errors import counted
from lmc_curvature.objective import BatchLoss
from lmc_curvature.objective.classification import torch_function

DEFAULT_LOSS, _SIZE = "cross_entropy", ", size="

# What cross-entropy is where nothing else is asked of it.
_PLAIN = {"ignore_index": -100, "label_smoothing": 0.0, "reduction": "mean"}


def loss_name(loss_fn: Any) -> str:
    """The name of a loss: `DEFAULT_LOSS` for plain cross-entropy alone, whether as a function or as a module."""
    function, options = torch_function(loss_fn)
    is_plain = all(options.get(name, plain) == plain for name, plain in _PLAIN.items())
    if function is F.cross_entropy and is_plain and options.get("weight") is None:
        return DEFAULT_LOSS
    if isinstance(loss_fn, BatchLoss):
        return f"BatchLoss({_named(loss_fn.fn)}{_SIZE + _named(loss_fn.size) if loss_fn.size else ''})"
    if isinstance(loss_fn, functools.partial):
        return f"{_named(loss_fn.func)} with options"
    return f"another {DEFAULT_LOSS}" if _named(loss_fn) == DEFAULT_LOSS else _named(loss_fn)


def unit_of(loss: str | None) -> str:
    """What the batches of a loss of some name are counted in: a loss with a size of its own counts what it likes."""
    _, has_size, size = (loss or "").partition(_SIZE)
    return "token" if "token" in size else "unit" if has_size else "example"


def data_in_words(number: int, weights: Real[np.ndarray, " batches"], loss: str | None) -> str:
    """How many examples, or tokens, some numbers were computed from, and what they weigh if that is not their number.

    Args:
        number: How many there are.
        weights: What each batch counts for in means.
        loss: Name of the loss; see `loss_name`.
    """
    unit, total = unit_of(loss), float(weights.sum())
    found = counted(number, unit) + (" (as the size of its loss counts)" if unit == "unit" else "")
    return found if total == number else f"{found} that weigh {total:.6g}"


def _named(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)
