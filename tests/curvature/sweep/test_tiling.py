"""Claim: examples and directions are cut to the budget and to the cache, or refused with the size that is needed."""

import itertools
import re

import pytest
import torch
from torch import nn

from lmc_curvature import Objective, project_hessian
from lmc_curvature.curvature.sweep import compile_batch, evaluate_batch
from lmc_curvature.curvature.sweep.tiling import budget_bytes, choose_tiling, groups
from lmc_curvature.errors import MemoryBudgetError
from lmc_curvature.objective.batches import Batch
from tests.support.cases import CASES
from tests.support.networks import randomized
from tests.support.sweeping import assert_projections_agree, compiled_batches, layer_directions, posed, swept

_MIB = 2.0**20
_CPU = torch.device("cpu")
# A device of which no cache is known; nothing is computed there.
_GPU = torch.device("cuda")


def _objective(name, sizes):
    case = CASES[name]
    return Objective(case.model(), case.batches(sizes), **case.options)


def _needed(objective, directions):
    """The least budget, in GiB, according to the refusal of a smaller one."""
    with pytest.raises(MemoryBudgetError) as refusal:
        project_hessian(objective, {}, directions, method="sweep", memory_gib=1e-9)
    return float(re.search(r"about ([\d.e+-]+) GiB", str(refusal.value))[1])


# Four of the six directions reach the hidden units of `layers`, before and after the activation: 8 KiB an example.
_TANGENTS = 4 * 2 * 8 * 2**10


@pytest.fixture(scope="module")
def layers():
    """A network of two layers and its loss, captured for two examples, and six directions."""
    objective = Objective(
        randomized(nn.Sequential(nn.Linear(4, 1024), nn.Tanh(), nn.Linear(1024, 2)).double()),
        [(torch.ones(2, 4, dtype=torch.float64), torch.zeros(2, dtype=torch.int64))],
    )
    state = objective.state()
    directions = [{name: torch.ones_like(tensor)} for name, tensor in state.items()] + [state, state]
    problem, batch = posed(objective, directions), Batch(0, 2, objective.loader[0])
    compiled = compile_batch(problem, batch, evaluate_batch(objective, problem.points[0], batch), whole=False)
    return compiled.networks[2], compiled.loss, directions


def _chosen(layers, size, *, device=_CPU, budget=2.0**60, whole=False):
    network, loss, directions = layers
    return choose_tiling(network, loss, directions, probe=2, size=size, whole=whole, budget=budget, device=device)


def test_a_batch_that_fits_is_not_cut(layers):
    tiling = _chosen(layers, 64)
    assert (tiling.examples, tiling.directions, tiling.keeps_values) == (64, 6, True)


def test_on_a_processor_tangents_fit_the_cache(layers):
    tiling = _chosen(layers, 100_000)
    assert 0.9 * 32 * _MIB < tiling.examples * _TANGENTS <= 128 * _MIB
    assert tiling.directions == 6
    assert tiling.keeps_values


def test_the_budget_limits_the_tiles_of_any_device(layers):
    assert _chosen(layers, 4096, device=_GPU).examples == 4096
    sizes = []
    for budget in (128 * _MIB, 64 * _MIB, 32 * _MIB):
        tiling = _chosen(layers, 4096, device=_GPU, budget=budget)
        assert tiling.examples * _TANGENTS < budget
        sizes.append(tiling.examples)
    assert sizes == sorted(sizes, reverse=True)
    assert len({*sizes}) == 3


def test_values_are_computed_anew_where_they_would_take_half_of_the_budget(layers):
    budgets = [2**exponent * _MIB for exponent in range(5, 12)]
    keeps = [_chosen(layers, 4096, device=_GPU, budget=budget).keeps_values for budget in budgets]
    assert keeps == sorted(keeps)
    assert {*keeps} == {True, False}


