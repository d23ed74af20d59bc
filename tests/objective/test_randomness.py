"""Claim: who draws random numbers is found by name, and the global generators are left as they were."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from lmc_curvature.objective.randomness import drawing_module, global_rng_preserved
from tests.support.networks import AlwaysDropout, StubbornDropout, rng_states, untouched

X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3


def _draw_from_all():
    torch.randn(3), np.random.rand(3), random.random()  # noqa: NPY002


@pytest.mark.parametrize("error", [None, ValueError])
def test_generators_are_restored_when_the_block_ends(error):
    before = rng_states()
    try:
        with global_rng_preserved():
            _draw_from_all()
            assert all(now != then for now, then in zip(rng_states()[:2], before[:2], strict=True))
            assert rng_states()[2:] != before[2:]
            if error:
                raise error
    except ValueError:
        pass
    assert rng_states() == before


@pytest.mark.parametrize(
    ("network", "name"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.Dropout().eval()), None),
        (nn.Sequential(AlwaysDropout(), StubbornDropout()), "0"),
        (nn.Sequential(nn.Identity(), nn.Sequential(AlwaysDropout())), "1.0"),
        (AlwaysDropout(), ""),
    ],
)
def test_the_innermost_first_module_is_found(network, name):
    with untouched(network):
        assert drawing_module(network, lambda: network(X)) == name


def test_hooks_and_generators_go_back_after_an_error():
    network = nn.Sequential(AlwaysDropout(), nn.Linear(7, 7))
    with untouched(network), pytest.raises(RuntimeError, match="mat1 and mat2"):
        drawing_module(network, lambda: network(X))
