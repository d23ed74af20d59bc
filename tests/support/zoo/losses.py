"""Losses of a small perceptron."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.zoo.specimen import CLASSES, Specimen, classified, labels, numbers

WIDTH = 5


def _perceptron(outputs: int = CLASSES) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, outputs))


def _one_hot(output: Tensor, target: Tensor) -> Tensor:
    return F.one_hot(target, output.shape[1]).to(output.dtype)


def _soft(output: Tensor, target: Tensor) -> Tensor:
    return 0.7 * _one_hot(output, target) + 0.1


def _dice(output: Tensor, target: Tensor) -> Tensor:
    p, wanted = output.softmax(1), _one_hot(output, target)
    return 1 - (2 * p * wanted).sum() / (p.square().sum() + wanted.sum())


def _focal(output: Tensor, target: Tensor) -> Tensor:
    log_p = output.log_softmax(1).gather(1, target[:, None])
    return -((1 - log_p.exp()) ** 2 * log_p).mean()


def _contrast(output: Tensor, target: Tensor) -> Tensor:
    z = F.normalize(output)
    return F.cross_entropy(z @ z.T / 0.5, (torch.arange(len(z)) + 1) % len(z))


def _ranked(output: Tensor, target: Tensor) -> Tensor:
    ordered = output[:, 0].gather(0, target.argsort(stable=True))
    return (ordered.flip(0).logcumsumexp(0).flip(0) - ordered).mean()


def _quantiles(output: Tensor, target: Tensor) -> Tensor:
    error = target[:, None] - output
    levels = torch.tensor([0.1, 0.5, 0.9])
    return torch.maximum(levels * error, (levels - 1) * error).mean()


def _mixture(output: Tensor, target: Tensor) -> Tensor:
    weight, mean, log_scale = output[:, :3].log_softmax(1), output[:, 3:6], output[:, 6:]
    error = (target[:, :1] - mean) / log_scale.exp()
    return -(weight - log_scale - error.square() / 2).logsumexp(1).mean()


def _gaussian(output: Tensor, target: Tensor) -> Tensor:
    mean, variance = output.chunk(2, 1)
    return F.gaussian_nll_loss(mean, target, F.softplus(variance))


def _gaussian_module(output: Tensor, target: Tensor) -> Tensor:
    mean, variance = output.chunk(2, 1)
    return nn.GaussianNLLLoss(full=True, eps=0.5)(mean, target, variance.square())


def _triplet(output: Tensor, target: Tensor) -> Tensor:
    return F.triplet_margin_loss(output, output.roll(1, 0), output.roll(2, 0) + 0.1 * target[:, None])


def _alignment(output: Tensor, target: Tensor) -> Tensor:
    lengths = torch.full((len(output),), 4), torch.full((len(output),), 2)
    return F.ctc_loss(output.unflatten(1, (4, 3)).log_softmax(2).transpose(0, 1), target, *lengths)


CLASSIFIERS: dict[str, Any] = {
    "cross-entropy": None,
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.1),
    "weighted": nn.CrossEntropyLoss(torch.tensor([0.3, 1.0, 2.0])),
    "soft labels": lambda output, target: F.cross_entropy(output, _soft(output, target)),
    "focal": _focal,
    "Dice": _dice,
    "binary": lambda output, target: F.binary_cross_entropy_with_logits(output, _one_hot(output, target)),
    "Kullback–Leibler": lambda output, target: F.kl_div(
        output.log_softmax(1), _soft(output, target), reduction="batchmean"
    ),
    "squared error": lambda output, target: F.mse_loss(output, _one_hot(output, target)),
    "smooth L1": lambda output, target: F.smooth_l1_loss(output, _one_hot(output, target), beta=0.7),
    "Poisson": lambda output, target: F.poisson_nll_loss(output, _one_hot(output, target)),
    "contrast": _contrast,
    "ranks": _ranked,
    "quantiles": _quantiles,
    "triplets": _triplet,
}


def _targets(width: int, examples: int = 3) -> Any:
    return lambda generator: (numbers(generator, examples, WIDTH), numbers(generator, examples, width))


def _sequences(generator: torch.Generator) -> Any:
    return numbers(generator, 3, WIDTH), 1 + labels(generator, 3, 2, classes=2)


LOSSES = {
    "perceptron": Specimen("losses", _perceptron, classified(WIDTH, examples=4), CLASSIFIERS),
    "perceptron, Gaussian likelihood": Specimen(
        "losses",
        lambda: _perceptron(4),
        _targets(2),
        {"gaussian_nll_loss": _gaussian, "GaussianNLLLoss, small variances": _gaussian_module},
    ),
    "perceptron, mixture of densities": Specimen("losses", lambda: _perceptron(9), _targets(1), {"mixture": _mixture}),
    "perceptron, multi_margin_loss": Specimen(
        "losses", _perceptron, classified(WIDTH), {"multi_margin_loss": F.multi_margin_loss}
    ),
    "perceptron, CTC": Specimen("losses", lambda: _perceptron(12), _sequences, {"ctc_loss": _alignment}),
}
