"""Claim: of many networks, long streams are kept in groups of batches, and an interruption raises its error."""

import numpy as np
import pytest
import torch
from torch import nn

from lmc_curvature import averages, measure_barriers, predict_barriers

BOTH = pytest.mark.parametrize("compute", [predict_barriers, measure_barriers])


def _networks():
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double() for _ in range(3)]


def _batches(count):
    x = torch.randn(count, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [(each, (each[:, 0] > 0).long()) for each in x]


@pytest.mark.check(after=1)
@BOTH
def test_a_stream_is_kept_in_groups(compute, monkeypatch):
    monkeypatch.setattr(averages, "_MOST", 8)
    batches = _batches(12)
    pairs = zip(batches[::2], batches[1::2], strict=True)
    joined = [tuple(map(torch.cat, zip(*pair, strict=True))) for pair in pairs]
    whole, together = (compute(_networks(), each, progress=False) for each in (batches, joined))
    np.testing.assert_allclose(whole.barriers(), together.barriers(), rtol=1e-9)
    np.testing.assert_allclose(whole.standard_errors(), together.standard_errors(), rtol=1e-6)
    assert whole.mean_barrier() == pytest.approx(together.mean_barrier(), rel=1e-9)


@BOTH
def test_no_part_is_kept(compute):
    def broken():
        yield from _batches(6)
        raise OSError("no disk")

    with pytest.raises(OSError, match="no disk"):
        compute(_networks(), broken(), progress=False)
