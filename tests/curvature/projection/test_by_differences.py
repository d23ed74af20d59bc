"""Curvature by differences, of gradients and of losses, where there are derivatives to compare with and where not."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from lmc_curvature import BatchLoss, Objective, predict_barrier, project_hessian
from lmc_curvature.errors import LossError, UnsupportedModelError
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
@pytest.mark.parametrize(
    ("method", "dtype", "least"),
    [
        ("differences", torch.float32, 1e-2),
        ("differences", torch.float64, 1e-5),
        ("losses", torch.float32, 0.3),
        ("losses", torch.float64, 1e-3),
    ],
)
def test_differences_are_off_by_about_what_they_say(name, method, dtype, least):
    case = CASES[name]
    objective = Objective(case.model(), case.batches((6, 5)), dtype=dtype)
    directions = layer_directions(objective)
    exact = project_hessian(objective, {}, directions, method="hvp")
    found = project_hessian(objective, {}, directions, method=method)
    assert found.loss == pytest.approx(exact.loss, rel=1e-6)
    slack = {"differences": 1e-4, "losses": 1e-2 if dtype == torch.float32 else 1e-5}[method]
    np.testing.assert_allclose(found.slopes, exact.slopes, atol=slack * np.abs(exact.slopes).max())
    np.testing.assert_array_equal(found.curvature, found.curvature.T)
    off = np.abs(found.curvature - exact.curvature).max() / np.abs(exact.curvature).max()
    assert exact.difference_error is None
    assert 0 < found.difference_error < least
    assert off < 3 * found.difference_error


def test_a_kink_that_a_later_batch_meets_is_told_of():
    case = CASES["attention"]
    options = {"dtype": torch.float32, **case.options}
    directions = layer_directions(Objective(case.model(), case.batches((6, 5)), **options))
    first, both = (
        project_hessian(Objective(case.model(), case.batches(sizes), **options), {}, directions, method="differences")
        for sizes in ((6,), (6, 5))
    )
    assert first.difference_error < 1e-3 < both.difference_error


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


class _Attention(nn.Module):
    """Attention by the kernel itself, which torch chooses where no second derivative is asked for."""

    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(6, 18), nn.Linear(6, 3)

    def forward(self, x):
        query, key, value = self.mix(x).unsqueeze(1).chunk(3, -1)
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
        return self.head(attention.squeeze(1).mean(1))


class _Recogniser(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 6), nn.Linear(6, 4)

    def forward(self, tokens):
        return self.head(torch.tanh(self.embedding(tokens)))


def _ctc(model, batch):
    tokens, targets = batch
    outputs = F.log_softmax(model(tokens), -1).transpose(0, 1)
    lengths = torch.full((len(tokens),), outputs.shape[0]), torch.full((len(tokens),), targets.shape[1])
    return F.ctc_loss(outputs, targets, *lengths, reduction="sum") / len(tokens)


def _cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


# A network, a loss, and inputs and targets of a batch.
ONCE = {
    "once_differentiable": (lambda: _Squares(_Square.apply), _cross_entropy, lambda: (torch.randn(5, 3), _classes(2))),
    "fused attention": (_Attention, _cross_entropy, lambda: (torch.randn(5, 4, 6), _classes(3))),
    "embedding bag": (
        lambda: nn.Sequential(nn.EmbeddingBag(11, 6), nn.Tanh(), nn.Linear(6, 4)),
        _cross_entropy,
        lambda: (torch.randint(11, (5, 8)), _classes(4)),
    ),
    "CTC": (_Recogniser, _ctc, lambda: (torch.randint(11, (5, 8)), torch.randint(1, 4, (5, 3)))),
}


def _classes(number):
    return torch.arange(5) % number


def _whole_curvature(make, loss, networks, batches):
    """The second difference of the loss itself, along the whole displacement from the first network."""
    step = 1e-3
    first, second = (network.state_dict() for network in networks)
    moved, losses = make().double(), []
    for alpha in (-step, 0.0, step):
        moved.load_state_dict({name: first[name] + alpha * (second[name] - first[name]) for name in first})
        losses.append(float(np.mean([loss(moved, batch).item() for batch in batches])))
    return (losses[0] - 2 * losses[1] + losses[2]) / step**2


@pytest.mark.parametrize("name", ONCE)
def test_what_has_one_derivative_is_refused_by_default_with_a_word_on_differences(name):
    make, loss, data = ONCE[name]
    networks = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        networks.append(make().double())
    batches = [tuple(t.double() if t.is_floating_point() else t for t in data()) for _ in range(2)]
    options = {"loss_fn": BatchLoss(loss), "anchors": 2, "progress": False}
    with pytest.raises(UnsupportedModelError, match="or predict with method='differences'"):
        predict_barrier(*networks, batches, witness=False, **options)
    expected = _whole_curvature(make, loss, networks, batches)
    for method, note in (
        ("differences", "curvature by differences of gradients, "),
        ("losses", "slopes and curvature"),
    ):
        prediction = predict_barrier(*networks, batches, method=method, **options)
        assert prediction.endpoints[0].curvature.sum() == pytest.approx(expected, rel=1e-4)
        (said,) = prediction.notes
        assert said.startswith(note)
        assert said[:50] in repr(prediction)
        assert said in str(prediction)


class _Outside(nn.Module):
    """A network that autograd sees nothing of."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x):
        numbers = {name: tensor.detach().numpy() for name, tensor in self.named_parameters()}
        hidden = np.tanh(x.numpy() @ numbers["first.weight"].T + numbers["first.bias"])
        return torch.from_numpy(hidden @ numbers["second.weight"].T + numbers["second.bias"])


def test_a_network_without_derivatives_is_predicted_from_losses():
    networks = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        networks.append(_Outside().double())
    with pytest.raises(LossError, match="predict with method='losses'"):
        predict_barrier(*networks, _batches(), progress=False)
    seen = [nn.Sequential(network.first, nn.Tanh(), network.second) for network in networks]
    exact = predict_barrier(*seen, _batches(), progress=False)
    found = predict_barrier(*networks, _batches(), method="losses", progress=False)
    assert found.barrier() == pytest.approx(exact.barrier(), rel=1e-4)
    np.testing.assert_allclose(found.layer_barriers(), exact.layer_barriers(), rtol=1e-4)


def test_a_set_takes_three_losses_a_batch(monkeypatch):
    case = CASES["LayerNorm and GELU"]
    objective = Objective(case.model(), case.batches((6, 5)), dtype=torch.float64)
    layers = {name: each for name, each in layer_directions(objective).items() if name != "everything"}
    together = {name: tensor for each in layers.values() for name, tensor in each.items()}
    exact = project_hessian(objective, {}, layers, method="hvp")
    found = project_hessian(objective, {}, [together], method="losses")
    assert found.slopes[0] == pytest.approx(exact.slopes.sum(), rel=1e-5)
    assert found.curvature[0, 0] == pytest.approx(exact.curvature.sum(), rel=1e-4)
    visits, counts = [], []
    original = Objective.batch_loss
    monkeypatch.setattr(Objective, "batch_loss", lambda *args: visits.append(1) or original(*args))
    for sizes in ((6, 5), (6, 5, 4)):
        visits.clear()
        again = Objective(case.model(), case.batches(sizes), dtype=torch.float64)
        project_hessian(again, {}, [together], method="losses")
        counts.append(len(visits))
    assert counts[1] == counts[0] + 3
