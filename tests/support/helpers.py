"""A helper of networks in a module of its own, which they reach as `helpers.bounded`."""

from torch import Tensor


def bounded(x: Tensor, options: object) -> Tensor:
    return x.clamp(max=options.bound)
