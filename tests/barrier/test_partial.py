"""Passes that end before the loader does: interrupted, or with enough read; and passes of many batches."""

import numpy as np
import pytest
import torch
from torch import nn

from lmc_curvature import BarrierMeasurement, BarrierPrediction, averages, measure_barrier, predict_barrier
from lmc_curvature.averages import GroupMeans, add_batch, grouped, standard_error, weighted_mean
from lmc_curvature.errors import LossError, OptionError

BARRIERS = {"predicted": (predict_barrier, BarrierPrediction), "measured": (measure_barrier, BarrierMeasurement)}


def _networks():
    networks = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        networks.append(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double())
    return networks


def _batches(count, size=5):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        x = torch.randn(size, 3, generator=generator, dtype=torch.float64)
        yield x, (x[:, 0] > 0).long()


class _Broken:
    """A loader that raises an error after some batches."""

    def __init__(self, error, batches):
        self.error, self.batches = error, batches

    def __iter__(self):
        yield from _batches(self.batches)
        raise self.error


@pytest.mark.check(after=1)
@pytest.mark.parametrize("name", BARRIERS)
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyboardInterrupt, "Ctrl-C, after 6 batches"),
        (OSError, "OSError: no disk (batch 6 of the loader), after 6 batches"),
    ],
)
def test_what_was_read_before_an_interruption_is_kept(name, error, said, tmp_path):
    compute, kind = BARRIERS[name]
    with pytest.warns(UserWarning, match="the numbers are of the batches before"):
        found = compute(*_networks(), _Broken(error("no disk"), 6), progress=False)
    expected = compute(*_networks(), list(_batches(6)), progress=False)
    assert found.partial
    assert not expected.partial
    assert found.interruption == said
    assert found.notes == (f"partial: {said}",)
    assert f"partial: {said}" in str(found)
    assert found.barrier() == expected.barrier()
    assert found.standard_error() == expected.standard_error()
    found.save(tmp_path / "found")
    assert kind.load(tmp_path / "found").interruption == said


@pytest.mark.parametrize("name", BARRIERS)
@pytest.mark.parametrize("batches", [0, 6])
def test_errors_are_raised_where_nothing_is_kept(name, batches):
    compute, _ = BARRIERS[name]
    with pytest.raises(OSError, match="no disk"):
        compute(*_networks(), _Broken(OSError("no disk"), batches), keep_partial=batches == 0, progress=False)


def test_errors_of_a_loss_are_raised():
    calls = []

    def loss(output, target):
        calls.append(1)
        if len(calls) > 40:
            raise OSError("no disk")
        return nn.functional.cross_entropy(output, target)

    with pytest.raises(LossError, match="no disk"):
        measure_barrier(*_networks(), list(_batches(30)), loss_fn=loss, metrics=("loss",), progress=False)


@pytest.mark.check
@pytest.mark.parametrize("name", BARRIERS)
def test_only_as_many_batches_are_read_as_a_standard_error_takes(name):
    compute, _ = BARRIERS[name]
    read = []

    def loader():
        for batch in _batches(2000, size=3):
            read.append(1)
            yield batch

    exact = compute(*_networks(), list(_batches(100, size=3)), progress=False)
    middle = {"alpha": 0.5} if name == "predicted" else {}
    tolerance = 1.5 * exact.standard_error(**middle)
    found = compute(*_networks(), loader(), tolerance=tolerance, progress=False)
    assert found.examples == 3 * len(read)
    assert found.standard_error(**middle) <= tolerance
    assert 20 < len(read) < 80


@pytest.mark.parametrize("tolerance", [0, -1, float("nan"), True, "0.1"])
@pytest.mark.parametrize("name", BARRIERS)
def test_bad_tolerances_are_refused(name, tolerance, untyped):
    with pytest.raises(OptionError, match="tolerance="):
        BARRIERS[name][0](*_networks(), _Broken(AssertionError(), 0), tolerance=tolerance)


@pytest.mark.parametrize("name", BARRIERS)
def test_a_stream_is_kept_in_groups(name, monkeypatch):
    monkeypatch.setattr(averages, "_MOST", 8)
    compute, _ = BARRIERS[name]
    whole = compute(*_networks(), _batches(17, size=2), progress=False)
    # Of four batches each, as if they had been yielded together.
    every = list(_batches(17, size=2))
    joined = [tuple(torch.cat(parts) for parts in zip(*every[n : n + 4], strict=True)) for n in range(0, 17, 4)]
    together = compute(*_networks(), joined, progress=False)
    assert len(whole.batch_sizes if name == "measured" else whole.anchors[0].projection.batch_sizes) == 5
    assert whole.barrier() == pytest.approx(together.barrier(), rel=1e-9)
    # At the highest point, whose place is found up to the root of the rounding error.
    assert whole.standard_error() == pytest.approx(together.standard_error(), rel=1e-6)


def test_groups_do_not_depend_on_how_batches_came():
    generator = np.random.default_rng(0)
    batches = [GroupMeans(n, 3, generator.uniform(0, 2, 2), (generator.normal(size=(2, 4)),)) for n in range(1000)]
    at_once, one_by_one = grouped(batches, 100), grouped(grouped(grouped(batches, 700), 300), 100)
    online: list[GroupMeans] = []
    for batch in batches:
        add_batch(online, batch)
    assert len(at_once) == len(one_by_one) == 63
    assert len(online) <= 512
    assert len(grouped(online)) == 500
    for groups in (at_once, one_by_one, online):
        weights = np.stack([group.weights for group in groups])
        values = np.stack([group.values[0] for group in groups])
        assert sum(group.size for group in groups) == 3000
        for metric in range(2):
            expected = weighted_mean(
                np.stack([batch.values[0][metric] for batch in batches]), np.array([b.weights[metric] for b in batches])
            )
            np.testing.assert_allclose(weighted_mean(values[:, metric], weights[:, metric]), expected, rtol=1e-12)
    for first, second in zip(at_once, one_by_one, strict=True):
        np.testing.assert_allclose(first.values[0], second.values[0], rtol=1e-9)


@pytest.mark.check
def test_standard_errors_of_groups_are_those_of_batches_on_average():
    generator = np.random.default_rng(1)
    ratios = []
    for _ in range(200):
        batches = [GroupMeans(n, 1, np.array(1.0), (generator.normal(size=()),)) for n in range(400)]
        errors = []
        for most in (400, 50):
            groups = grouped(batches, most)
            values, weights = np.array([g.values[0] for g in groups]), np.array([g.weights for g in groups])
            errors.append(float(standard_error(values, weights)))
        ratios.append(errors[1] / errors[0])
    assert np.mean(ratios) == pytest.approx(1, abs=0.03)
