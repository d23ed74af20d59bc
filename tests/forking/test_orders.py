"""Claim: every run and epoch has an order of its own, which depends on nothing else."""

import pytest
import torch

from lmc_curvature.errors import OptionError
from lmc_curvature.forking.orders import epoch_generator, order_seed


def test_parent_and_children_have_orders_of_their_own():
    assert [order_seed(3, child) for child in (None, 0, 1)] == [3, 4, 5]


def test_orders_of_different_seeds_and_epochs_differ():
    draws = {(s, e): torch.rand((), generator=epoch_generator(s, e)).item() for s in range(20) for e in range(20)}
    assert len(set(draws.values())) == 400
    with pytest.raises(OptionError, match="order_seed=-1 must not be negative"):
        epoch_generator(-1, 0)
