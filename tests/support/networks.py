"""More networks than `cases`: forms that are easy to get wrong, and what must not change about a network."""

import contextlib
import copy
import itertools
import random

import jaxtyping
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, Dataset

from lmc_curvature import BatchLoss
from tests.support.cases import CASES, Case


class ActivatedBatchNorm(nn.BatchNorm2d):
    """Calls the functional form and then an activation, as timm's BatchNormAct2d does."""

    def forward(self, input):
        by_batch = self.training or self.running_mean is None
        x = F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, by_batch, self.momentum, self.eps
        )
        return F.silu(x)


NORMS = {
    "batch": lambda: nn.BatchNorm2d(3),
    "batch without affine": lambda: nn.BatchNorm2d(3, affine=False),
    "batch with activation": lambda: ActivatedBatchNorm(3),
    "instance": lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
}


def normalized_net(norm):
    """Convolution, the named normalisation, and a linear layer; it has no other normalisation."""
    return nn.Sequential(nn.Conv2d(2, 3, 3), NORMS[norm](), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3))


def randomized(model, seed=0):
    """Give every parameter and running statistic its own random value, so that no two are alike by default."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(0.5 * torch.randn(tensor.shape, generator=generator))
                if name.endswith("running_var"):
                    tensor.abs_().add_(0.5)
    return model


class _Shared(list):
    """A list that copies of its owner share."""

    def __deepcopy__(self, memo):
        return self


class Watched(nn.Module):
    """A network with a record of its calls: the purpose of each, and the number of examples.

    The purposes: `"capture"`, `"derivative"` where an autograd graph is made, `"value"` where none is.
    """

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.calls = _Shared()

    def forward(self, x):
        derivative = "derivative" if torch.is_grad_enabled() else "value"
        self.calls.append(("capture" if torch.compiler.is_compiling() else derivative, x.shape[0]))
        return self.network(x)

    def sizes(self, purpose):
        """The numbers of examples in the calls for a purpose."""
        return [size for reason, size in self.calls if reason == purpose]


class TwoWayLSTM(nn.Module):
    """A two-layer, two-way LSTM with dropout between its layers."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, num_layers=2, bidirectional=True, dropout=0.5, batch_first=True)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.lstm(x)[0][:, -1])


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence with itself."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.attention(x, x, x)[0].mean(1))


class AlwaysDropout(nn.Module):
    """Drops values in evaluation mode, too."""

    def forward(self, x):
        return F.dropout(x, 0.5)


class StubbornDropout(nn.Dropout):
    """Stays in training mode."""

    def train(self, mode=True):
        return super().train(True)


def _dropout_mlp():
    return nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.ReLU(), nn.Linear(6, 3))


def _weight_normalized():
    return nn.Sequential(weight_norm(nn.Linear(5, 6)), nn.Tanh(), weight_norm(nn.Linear(6, 3, bias=False)))


def _encoder():
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, activation="gelu")
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(12, 3))


_attention_batch, _vector_batch = CASES["attention"].make_batch, CASES["LayerNorm and GELU"].make_batch
NETWORKS = {
    **{name: case for name, case in CASES.items() if "batch_norm" not in case.options},
    "two-way LSTM": Case(TwoWayLSTM, CASES["LSTM"].make_batch),
    "multi-head attention": Case(SelfAttention, _attention_batch),
    "transformer encoder": Case(_encoder, _attention_batch),
    "dropout": Case(_dropout_mlp, _vector_batch),
    "weight norm": Case(_weight_normalized, _vector_batch),
    **{norm: Case(lambda norm=norm: normalized_net(norm), CASES["conv, batch"].make_batch) for norm in NORMS},
}


def joined(batches):
    """All batches as one."""
    if isinstance(batches[0], dict):
        return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


def in_float32(batches):
    """Pairs of tensors, the floating-point ones in single precision."""
    return [tuple(t.float() if t.is_floating_point() else t for t in batch) for batch in batches]


def plain_loss(model, data, loss_fn=None):
    """The loss of a network as its user would compute it, on a copy in the mode that the network is in."""
    model = copy.deepcopy(model)
    if isinstance(loss_fn, BatchLoss):
        return loss_fn.fn(model, data)
    return (loss_fn or F.cross_entropy)(model(data[0]), data[1])


def state_of(model):
    """Parameters and running statistics of a network, by name."""
    buffers = {name: tensor for name, tensor in model.named_buffers() if "running_" in name}
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *buffers.items()]}


class Augmented(Dataset):
    """Examples whose augmentation draws from all three global generators."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        noise = torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002
        return self.x[index] * (1 + 0.01 * noise), self.y[index]


def augmenting_loader(x, y, **options):
    """A shuffling loader that draws from all three global generators."""
    return DataLoader(Augmented(x, y), batch_size=4, shuffle=True, **options)


def rng_states():
    """Fingerprints of the global random number generators of torch, random and NumPy."""
    _, keys, position, *gauss = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), random.getstate(), keys.tolist(), position, gauss


def _everything(model):
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items()}
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    plain = {
        "identity": [id(tensor) for tensor in [*model.parameters(), *model.buffers()]],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "mode": [module.training for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
    }
    return tensors, gradients, plain


def perceptron(sizes):
    """Linear layers of these sizes, each followed by tanh."""
    layers = ((nn.Linear(*pair), nn.Tanh()) for pair in itertools.pairwise(sizes))
    return nn.Sequential(*itertools.chain(*layers))


def permuted_pair(sizes, dtype=torch.float32):
    """A perceptron, and the same function with its hidden units in another order: not all layers can be averaged."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = perceptron(sizes).to(dtype)
        for parameter in first.parameters():
            parameter.data.mul_(3)
        second = copy.deepcopy(first)
        for before, after in itertools.pairwise(second[::2]):
            order = torch.randperm(before.out_features)
            before.weight.data, before.bias.data = before.weight.data[order], before.bias.data[order]
            after.weight.data = after.weight.data[:, order]
    return first, second


@contextlib.contextmanager
def untouched(*models):
    """Assert that the block changes nothing about the networks and the global random number generators."""
    before, rng = [_everything(model) for model in models], rng_states()
    with pytest.MonkeyPatch.context() as patch:
        # beartype itself draws from `random`, to choose which item of a sequence to check.
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        yield
    assert rng_states() == rng
    for model, (tensors, gradients, plain) in zip(models, before, strict=True):
        now = _everything(model)
        torch.testing.assert_close(now[0], tensors, rtol=0, atol=0, equal_nan=True)
        assert {k for k, v in now[1].items() if v is None} == {k for k, v in gradients.items() if v is None}
        for name, gradient in gradients.items():
            assert gradient is None or torch.equal(now[1][name], gradient)
        assert now[2] == plain


class OnceDifferentiable(torch.autograd.Function):
    """A square whose backward pass is marked: torch would leave its second derivative out without a word."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient
