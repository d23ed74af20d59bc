"""Claim: whole networks and losses go through the sweep, not the fallback, and agree with Hessian-vector products."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

from lmc_curvature import BatchLoss, Objective, project_hessian
from lmc_curvature.curvature.sweep import plan
from lmc_curvature.curvature.sweep.rules.autodiff import ByAutodiff
from lmc_curvature.errors import FallbackWarning
from lmc_curvature.sources.networks import resnet20
from tests.support.networks import randomized
from tests.support.sweeping import assert_projections_agree, assert_sweep_agrees, layer_directions


def _numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _images(count=2, pixels=32, seed=0):
    return _numbers(count, 3, pixels, pixels, seed=seed), torch.arange(count) % 10


def _normalizing(model, x):
    """A network whose running statistics are near those of some images, so that no layer's signal fades."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    model.train()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model(torch.cat([x, torch.randn(14, *x.shape[1:], dtype=x.dtype)]))
        for norm in norms:
            norm.momentum = 0.1
            norm.running_mean += 0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
            norm.running_var *= 0.8 + 0.4 * torch.rand_like(norm.running_var)
    return model.eval()


def _vgg11_bn():
    model = models.vgg11_bn(num_classes=10)
    # The three layers of the original hold 120 million parameters, which make the test slow and nothing else.
    model.classifier = nn.Sequential(nn.Linear(512 * 7 * 7, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 10))
    return model


def _vision_transformer():
    return models.VisionTransformer(16, 4, 2, 2, 16, 32, num_classes=10)


def _swin():
    return models.SwinTransformer([2, 2], 16, [2, 2], [2, 4], [2, 2], num_classes=10)


def _swin_v2():
    block = models.swin_transformer.SwinTransformerBlockV2
    merging = models.swin_transformer.PatchMergingV2
    return models.SwinTransformer(
        [2, 2], 16, [2, 2], [2, 4], [2, 2], num_classes=10, block=block, downsample_layer=merging
    )


NETWORKS = {
    "resnet20": (resnet20, 32),
    "resnet18": (lambda: models.resnet18(num_classes=10), 32),
    "vgg11_bn": (_vgg11_bn, 32),
    "mobilenet_v3_small": (lambda: models.mobilenet_v3_small(num_classes=10), 32),
    "densenet121": (lambda: models.densenet121(num_classes=10), 32),
    "efficientnet_b0": (lambda: models.efficientnet_b0(num_classes=10), 32),
    "convnext_tiny": (lambda: models.convnext_tiny(num_classes=10), 32),
    "squeezenet": (lambda: models.squeezenet1_1(num_classes=10), 32),
    "VisionTransformer": (_vision_transformer, 16),
    "swin": (_swin, 32),
    "swin v2": (_swin_v2, 32),
}


def _network(name, count=2):
    make, pixels = NETWORKS[name]
    x, y = _images(count, pixels)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().double()
    return _normalizing(model, x), (x, y)


@pytest.fixture
def by_autodiff(monkeypatch):
    """Names of the operations without a rule of their own, as the test goes on."""
    found = []
    rule_of = plan.rule_of

    def watched(node, moving):
        rule = rule_of(node, moving)
        if isinstance(rule, ByAutodiff):
            found.append(str(node.target))
        return rule

    monkeypatch.setattr(plan, "rule_of", watched)
    return found


# Annotations are checked by the tests of smaller networks; here that would take as long as the computation.
@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "convnext_tiny" else name for name in NETWORKS]
)
def test_networks_for_images(name, by_autodiff):
    model, batch = _network(name)
    objective = Objective(model, [batch])
    assert_sweep_agrees(objective, layer_directions(objective, "fused", most=4))
    # Cosine attention has norms; nothing else needs more than the rules give.
    assert set(by_autodiff) <= ({"aten.linalg_vector_norm.default"} if name == "swin v2" else set())


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("name", "policy"), [("resnet20", "batch"), ("resnet20", "recalibrate"), ("mobilenet_v3_small", "batch")]
)
def test_networks_for_images_that_normalize_by_the_batch(name, policy):
    model, batch = _network(name, count=4)
    objective = Objective(model, [batch], batch_norm=policy)
    assert_sweep_agrees(objective, layer_directions(objective, "module", most=4))


def test_running_statistics_are_among_what_moves():
    model, batch = _network("resnet20")
    objective = Objective(model, [batch])
    directions = {
        name: {name: tensor} for name, tensor in layer_directions(objective)["everything"].items() if "running" in name
    }
    chosen = {name: directions[name] for name in list(directions)[::9]}
    assert {name.rpartition(".")[2] for name in chosen} == {"running_mean", "running_var"}
    assert_sweep_agrees(objective, chosen)


