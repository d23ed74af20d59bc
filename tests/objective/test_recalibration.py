"""Claim: statistics are re-estimated on the data given for it, and what that makes worse is warned of."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from lmc_curvature import Objective, measure_barrier, predict_barrier
from lmc_curvature.errors import LoaderError, OptionError
from lmc_curvature.objective.recalibration import Recalibration
from tests.support.cases import CASES
from tests.support.networks import joined, plain_loss, randomized

CONV = CASES["conv, recalibrate"]


def _others(sizes=(8, 8)):
    return [(2 * x + 1, y) for x, y in CONV.batches(sizes, seed=5)]


def _with_statistics_of(model, batches):
    update_bn([x for x, _ in batches], model)
    return model.eval()


def test_the_loss_is_on_one_loader_by_statistics_of_another():
    model, batches = CONV.model(0), CONV.batches()
    objective = Objective(model, batches, batch_norm="recalibrate", recalibration=_others())
    with warnings.catch_warnings():
        # Passes over two loaders are not passes that should be equal.
        warnings.simplefilter("error")
        found = [objective.loss(), objective.loss()]
    expected = plain_loss(_with_statistics_of(model, _others()), joined(batches)).item()
    assert found == pytest.approx([expected, expected], rel=1e-10)
    assert found[0] != pytest.approx(Objective(CONV.model(0), batches, batch_norm="recalibrate").loss(), rel=1e-3)


def test_the_loader_of_losses_may_then_be_visited_once():
    batches = CONV.batches()
    objective = Objective(CONV.model(0), iter(batches), batch_norm="recalibrate", recalibration=_others())
    expected = Objective(CONV.model(0), batches, batch_norm="recalibrate", recalibration=_others()).loss()
    assert objective.loss() == pytest.approx(expected, rel=1e-12)


def test_random_augmentation_is_no_loader_that_changes():
    class Augmented:
        def __iter__(self):
            return iter([(x + 0.1 * torch.randn_like(x), y) for x, y in CONV.batches()])

    objective = Objective(CONV.model(0), CONV.batches(), batch_norm="recalibrate", recalibration=Augmented())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            objective.loss()


def test_a_measurement_has_the_statistics_of_that_loader_at_every_point():
    pair, batches = [CONV.model(0), CONV.model(1)], CONV.batches((6, 6))
    options = {"alphas": 3, "batch_norm": "recalibrate", "recalibration": _others(), "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = measure_barrier(*pair, batches, **options)
    middle = CONV.model(2)
    states = [model.state_dict() for model in pair]
    middle.load_state_dict({name: (a + states[1][name]) / 2 for name, a in states[0].items()})
    networks = [_with_statistics_of(model, _others()) for model in (pair[0], middle, pair[1])]
    expected = [plain_loss(model, joined(batches)).item() for model in networks]
    assert found.values() == pytest.approx(expected, rel=1e-9)


@pytest.mark.check
@pytest.mark.parametrize("function", [measure_barrier, predict_barrier])
def test_a_network_that_is_worse_by_them_is_named(function):
    batches = CONV.batches((6, 6, 6))
    first, second = CONV.model(0), CONV.model(1)
    optimizer = torch.optim.Adam(second.parameters(), 0.05)
    for _ in range(40):
        optimizer.zero_grad()
        torch.stack([plain_loss_of(second, batch) for batch in batches]).sum().backward()
        optimizer.step()
    for model in (first, second):
        _with_statistics_of(model, batches)
    strange = [(20 * x - 30, y) for x, y in batches]
    options = {"batch_norm": "recalibrate", "progress": False}
    with pytest.warns(UserWarning, match="make model_b worse: loss .* by its own statistics"):
        function(first, second, batches, recalibration=strange, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Re-estimated")
        function(first, second, batches, recalibration=batches, **options)


def plain_loss_of(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])


def test_worse_is_by_more_than_a_tenth_and_than_batches_differ():
    weights = np.ones(3)
    before = np.array([1.0, 2.0, 3.0])
    assert Recalibration.of(before, before + 0.5, weights).is_worse
    assert not Recalibration.of(before, before + 0.1, weights).is_worse
    assert not Recalibration.of(before, before - 0.5, weights).is_worse
    assert not Recalibration.of(before, before + np.array([-2.0, 0.0, 3.0]), weights).is_worse
    found = Recalibration.of(before, before + np.array([0.3, 0.6, 0.9]), np.array([1.0, 1.0, 2.0]))
    assert (found.before, found.after) == pytest.approx((2.25, 2.25 + 0.675))
    # Of a single batch there is no spread.
    assert Recalibration.of(before[:1], before[:1] + 0.5, weights[:1]).is_worse


@pytest.mark.parametrize("function", [measure_barrier, predict_barrier])
def test_the_loader_is_for_its_policy(function, untyped):
    pair = CONV.model(0), CONV.model(1)
    with pytest.raises(OptionError, match="recalibration is a loader for batch_norm='recalibrate' alone"):
        function(*pair, CONV.batches(), recalibration=CONV.batches())
    with pytest.raises(LoaderError, match=r"The loader is .*object; expected|The loader is an object"):
        Objective(pair[0], CONV.batches(), batch_norm="recalibrate", recalibration=3)  # pyright: ignore
    with pytest.raises(LoaderError, match="visits the loader twice"):
        predict_barrier(*pair, iter(CONV.batches()), batch_norm="recalibrate", recalibration=CONV.batches())


class _Domains(nn.Module):
    """A normalisation for each of two domains of data."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.BatchNorm1d(5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.second(x) if x[0, 0] > 50 else self.first(x)))


@pytest.mark.parametrize("reached", [True, False])
def test_a_normalisation_that_no_data_reach_is_named(reached, recwarn):
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 5, generator=generator) + 100 * (n % 2), torch.arange(8) % 3) for n in range(4)]
    networks = [randomized(_Domains(), seed) for seed in (0, 1)]
    other = batches if reached else batches[::2]
    measure_barrier(
        *networks, batches, batch_norm="recalibrate", recalibration=other, alphas=3, metrics=("loss",), progress=False
    )
    said = [str(each.message) for each in recwarn if "never reach the normalisation 'second'" in str(each.message)]
    assert len(said) == (not reached)
