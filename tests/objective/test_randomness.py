"""Claim: who draws random numbers is found by name, and the global generators are left as they were."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmc_curvature import BatchLoss, Objective
from lmc_curvature.errors import UnsupportedModelError
from lmc_curvature.objective.randomness import drawing_module, global_rng_preserved
from tests.support.networks import rng_states, untouched

X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3


class AlwaysDropout(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5)


class StubbornDropout(nn.Dropout):
    def train(self, mode=True):
        return super().train(True)


class Noise(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        return x + self.draw()


DRAWING = {
    "functional dropout": AlwaysDropout,
    "dropout that stays on": StubbornDropout,
    "torch": lambda: Noise(lambda: torch.randn(())),
    "numpy": lambda: Noise(lambda: np.random.rand()),  # noqa: NPY002
    "random": lambda: Noise(random.random),
}
drawing = pytest.mark.parametrize("make", DRAWING.values(), ids=DRAWING)


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


@drawing
def test_the_drawing_module_is_named(make):
    layer = make()
    network = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"inner": layer, "unused": AlwaysDropout()})["inner"])
    network = nn.Sequential(network, nn.Linear(4, 3))
    with untouched(network), pytest.raises(UnsupportedModelError) as caught:
        Objective(network, [(X, Y)]).loss()
    assert str(caught.value).startswith(f"Module '0.1' ({type(layer).__name__}) draws random numbers")
    assert "Switch the randomness off" in str(caught.value)
    assert "training=self.training" in str(caught.value)


@drawing
def test_a_loss_that_draws_is_refused(make):
    noise, network = make(), nn.Linear(4, 3)
    for loss_fn in (
        lambda output, target: F.cross_entropy(noise(output), target),
        BatchLoss(lambda model, batch: F.cross_entropy(noise(model(batch[0])), batch[1])),
    ):
        with untouched(network), pytest.raises(UnsupportedModelError, match="^The loss draws random numbers"):
            Objective(network, [(X, Y)], loss_fn=loss_fn).gradient()


def test_a_network_that_draws_by_itself_is_refused():
    with pytest.raises(UnsupportedModelError, match="^The network draws random numbers"):
        Objective(Noise(lambda: torch.rand(6, 4)), [(X, Y)]).loss()


class _DrawingLoss(nn.Module):
    def forward(self, output, target):
        return F.cross_entropy(F.dropout(output), target)


def test_a_loss_module_that_draws_is_refused():
    with pytest.raises(UnsupportedModelError, match="^The loss_fn draws random numbers"):
        Objective(nn.Linear(4, 3), [(X, Y)], loss_fn=_DrawingLoss()).loss()


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


def test_noise_from_a_generator_of_its_own_is_refused():
    generator = torch.Generator().manual_seed(0)
    noise = nn.Linear(2, 2)
    noise.register_forward_hook(lambda _module, _args, output: output + torch.randn(2, generator=generator))
    with pytest.raises(UnsupportedModelError, match="a module draws from a generator of its own"):
        Objective(noise, [(torch.ones(3, 2), torch.zeros(3, dtype=torch.long))]).loss()
