"""Networks with data and a loss, in float64, that between them use everything the engine must differentiate."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lmc_curvature import BatchLoss


class ConvNet(nn.Module):
    """Convolutions with batch normalisation and a residual connection."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = F.softplus(self.bn1(self.conv1(x)))
        x = F.softplus(self.bn2(self.conv2(x)) + x)
        return self.fc(x.mean((2, 3)))


class TiedNet(nn.Module):
    """An autoencoder-like network whose first and last layer share one weight."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(6, 6)
        self.middle = nn.Linear(6, 6)
        self.decoder = nn.Linear(6, 6)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.decoder(torch.tanh(self.middle(torch.tanh(self.encoder(x)))))


class DictNet(nn.Module):
    """A network called with keywords that returns its own loss, as Hugging Face models do."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7)

    def forward(self, ids, labels):
        logits = self.head(torch.tanh(self.embedding(ids)))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


class Recurrent(nn.Module):
    """An LSTM read out at its last step."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.lstm(x)[0][:, -1])


class Tempered(nn.Module):
    """Logits divided by a temperature, which is a parameter without dimensions."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.log_temperature = nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        return self.fc(torch.tanh(x)) * torch.exp(-self.log_temperature)


def _normalized_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3))


def _attention() -> nn.Module:
    return nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(12, 3))


def _images(generator: torch.Generator, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(size, 2, 5, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (size,), generator=generator)


def _vectors(*shape: int, classes: int = 3) -> Callable[[torch.Generator, int], Any]:
    def make(generator: torch.Generator, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(size, *shape, generator=generator, dtype=torch.float64)
        return x, torch.randint(classes, (size,), generator=generator)

    return make


def _regression(generator: torch.Generator, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(size, 6, generator=generator, dtype=torch.float64)
    return x, x.flip(1)


def _tokens(generator: torch.Generator, size: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(7, (size, 4), generator=generator)
    return {"ids": ids, "labels": ids.roll(1, 1)}


@dataclass(frozen=True)
class Case:
    """How to make networks of one kind, their data, and the options they need."""

    make_model: Callable[[], nn.Module]
    make_batch: Callable[[torch.Generator, int], Any]
    options: dict[str, Any] = field(default_factory=dict)

    def model(self, seed: int = 0) -> nn.Module:
        """A network with random weights, and running statistics that are not the trivial ones."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.make_model().double()
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_(std=0.3)
                    module.running_var.uniform_(0.5, 2.0)
        return model

    def batches(self, sizes: tuple[int, ...] = (6, 6, 3), seed: int = 1) -> list[Any]:
        """Batches of the given sizes; the last one is short by default."""
        generator = torch.Generator().manual_seed(seed)
        return [self.make_batch(generator, size) for size in sizes]


CASES = {
    "conv, interpolate": Case(ConvNet, _images),
    "conv, batch": Case(ConvNet, _images, {"batch_norm": "batch"}),
    "conv, recalibrate": Case(ConvNet, _images, {"batch_norm": "recalibrate"}),
    "tied weights": Case(TiedNet, _regression, {"loss_fn": F.mse_loss}),
    "LayerNorm and GELU": Case(_normalized_mlp, _vectors(5)),
    "attention": Case(_attention, _vectors(3, 4)),
    "LSTM": Case(Recurrent, _vectors(4, 3)),
    "scalar parameter": Case(Tempered, _vectors(4)),
    "dict batches": Case(DictNet, _tokens, {"loss_fn": BatchLoss(lambda model, batch: model(**batch)["loss"])}),
}