@pytest.mark.parametrize("size", [1000, 1001, 4095])
def test_tiles_are_of_one_size_where_that_is_possible(layers, size):
    tiling = _chosen(layers, size, device=_GPU, budget=48 * _MIB)
    tiles = -(-size // tiling.examples)
    assert tiles > 1
    assert tiling.examples == -(-size // tiles)


def test_a_batch_that_cannot_be_cut_has_fewer_directions_at_a_time(layers):
    budget = 1.6 * _MIB
    whole = _chosen(layers, 16, whole=True, budget=budget)
    assert whole.examples == 16
    assert whole.directions < 6
    tiles = _chosen(layers, 16, budget=budget)
    assert tiles.examples < 16
    assert tiles.directions == 6


@pytest.mark.parametrize(("count", "together"), [(5, 5), (1, 2), (7, 2), (7, 3), (8, 4), (9, 4)])
def test_groups_hold_every_pair(count, together):
    found = groups(count, together)
    assert all(len(group) <= max(together, 2) for group in found)
    pairs = {pair for group in found for pair in itertools.combinations_with_replacement(sorted(group), 2)}
    assert pairs == {*itertools.combinations_with_replacement(range(count), 2)}


def test_a_budget_is_what_is_asked_for():
    assert budget_bytes(_CPU, 0.5, 1.0) == 2**29
    # Where a part is for what is recorded besides.
    assert budget_bytes(torch.device("cuda"), 0.5, 1.0) == 0.9 * 2**29


def test_by_default_a_budget_is_half_of_what_is_free(monkeypatch):
    monkeypatch.setattr("lmc_curvature.curvature.sweep.tiling.free_bytes", lambda device: 6.0 * 2**30)
    assert budget_bytes(_CPU, None, 1.0) == 3 * 2**30


def test_on_a_gpu_a_budget_is_that_of_three_gradients_at_most(monkeypatch):
    monkeypatch.setattr("lmc_curvature.curvature.sweep.tiling.free_bytes", lambda device: 6.0 * 2**30)
    for gradient, expected in ((1.0, 2**28), (2.0**28, 3 * 2**28), (2.0**40, 3 * 2**30)):
        assert budget_bytes(torch.device("cuda"), None, gradient) == 0.9 * expected


@pytest.mark.check
def test_a_budget_too_small_for_one_example_says_how_much_it_takes():
    objective = _objective("conv, interpolate", (6,))
    directions = layer_directions(objective)
    with pytest.raises(
        MemoryBudgetError,
        match=r"2 of 6 directions, 1 of 6 examples at a time, takes about \S+ GiB, more than the budget of 1e-09 GiB",
    ):
        project_hessian(objective, {}, directions, method="sweep", memory_gib=1e-9)
    least, whole = _needed(objective, directions), swept(objective, directions)
    assert_projections_agree(swept(objective, directions, memory_gib=1.01 * least), whole, relative=1e-12)
    assert compiled_batches(objective, directions, memory_gib=1.01 * least)[0].tiling.directions == 2
    with pytest.raises(MemoryBudgetError):
        project_hessian(objective, {}, directions, method="sweep", memory_gib=0.9 * least)


def test_a_budget_too_small_for_a_batch_that_cannot_be_cut():
    objective = _objective("conv, batch", (6,))
    with pytest.raises(
        MemoryBudgetError, match="2 of 6 directions, 6 of 6 examples at a time, takes about .*, or use smaller batches"
    ):
        project_hessian(objective, {}, layer_directions(objective), method="sweep", memory_gib=1e-9)


class _Image(nn.Module):
    """A small weight, and an output as large as the image for each of several classes."""

    def __init__(self):
        super().__init__()
        self.paint = nn.Conv2d(1, 32, 1)

    def forward(self, x):
        return self.paint(x).tanh()


@pytest.mark.check
def test_outputs_of_a_whole_batch_count_as_well():
    x = torch.randn(8, 1, 16, 16, dtype=torch.float64)
    objective = Objective(_Image().double(), [(x, torch.randint(32, (8, 16, 16)))])
    directions = {f"{number}": {"paint.bias": torch.randn(32, dtype=torch.float64)} for number in range(12)}
    whole = swept(objective, directions)
    assert compiled_batches(objective, directions)[0].tiling.directions == 12
    output = 8 * 32 * 16 * 16 * 8
    least = _needed(objective, directions)
    assert least * 2**30 > 6 * output, "the loss keeps values for a backward pass, and tangents for two directions"
    assert_projections_agree(swept(objective, directions, memory_gib=1.1 * least), whole, relative=1e-12)
    assert compiled_batches(objective, directions, memory_gib=1.1 * least)[0].tiling.directions < 12