def test_a_network_in_channels_last():
    model, (x, y) = _network("resnet18")
    model = model.to(memory_format=torch.channels_last)
    objective = Objective(model, [(x.contiguous(memory_format=torch.channels_last), y)])
    assert_sweep_agrees(objective, layer_directions(objective, "fused", most=3))


# --- Language


def _gpt2(attention):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=23,
        n_positions=12,
        n_embd=16,
        n_layer=2,
        n_head=2,
        attn_implementation=attention,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomized(transformers.GPT2LMHeadModel(config).double().eval())


def _tokens(count, seed, *, padded):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(23, (count, 8), generator=generator)
    labels, mask = ids.clone(), torch.ones_like(ids)
    if padded:
        mask[0, 5:] = 0
        labels[0, 5:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _next_token_loss(model, batch):
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padded", [False, True])
def test_gpt2(attention, padded):
    batches = [_tokens(3, seed, padded=padded) for seed in (0, 1)]
    objective = Objective(_gpt2(attention), batches, loss_fn=BatchLoss(_next_token_loss))
    assert_sweep_agrees(objective, layer_directions(objective, "module", most=5))


def test_gpt2_and_the_loss_that_it_brings():
    # That loss is computed in single precision, whatever the network's is.
    loss = BatchLoss(lambda model, batch: model(**batch).loss)
    objective = Objective(_gpt2("sdpa"), [_tokens(3, 0, padded=True)], loss_fn=loss)
    assert_sweep_agrees(objective, layer_directions(objective, "module", most=5), relative=1e-5)


class _Recurrent(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.fc = nn.Linear(8 if layer.bidirectional else 4, 3)

    def forward(self, x):
        return self.fc(self.layer(x)[0][:, -1])


@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(3, 4, num_layers=2, batch_first=True),
        nn.LSTM(3, 6, proj_size=4, batch_first=True),
        nn.GRU(3, 4, bidirectional=True, batch_first=True),
        nn.RNN(3, 4, batch_first=True),
        nn.RNN(3, 4, nonlinearity="relu", batch_first=True),
    ],
    ids=str,
)
def test_recurrent_networks(layer):
    batches = [(_numbers(n, 4, 3, seed=n), torch.arange(n)) for n in (3, 2)]
    assert_sweep_agrees(Objective(randomized(_Recurrent(layer).double()), batches))


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_cells(cell):
    class Unrolled(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.fc = cell(3, 4), nn.Linear(4, 3)

        def forward(self, x):
            state = None
            for step in x.unbind(1):
                state = self.cell(step, state)
            return self.fc(state[0] if isinstance(state, tuple) else state)

    assert_sweep_agrees(Objective(randomized(Unrolled().double()), [(_numbers(3, 3, 3), torch.arange(3))]))


def test_packed_sequences_are_never_wrong():
    class Packed(_Recurrent):
        def forward(self, x):
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 2, 3]), True, enforce_sorted=False)
            return self.fc(self.layer(packed)[1][0][-1])

    model = randomized(Packed(nn.LSTM(3, 4, batch_first=True)).double())
    objective = Objective(model, [(_numbers(3, 4, 3), torch.arange(3))])
    directions = layer_directions(objective)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        found = project_hessian(objective, {}, directions)
    expected = project_hessian(objective, {}, directions, method="hvp")
    assert np.abs(expected.curvature).min() > 1e-6
    assert_projections_agree(found, expected, relative=1e-9)


# --- Losses


