"""Ranks that share the batches have the numbers of one process, and end together."""

import functools
import os
import signal
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from lmc_curvature import (
    GGNOperator,
    HessianOperator,
    Objective,
    cross_layer_hessian,
    lanczos,
    layer_hessian,
    measure_barrier,
    measure_barriers,
    predict_barrier,
    predict_barriers,
    project_hessian,
    spectral_density,
    top_eigenpairs,
    trace,
)
from lmc_curvature.errors import OptionError
from lmc_curvature.objective.ranks import Ranks
from tests.support.networks import normalized_net, randomized
from tests.support.ranks import Crew, crew

TIMEOUT = 10


@pytest.fixture(scope="module")
def ranks():
    crews: dict[int, Crew] = {}

    def of(size):
        return crews.setdefault(size, Crew(size))

    yield of
    for each in crews.values():
        each.close()


def _pair():
    return [randomized(normalized_net("batch"), seed).double().eval() for seed in (1, 2)]


def _data(examples=41):
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(examples, 2, 5, 5, generator=generator, dtype=torch.float64)
    return images, torch.randint(3, (examples,), generator=generator)


def _batches(examples=41, size=6):
    """Seven batches, of which the last is short."""
    return list(zip(*(tensor.split(size) for tensor in _data(examples)), strict=True))


def _objective(group, loader=None, **options):
    return Objective(_pair()[0], _batches() if loader is None else loader, group=group, timeout=TIMEOUT, **options)


def _flat(state):
    return torch.cat([tensor.flatten().double() for tensor in state.values()])


def _direction(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(t.shape, generator=generator, dtype=t.dtype) for name, t in model.state().items()}


def _projection(objective):
    found = project_hessian(objective, objective.state(), [_direction(objective, seed) for seed in range(3)])
    return np.concatenate([[found.loss], found.slopes, found.curvature.ravel(), found.curvature_se.ravel()])


PASSES = {
    "loss": lambda objective: [objective.loss()],
    "gradient": lambda objective: _flat(objective.gradient()),
    "product": lambda objective: _flat(HessianOperator(objective) @ _direction(objective)),
    "GGN": lambda objective: _flat(GGNOperator(objective) @ _direction(objective)),
    "dense": lambda objective: HessianOperator(objective).block("4").to_dense(),
    "diagonal": lambda objective: HessianOperator(objective).diagonal(),
    "projection": _projection,
    "block": lambda objective: layer_hessian(objective, None, "4"),
    "cross block": lambda objective: cross_layer_hessian(objective, None, "0", "4", method="products"),
    "Lanczos": lambda objective: lanczos(HessianOperator(objective), 4).alphas,
    "eigenvalues": lambda objective: top_eigenpairs(HessianOperator(objective), 2).values,
    "density": lambda objective: spectral_density(HessianOperator(objective), steps=4, probes=1).nodes,
    "trace": lambda objective: [trace(HessianOperator(objective), probes=6).value],
    "re-estimated statistics": lambda objective: _flat(objective.recalibrated([objective.state()])[0]),
}


def _compare_pass(rank, name, options):
    """What the pass gives, and how far that is from what this process finds alone, relative to the largest number."""
    group, alone = (np.asarray(PASSES[name](_objective(group, **options))) for group in ("world", None))
    return group.tolist(), float(np.abs(group - alone).max() / np.abs(alone).max())


@pytest.mark.check(after=1)
@pytest.mark.parametrize(("name", "size"), [("loss", 2), ("gradient", 3), *((name, 2) for name in list(PASSES)[2:])])
def test_ranks_have_the_numbers_of_one_process(ranks, name, size):
    options = {"batch_norm": "recalibrate"} if name == "re-estimated statistics" else {}
    found = ranks(size).run(_compare_pass, name, options)
    numbers, differences = zip(*found, strict=True)
    assert max(differences) < 1e-12
    assert all(other == numbers[0] for other in numbers)


def _predict(group, policy, loader=None):
    options = {"batch_norm": policy, "group": group, "timeout": TIMEOUT, "progress": False}
    loader = _batches() if loader is None else loader
    prediction = predict_barrier(*_pair(), loader, anchors=3, **options)
    measurement = measure_barrier(*_pair(), loader, sets="each", alphas=5, **options)
    return np.concatenate(
        [
            [prediction.barrier(), prediction.standard_error(), *prediction.layer_barriers()],
            prediction.errors,
            [measurement.barrier("error"), *measurement.layer_barriers(), *measurement.layer_standard_errors()],
        ]
    )


def _predict_many(group, policy):
    models = [*_pair(), randomized(normalized_net("batch"), 3).double().eval()]
    options = {"batch_norm": policy, "group": group, "timeout": TIMEOUT, "progress": False}
    prediction = predict_barriers(models, _batches(), **options)
    measurement = measure_barriers(models, _batches(), sets="each", **options)
    found = [prediction.barriers(), prediction.standard_errors(), prediction.layer_barriers(), *prediction.mean_errors]
    found += [measurement.barriers("error"), measurement.set_barriers(), measurement.set_standard_errors()]
    return np.concatenate([np.ravel(each) for each in found])


