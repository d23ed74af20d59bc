"""The name of a loss, which a file can hold where the loss itself cannot be written to one."""

import functools
from typing import Any

import torch.nn.functional as F

from lmc_curvature.objective import BatchLoss
from lmc_curvature.objective.classification import torch_function

DEFAULT_LOSS = "cross_entropy"

# What cross-entropy is where nothing else is asked of it.
_PLAIN = {"ignore_index": -100, "label_smoothing": 0.0, "reduction": "mean"}


def loss_name(loss_fn: Any) -> str:
    """The name of a loss: `DEFAULT_LOSS` for plain cross-entropy alone, whether as a function or as a module."""
    function, options = torch_function(loss_fn)
    is_plain = all(options.get(name, plain) == plain for name, plain in _PLAIN.items())
    if function is F.cross_entropy and is_plain and options.get("weight") is None:
        return DEFAULT_LOSS
    if isinstance(loss_fn, BatchLoss):
        return f"BatchLoss({_named(loss_fn.fn)})"
    return f"{_named(loss_fn.func)} with options" if isinstance(loss_fn, functools.partial) else _named(loss_fn)


def _named(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)