_LABELS = torch.tensor([0, 3, 1, 2])
_PROBABILITIES = torch.softmax(_numbers(4, 4, seed=5), 1)
_TARGETS = _numbers(4, 4, seed=6)
_CLASS_WEIGHTS = torch.tensor([0.3, 1.0, 2.0, 0.7])
LOSSES = {
    "cross-entropy": (nn.CrossEntropyLoss(), _LABELS),
    "cross-entropy, weighted": (nn.CrossEntropyLoss(weight=_CLASS_WEIGHTS), _LABELS),
    "cross-entropy, smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), _LABELS),
    "cross-entropy, smoothed and weighted": (nn.CrossEntropyLoss(_CLASS_WEIGHTS, label_smoothing=0.1), _LABELS),
    "cross-entropy, soft": (nn.CrossEntropyLoss(), _PROBABILITIES),
    "cross-entropy, soft, weighted and smoothed": (
        nn.CrossEntropyLoss(_CLASS_WEIGHTS, label_smoothing=0.1),
        _PROBABILITIES,
    ),
    "cross-entropy, ignoring": (nn.CrossEntropyLoss(ignore_index=3), _LABELS),
    "cross-entropy, ignoring, weighted and smoothed": (
        nn.CrossEntropyLoss(_CLASS_WEIGHTS, ignore_index=3, label_smoothing=0.1),
        _LABELS,
    ),
    "negative log-likelihood": (lambda out, y: F.nll_loss(F.log_softmax(out, 1), y), _LABELS),
    "negative log-likelihood, weighted": (
        lambda out, y: F.nll_loss(F.log_softmax(out, 1), y, weight=_CLASS_WEIGHTS.double(), ignore_index=1),
        _LABELS,
    ),
    "squared error": (nn.MSELoss(), _TARGETS),
    "squared error of probabilities": (lambda out, y: F.mse_loss(out.softmax(1), y), _PROBABILITIES),
    "binary cross-entropy of logits": (nn.BCEWithLogitsLoss(), _PROBABILITIES),
    "binary cross-entropy of logits, weighted": (
        nn.BCEWithLogitsLoss(weight=_CLASS_WEIGHTS, pos_weight=1 + _CLASS_WEIGHTS),
        _PROBABILITIES.round(),
    ),
    "binary cross-entropy": (lambda out, y: F.binary_cross_entropy(torch.sigmoid(out), y), _PROBABILITIES),
    "Huber": (nn.HuberLoss(delta=0.7), _TARGETS),
    "smooth L1": (nn.SmoothL1Loss(beta=0.7), _TARGETS),
    "L1": (nn.L1Loss(), _TARGETS),
    "Kullback-Leibler": (
        lambda out, y: F.kl_div(F.log_softmax(out, 1), y, reduction="batchmean"),
        _PROBABILITIES,
    ),
    "Kullback-Leibler of logarithms": (
        lambda out, y: F.kl_div(F.log_softmax(out, 1), y.log(), reduction="batchmean", log_target=True),
        _PROBABILITIES,
    ),
    "Poisson": (nn.PoissonNLLLoss(), _PROBABILITIES),
    "soft margins": (nn.MultiLabelSoftMarginLoss(), _PROBABILITIES),
    "focal": (
        lambda out, y: (
            (1 - out.softmax(1).gather(1, y[:, None])) ** 2 * F.cross_entropy(out, y, reduction="none")[:, None]
        ).mean(),
        _LABELS,
    ),
}


def _mlp():
    return randomized(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double())


@pytest.mark.parametrize(("loss_fn", "target"), LOSSES.values(), ids=LOSSES)
def test_losses(loss_fn, target):
    batches = [(_numbers(4, 5), target), (_numbers(3, 5, seed=1), target[:3])]
    assert_sweep_agrees(Objective(_mlp(), batches, loss_fn=loss_fn))


@pytest.mark.parametrize(
    "loss_fn",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(_CLASS_WEIGHTS, ignore_index=1),
        nn.CrossEntropyLoss(label_smoothing=0.1),
    ],
    ids=["plain", "weighted, ignoring", "smoothed"],
)
@pytest.mark.parametrize("axes", [1, 2])
def test_cross_entropy_at_every_position(loss_fn, axes):
    convolution = (nn.Conv1d, nn.Conv2d)[axes - 1]
    model = nn.Sequential(convolution(2, 3, 3, padding=1), nn.GELU(), convolution(3, 4, 1))
    shape = (3, 2, *(5, 4)[:axes])
    target = torch.randint(4, (3, *shape[2:]), generator=torch.Generator().manual_seed(0))
    assert_sweep_agrees(Objective(randomized(model.double()), [(_numbers(*shape), target)], loss_fn=loss_fn))


# --- On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")
@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v3_small", "VisionTransformer", "swin"])
def test_networks_for_images_on_a_gpu(name, by_autodiff):
    model, batch = _network(name)
    objective = Objective(model, [batch], device="cuda")
    found = assert_sweep_agrees(objective, layer_directions(objective, "fused", most=4))
    assert not by_autodiff
    host = Objective(model, [batch])
    expected = project_hessian(host, {}, layer_directions(host, "fused", most=4), method="hvp")
    assert_projections_agree(found, expected, relative=1e-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")
@pytest.mark.parametrize("policy", ["interpolate", "batch"])
def test_single_precision_on_a_gpu(policy):
    model, batch = _network("resnet20", count=8)
    objective = Objective(model.float(), [batch], device="cuda", batch_norm=policy)
    directions = layer_directions(objective, "fused")
    found = project_hessian(objective, {}, directions, method="sweep").curvature
    expected = project_hessian(Objective(model.double(), [batch], batch_norm=policy), {}, directions, method="hvp")
    np.testing.assert_allclose(found, expected.curvature, rtol=0, atol=1e-4 * np.abs(expected.curvature).max())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")
@pytest.mark.parametrize("layer", [nn.LSTM(3, 4, batch_first=True), nn.GRU(3, 4, batch_first=True)], ids=str)
def test_recurrent_networks_on_a_gpu(layer):
    model = randomized(_Recurrent(layer).double())
    assert_sweep_agrees(Objective(model, [(_numbers(3, 4, 3), torch.arange(3))], device="cuda"))