def _compare_barriers(rank, barriers, policy):
    group, alone = barriers("world", policy), barriers(None, policy)
    return group.tolist(), float(np.abs(group - alone).max() / np.abs(alone).max())


@pytest.mark.check
@pytest.mark.parametrize("barriers", [_predict, _predict_many])
@pytest.mark.parametrize(("policy", "size"), [("interpolate", 3), ("batch", 2), ("recalibrate", 2)])
def test_barriers_of_ranks_are_those_of_one_process(ranks, barriers, policy, size):
    numbers, differences = zip(*ranks(size).run(_compare_barriers, barriers, policy), strict=True)
    assert max(differences) < 1e-12
    assert all(other == numbers[0] for other in numbers)


class _Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(*_data(), strict=True))


def _without_targets_at_first():
    (images, labels), *others = _batches()
    return [(images, torch.full_like(labels, -100)), *others]


def _sampled(examples):
    data = TensorDataset(*_data(examples))
    return DataLoader(data, batch_size=6, sampler=DistributedSampler(data, shuffle=False))


# A loader, and a list of batches with the same examples.
LOADERS = {
    "fewer batches than ranks": lambda: (_batches(5, 5), _batches(5, 5)),
    "an iterable data set": lambda: (DataLoader(_Stream(), batch_size=6), _batches()),
    "a DistributedSampler": lambda: (_sampled(42), _batches(42)),
    "shuffled": lambda: (DataLoader(TensorDataset(*_data()), batch_size=6, shuffle=True), _batches()),
    "nothing counts at first": lambda: (_without_targets_at_first(), _without_targets_at_first()),
}


def _loss_with(rank, name):
    torch.manual_seed(rank)
    loader, batches = LOADERS[name]()
    return _objective("world", loader).loss(), _objective(None, batches).loss()


@pytest.mark.check
@pytest.mark.parametrize(("name", "size"), [(name, 2 + number % 2) for number, name in enumerate(LOADERS)])
def test_every_example_counts_once(ranks, name, size):
    for shared, alone in ranks(size).run(_loss_with, name):
        assert shared == pytest.approx(alone, rel=1e-12)


def _loss_of_padded_data(rank):
    with pytest.warns(UserWarning, match="DistributedSampler repeats 1 of 41 examples"):
        _objective("world", _sampled(41)).loss()


def test_examples_that_a_sampler_repeats_are_warned_of(ranks):
    assert ranks(2).run(_loss_of_padded_data) == [None, None]


def _with_other_batches(rank):
    return _objective("world", _batches()[:: 1 - 2 * rank]).loss()


def test_other_batches_on_every_rank_are_refused(ranks):
    for said in ranks(2).run(_with_other_batches):
        assert said.startswith("RankError: The ranks' loaders yield different batches (7, 7 of them)")


class _Failing:
    """A loader that fails, or whose process is killed, at a batch on one rank."""

    def __init__(self, rank, action):
        self.rank, self.action = rank, action

    def __iter__(self):
        for number, batch in enumerate(_batches()):
            if self.rank == 1 and number == 3:
                self.action()
            yield batch


def _raise():
    raise OSError("the disk is gone")


def _kill(path):
    path.write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)


def _pass_that_fails(rank, action):
    try:
        _objective("world", _Failing(rank, action)).gradient()
    except Exception as error:  # noqa: BLE001
        return type(error).__name__, str(error), time.time()


def test_a_loader_that_raises_ends_all_ranks_with_its_message(ranks):
    first, second, third = ranks(3).run(_pass_that_fails, _raise)
    assert second[:2] == ("OSError", "the disk is gone")
    for name, message, when in (first, third):
        assert (name, message) == ("RankError", "Rank 1 of 3 failed: OSError: the disk is gone")
        assert when - second[2] < TIMEOUT


@pytest.mark.check
@pytest.mark.parametrize("round", range(2))
def test_a_rank_that_is_killed_ends_the_others(round, tmp_path):
    with crew(2) as both:
        first, second = both.run(_pass_that_fails, functools.partial(_kill, tmp_path / "when"), timeout=6 * TIMEOUT)
    name, message, when = first
    assert second is None
    assert name == "RankError"
    assert "was it killed?" in message
    assert when - float((tmp_path / "when").read_text()) < TIMEOUT


def _options_that_are_refused(rank):
    found = []
    for options in ({"group": "all"}, {"group": "world", "timeout": 0}, {"group": dist.new_group([0])}):
        try:
            Ranks(**options)
            found.append("")
        except OptionError as error:
            found.append(str(error))
    return found


def test_bad_groups_are_refused(ranks):
    for rank, (name, timeout, group) in enumerate(ranks(2).run(_options_that_are_refused)):
        assert "expected a process group of torch.distributed, 'world', or None" in name
        assert "expected a positive number of seconds" in timeout
        assert group == ("This process is not in the process group that was given as group." if rank else "")


def test_a_group_without_torch_distributed_is_refused():
    with pytest.raises(OptionError, match="torch.distributed is not initialised"):
        _objective("world")
