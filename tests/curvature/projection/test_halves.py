"""Claim: a batch that does not fit memory is swept in halves where its loss is the mean of theirs, and then exactly."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmc_curvature import BatchLoss, Objective, project_hessian
from lmc_curvature.curvature.projection import by_sweep
from lmc_curvature.curvature.sweep import expected_bytes
from lmc_curvature.errors import UnsupportedModelError
from tests.support.sweeping import assert_sweep_agrees, compiled_batches, posed, swept

CLASSES, WIDTH = 5, 6


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.mixing = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def _mean(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"])


def _ignoring(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"].masked_fill(batch["y"] == 0, -100))


def _by_tokens(model, batch):
    mask = (batch["y"] > 0).double()
    return (F.cross_entropy(model(batch["x"]), batch["y"], reduction="none") * mask).sum() / mask.sum()


def _contrastive(model, batch):
    out = F.normalize(model(batch["x"]), dim=1)
    return F.cross_entropy(out @ out.t(), torch.arange(len(out)))


def _mixing_elsewhere(model, batch):
    # Examples meet with a weight that is zero at the state.
    out = model(batch["x"])
    return F.cross_entropy(out, batch["y"]) + model.mixing * (out.mean(0) ** 2).sum()


def _objective(loss, size=None, *, examples=9, labels=None):
    torch.manual_seed(0)
    model = _Model().double()
    y = torch.randint(CLASSES, (examples,)) if labels is None else labels
    batch = {"x": torch.randn(len(y), 3).double(), "y": y}
    return Objective(model, [batch], loss_fn=BatchLoss(loss, size))


def _directions(objective):
    # So many that their tangents are most of what takes memory.
    generator = torch.Generator().manual_seed(2)
    return {
        f"direction {i}": {
            name: torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            for name, tensor in objective.state().items()
        }
        for i in range(16)
    }


def _tight(objective, directions):
    """GiB that all directions do not fit at once for all examples, but for half of them."""
    (compiled,) = compiled_batches(objective, directions)
    return 0.7 * expected_bytes(posed(objective, directions), compiled) / 2**30


def _count_halves(monkeypatch):
    found = []
    project = by_sweep.project_halves
    monkeypatch.setattr(by_sweep, "project_halves", lambda *given: found.append(given[2].size) or project(*given))
    return found


@pytest.mark.check(after=1)
@pytest.mark.parametrize(
    ("loss", "size"),
    [
        (_mean, None),
        (_ignoring, lambda batch: int((batch["y"] > 0).sum())),
        (_by_tokens, lambda batch: (batch["y"] > 0).double().sum()),
        # As of tokens.
        (_mean, lambda batch: 7 * len(batch["y"])),
    ],
)
def test_a_mean_is_swept_in_halves(loss, size, monkeypatch):
    objective = _objective(loss, size)
    directions = _directions(objective)
    swept(objective, directions)
    cut = _count_halves(monkeypatch)
    assert_sweep_agrees(objective, directions, memory_gib=_tight(objective, directions))
    assert cut


def test_a_half_without_a_label_that_counts_is_left_out(monkeypatch):
    labels = torch.tensor([0, 0, 0, 0, 1, 2, 3, 4])
    objective = _objective(_ignoring, lambda batch: int((batch["y"] > 0).sum()), labels=labels)
    directions = _directions(objective)
    swept(objective, directions)
    cut = _count_halves(monkeypatch)
    assert_sweep_agrees(objective, directions, memory_gib=_tight(objective, directions))
    assert cut


@pytest.mark.parametrize("loss", [_contrastive, _mixing_elsewhere])
def test_what_is_no_mean_is_not_cut(loss, monkeypatch):
    objective = _objective(loss)
    directions = _directions(objective)
    swept(objective, directions)
    cut = _count_halves(monkeypatch)
    assert_sweep_agrees(objective, directions, memory_gib=_tight(objective, directions))
    assert not cut


class _Normalized(_Model):
    def __init__(self, **options):
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH, **options)

    def forward(self, x):
        return self.second(torch.tanh(self.norm(self.first(x))))


def _small(scale):
    """A loss of another scale: its numbers are as small as targets and outputs, which are in proportion."""

    def loss(model, batch):
        return F.mse_loss(scale * model(batch["x"]), scale * torch.sin(3 * batch["x"])[:, :1].expand(-1, CLASSES))

    return loss


def _small_spread(model, batch):
    return 1e-5 * model(batch["x"]).var(0).sum()


@pytest.mark.check(after=1)
@pytest.mark.parametrize(
    ("model", "loss", "policy"),
    [
        (_Normalized, _small(1e-3), "batch"),
        (_Normalized, _mean, "batch"),
        (_Normalized, _small(1e-3), "recalibrate"),
        (lambda: _Normalized(track_running_stats=False), _small(1e-3), "interpolate"),
        (_Model, _small_spread, "interpolate"),
    ],
)
def test_what_mixes_examples_is_not_cut_however_small_its_loss_is(model, loss, policy, monkeypatch):
    torch.manual_seed(0)
    batch = {"x": torch.randn(9, 3), "y": torch.randint(CLASSES, (9,))}
    objective = Objective(model(), [batch], loss_fn=BatchLoss(loss), batch_norm=policy)
    directions = _directions(objective)
    expected = project_hessian(objective, {}, directions, method="hvp")
    swept(objective, directions)
    cut = _count_halves(monkeypatch)
    found = swept(objective, directions, memory_gib=_tight(objective, directions))
    assert not cut
    np.testing.assert_allclose(
        found.curvature, expected.curvature, rtol=1e-3, atol=1e-5 * abs(expected.curvature).max()
    )


def test_a_mean_is_swept_in_halves_however_small_it_is(monkeypatch):
    objective = _objective(_small(1e-4))
    directions = _directions(objective)
    swept(objective, directions)
    cut = _count_halves(monkeypatch)
    assert_sweep_agrees(objective, directions, memory_gib=_tight(objective, directions))
    assert cut


def test_a_later_batch_that_is_no_mean_is_refused():
    def loss(model, batch):
        out = model(batch["x"])
        apart = F.cross_entropy(out, batch["y"])
        return apart + torch.where(batch["x"].sum() > 20, out.var(0).sum(), 0.0)

    torch.manual_seed(0)
    x, y = torch.randn(8, 3).double(), torch.randint(CLASSES, (8,))
    objective = Objective(_Model().double(), [{"x": x, "y": y}], loss_fn=BatchLoss(loss))
    directions = _directions(objective)
    swept(objective, directions)
    memory_gib = _tight(objective, directions)
    both = Objective(_Model().double(), [{"x": x, "y": y}, {"x": x + 2, "y": y}], loss_fn=BatchLoss(loss))
    with pytest.raises(UnsupportedModelError, match="batch 1 is not the mean .* choose method='hvp'"):
        project_hessian(both, {}, directions, memory_gib=memory_gib)


class _Meeting(_Model):
    """Examples meet in the network, by so little that the loss hardly shows it."""

    def __init__(self, meet):
        super().__init__()
        self.meet = meet

    def forward(self, x):
        return self.second(self.meet(torch.tanh(self.first(x))))


@pytest.mark.filterwarnings("ignore:.*Falling back")
@pytest.mark.parametrize("by_batch", [True, False])
@pytest.mark.parametrize(
    "meet", [lambda h: h - 0.01 * h.mean(0), lambda h: h + 0.01 * h.roll(1, 0), lambda h: h + 0.003 * h.flip(0)]
)
def test_a_network_that_mixes_a_little_is_not_cut(meet, by_batch, monkeypatch):
    torch.manual_seed(0)
    x, y = torch.randn(32, 3), torch.randint(CLASSES, (32,))
    data, loss_fn = ({"x": x, "y": y}, BatchLoss(_mean)) if by_batch else ((x, y), None)
    objective = Objective(_Meeting(meet), [data], loss_fn=loss_fn)
    directions = _directions(objective)
    expected = project_hessian(objective, {}, directions, method="hvp")
    cut = _count_halves(monkeypatch)
    found = project_hessian(objective, {}, directions, memory_gib=2e-5)
    assert not cut
    np.testing.assert_allclose(found.slopes, expected.slopes, rtol=1e-4, atol=1e-6 * abs(expected.slopes).max())
    np.testing.assert_allclose(
        found.curvature, expected.curvature, rtol=1e-4, atol=1e-5 * abs(expected.curvature).max()
    )
