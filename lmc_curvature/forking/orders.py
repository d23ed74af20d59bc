"""The order of the examples of every run and epoch: siblings see the same images in different orders."""

import numpy as np
import torch

from lmc_curvature.errors import OptionError


def order_seed(base: int, child: int | None = None) -> int:
    """The order seed of the parent, or of a child: the same at every fork, so that forks differ by their epoch alone.

    Args:
        base: The seed of the configuration.
        child: Number of the child, from 0; None for the parent.
    """
    return base if child is None else base + 1 + child


def epoch_generator(order_seed: int, epoch: int) -> torch.Generator:
    """The CPU random generator of one epoch of one run: a function of both numbers and nothing else.

    Raises:
        OptionError: The seed is negative.
    """
    if order_seed < 0:
        raise OptionError(f"order_seed={order_seed} must not be negative.")
    # Mixing, rather than adding, keeps (seed 0, epoch 1) apart from (seed 1, epoch 0).
    mixed = np.random.SeedSequence([order_seed, epoch]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed >> np.uint64(1)))
