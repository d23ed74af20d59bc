"""Torch's Gaussian likelihood as a loss, with the derivatives of its values."""

import math
from typing import Any

import torch
from torch import Tensor

_REDUCTIONS = {"mean": torch.mean, "sum": torch.sum, "none": torch.clone}


def gaussian_nll_loss(
    input: Tensor, target: Tensor, var: Any, full: bool = False, eps: float = 1e-6, reduction: str = "mean"
) -> Any:
    """½ (log v + (x − t)² / v) with v = max(var, eps), and ½ log 2π more if `full`.

    Torch lifts small variances where autograd does not see it, so that they have a slope which the loss has not. It
    also asks every variance for its sign, which cannot be captured; here that is asked where the loss is evaluated.

    Returns:
        The loss, or NotImplemented for what torch refuses, and for a variance that is a plain number.
    """
    if not isinstance(var, Tensor) or reduction not in _REDUCTIONS:
        return NotImplemented
    if not torch.compiler.is_compiling() and bool((var < 0).any()):
        return NotImplemented
    if var.shape == input.shape[:-1]:
        var = var.unsqueeze(-1)
    others = [size for own, size in zip(input.shape, var.shape, strict=False) if own != size]
    if var.ndim != input.ndim or others not in ([], [1]):
        return NotImplemented
    lifted = var.clamp_min(eps)
    loss = 0.5 * (torch.log(lifted) + (input - target) ** 2 / lifted)
    return _REDUCTIONS[reduction](loss + 0.5 * math.log(2 * math.pi) if full else loss)
