"""Curvature by differences of gradients, where there is a second derivative to compare with and where there is none."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from lmc_curvature import BatchLoss, Objective, predict_barrier, project_hessian
from lmc_curvature.errors import UnsupportedModelError
from tests.support.cases import CASES
from tests.support.sweeping import layer_directions


class _Square(torch.autograd.Function):
    """x², whose backward pass is a kernel that autograd does not see into."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class _Squares(nn.Module):
    def __init__(self, square):
        super().__init__()
        self.first, self.second, self.square = nn.Linear(3, 5), nn.Linear(5, 2), square

    def forward(self, x):
        return self.second(self.square(self.first(x)))


def _networks(square, dtype=torch.float64):
    networks = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        networks.append(_Squares(square).to(dtype))
    return networks


def _batches(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(7, 3, generator=generator), torch.randint(2, (7,), generator=generator)) for _ in range(3)]
    return [(x.to(dtype), y) for x, y in batches]


@pytest.mark.parametrize("name", ["LayerNorm and GELU", "conv, interpolate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_differences_are_off_by_about_what_they_say(name, dtype):
    case = CASES[name]
    objective = Objective(case.model(), case.batches((6, 5)), dtype=dtype)
    directions = layer_directions(objective)
    exact = project_hessian(objective, {}, directions, method="hvp")
    found = project_hessian(objective, {}, directions, method="differences")
    assert found.loss == pytest.approx(exact.loss, rel=1e-6)
    np.testing.assert_allclose(found.slopes, exact.slopes, rtol=1e-4, atol=1e-6)
    off = np.abs(found.curvature - exact.curvature).max() / np.abs(exact.curvature).max()
    assert exact.difference_error is None
    assert 0 < found.difference_error < (1e-2 if dtype == torch.float32 else 1e-5)
    assert off < 3 * found.difference_error


def test_a_loss_that_is_differentiated_once_has_the_prediction_of_one_that_is_twice():
    options = {"anchors": 3, "progress": False}
    with pytest.raises(UnsupportedModelError, match="or predict with method='differences'"):
        predict_barrier(*_networks(_Square.apply), _batches(), witness=False, **options)
    found = predict_barrier(*_networks(_Square.apply), _batches(), method="differences", **options)
    exact = predict_barrier(*_networks(torch.square), _batches(), **options)
    assert found.barrier() == pytest.approx(exact.barrier(), rel=1e-5)
    np.testing.assert_allclose(found.layer_barriers(), exact.layer_barriers(), rtol=1e-4, atol=1e-7)
    assert any(note.startswith("curvature by differences of gradients, off by about ") for note in found.notes)
    assert exact.notes == ()


class _Recogniser(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(11, 6), nn.Linear(6, 4)

    def forward(self, tokens):
        return self.head(torch.tanh(self.bag(tokens.flatten(0, 1)))).unflatten(0, tokens.shape[:2])


def _ctc(model, batch):
    tokens, targets = batch
    outputs = F.log_softmax(model(tokens), -1).transpose(0, 1)
    lengths = torch.full((len(tokens),), outputs.shape[0]), torch.full((len(tokens),), targets.shape[1])
    return F.ctc_loss(outputs, targets, *lengths, reduction="sum") / len(tokens)


def test_embedding_bags_and_ctc_have_barriers():
    networks = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        networks.append(_Recogniser().double())
    batches = [(torch.randint(11, (5, 8, 3)), torch.randint(1, 4, (5, 3))) for _ in range(2)]
    prediction = predict_barrier(*networks, batches, loss_fn=BatchLoss(_ctc), method="differences", progress=False)
    # The second difference of the loss itself, along the whole displacement from model_a.
    step = 1e-3
    first, second = (network.state_dict() for network in networks)
    losses = []
    for alpha in (-step, 0.0, step):
        moved = _Recogniser().double()
        moved.load_state_dict({name: first[name] + alpha * (second[name] - first[name]) for name in first})
        losses.append(float(np.mean([_ctc(moved, batch).item() for batch in batches])))
    expected = (losses[0] - 2 * losses[1] + losses[2]) / step**2
    assert prediction.endpoints[0].curvature.sum() == pytest.approx(expected, rel=1e-4)
