"""Claim: whole networks go through the sweep, not the fallback, and agree with Hessian-vector products."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

from benchmarks.support.kinks import far_from_kinks
from lmc_curvature import BatchLoss, Objective, project_hessian
from lmc_curvature.errors import FallbackWarning
from lmc_curvature.sources.resnets import resnet20
from tests.support.networks import randomized
from tests.support.sweeping import (
    assert_projections_agree,
    assert_sweep_agrees,
    compiled_batches,
    layer_directions,
    swept_by_autodiff,
)

# All of them together take seconds.


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


# In their own sizes; many more are in the zoo, smaller.
NETWORKS = {
    "resnet20": (resnet20, 32),
    "resnet18": (lambda: models.resnet18(num_classes=10), 32),
    "mobilenet_v3_small": (lambda: models.mobilenet_v3_small(num_classes=10), 32),
    "densenet121": (lambda: models.densenet121(num_classes=10), 32),
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


# Annotations are checked by the tests of smaller networks; here that would take as long as the computation.
@pytest.mark.usefixtures("untyped")
@pytest.mark.check
@pytest.mark.parametrize("name", list(NETWORKS))
def test_networks_for_images(name):
    model, batch = _network(name)
    objective = Objective(model, [batch])
    directions = layer_directions(objective, "fused", most=4)
    assert_sweep_agrees(objective, directions)
    (compiled,) = compiled_batches(objective, directions)
    # Cosine attention has norms; nothing else needs more than the rules give.
    assert swept_by_autodiff(compiled) <= ({"aten.linalg_vector_norm.default"} if name == "swin v2" else set())


@pytest.mark.usefixtures("untyped")
@pytest.mark.check
@pytest.mark.parametrize(
    ("name", "policy"), [("resnet20", "batch"), ("resnet20", "recalibrate"), ("mobilenet_v3_small", "batch")]
)
def test_networks_for_images_that_normalize_by_the_batch(name, policy):
    model, batch = _network(name, count=4)
    objective = Objective(model, [batch], batch_norm=policy)
    assert_sweep_agrees(objective, layer_directions(objective, "module", most=4))


@pytest.mark.check
@pytest.mark.usefixtures("untyped")
def test_running_statistics_are_among_what_moves():
    model, batch = _network("resnet20")
    objective = Objective(model, [batch])
    directions = {
        name: {name: tensor} for name, tensor in layer_directions(objective)["everything"].items() if "running" in name
    }
    chosen = {name: directions[name] for name in list(directions)[::9]}
    assert {name.rpartition(".")[2] for name in chosen} == {"running_mean", "running_var"}
    assert_sweep_agrees(objective, chosen)


@pytest.mark.check
@pytest.mark.usefixtures("untyped")
def test_a_network_in_channels_last():
    model, (x, y) = _network("resnet20")
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


@pytest.mark.check
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padded", [False, True])
def test_gpt2(attention, padded):
    batches = [_tokens(3, seed, padded=padded) for seed in (0, 1)]
    objective = Objective(_gpt2(attention), batches, loss_fn=BatchLoss(_next_token_loss))
    assert_sweep_agrees(objective, layer_directions(objective, "module", most=5))


@pytest.mark.check
def test_gpt2_and_batches_of_a_tokenizer():
    def loss(model, batch):
        logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten())

    transformers = pytest.importorskip("transformers")
    batches = [transformers.BatchEncoding(_tokens(3, seed, padded=True)) for seed in (0, 1)]
    objective = Objective(_gpt2("eager"), batches, loss_fn=BatchLoss(loss))
    assert_sweep_agrees(objective, layer_directions(objective, "module", most=5))


@pytest.mark.check
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


@pytest.mark.check
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


@pytest.mark.check(after=1)
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


def test_packed_sequences_whose_lengths_come_with_the_batch_are_never_wrong():
    class Packed(_Recurrent):
        def forward(self, inputs):
            packed = nn.utils.rnn.pack_padded_sequence(*inputs, True, enforce_sorted=False)
            return self.fc(self.layer(packed)[1][0][-1])

    model = randomized(Packed(nn.LSTM(3, 4, batch_first=True)).double())
    batches = [((_numbers(3, 4, 3), torch.tensor(lengths)), torch.arange(3)) for lengths in ([4, 2, 3], [3, 4, 1])]
    objective = Objective(model, batches)
    directions = layer_directions(objective)
    with pytest.warns(FallbackWarning, match="a number is read off a tensor.*in forward: packed = nn.utils.rnn"):
        found = project_hessian(objective, {}, directions)
    expected = project_hessian(objective, {}, directions, method="hvp")
    assert np.abs(expected.curvature).min() > 1e-6
    assert_projections_agree(found, expected, relative=1e-9)


# --- On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")
@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v3_small", "VisionTransformer", "swin"])
def test_networks_for_images_on_a_gpu(name):
    model, batch = _network(name)
    objective = Objective(model, [batch], device="cuda")
    directions = layer_directions(objective, "fused", most=4)
    found = assert_sweep_agrees(objective, directions)
    assert not swept_by_autodiff(*compiled_batches(objective, directions))
    # CUDA's hard swish multiplies by 1/6 in single precision, whatever its argument's type, and MobileNet has 19 of
    # them: on another device it has another loss.
    device = "cuda" if name == "mobilenet_v3_small" else "cpu"
    expected = project_hessian(Objective(model, [batch], device=device), {}, directions, method="hvp")
    assert_projections_agree(found, expected, relative=1e-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")
@pytest.mark.parametrize("policy", ["interpolate", "batch"])
def test_single_precision_on_a_gpu(policy):
    # Away from the kinks of rectifiers, at which single precision may be on the other side.
    model, (x, y) = _network("resnet20", count=64)
    chosen = far_from_kinks(model.float().eval(), x.float(), 8)
    batch = (x[chosen], y[chosen])
    objective = Objective(model, [batch], device="cuda", batch_norm=policy)
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
