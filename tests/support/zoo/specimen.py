"""What a network of the zoo is, and losses that many of them share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

CLASSES = 3
POLICIES = ("interpolate", "batch", "recalibrate")


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Squared error of classes' scores, which come second as in cross-entropy."""
    wanted = F.one_hot(target, output.shape[1]).movedim(-1, 1)
    return F.mse_loss(output, wanted.to(output.dtype))


# None is the default, cross-entropy.
CLASSIFICATION: Mapping[str, Any] = MappingProxyType({"cross-entropy": None, "squared error": squared_error})
CROSS_ENTROPY: Mapping[str, Any] = MappingProxyType({"cross-entropy": None})
REGRESSION: Mapping[str, Any] = MappingProxyType({"squared error": F.mse_loss, "Huber": nn.HuberLoss(delta=0.7)})


@dataclass(frozen=True)
class Specimen:
    """A network of the zoo with data and losses; every loss is tried under the first policy, the first under all.

    Attributes:
        family: What kind of network it is.
        make: Makes the network, in single precision.
        batch: Makes a batch of a few examples, in float64, out of a generator.
        losses: Name to loss.
        policies: The policies of batch normalisation that make a difference.
    """

    family: str
    make: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Any]
    losses: Mapping[str, Any] = field(default_factory=lambda: CLASSIFICATION)
    policies: tuple[str, ...] = ("interpolate",)

    def model(self) -> nn.Module:
        """The network, in float64, with random weights of which none is zero or one by convention."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.make().double().eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
                for module in model.modules():
                    if isinstance(module, _BatchNorm) and module.running_mean is not None:
                        module.running_mean.normal_(std=0.3)
                        module.running_var.uniform_(0.5, 2.0)
        return model

    def batches(self) -> list[Any]:
        """Two batches of one shape: what was captured with the first has to hold for the second."""
        generator = torch.Generator().manual_seed(1)
        return [self.batch(generator) for _ in range(2)]

    @property
    def trials(self) -> list[tuple[str, str]]:
        """Losses and policies, by name."""
        first, *others = self.losses
        return [(first, policy) for policy in self.policies] + [(loss, self.policies[0]) for loss in others]


def numbers(generator: torch.Generator, *shape: int) -> Tensor:
    """Random numbers in float64."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def labels(generator: torch.Generator, *shape: int, classes: int = CLASSES) -> Tensor:
    """Random classes."""
    return torch.randint(classes, shape, generator=generator)


def classified(*shape: int, examples: int = 3) -> Callable[[torch.Generator], Any]:
    """Batches of random inputs of a shape, each with a class."""
    return lambda generator: (numbers(generator, examples, *shape), labels(generator, examples))


def regressed(inputs: tuple[int, ...], outputs: tuple[int, ...], examples: int = 3) -> Callable[[torch.Generator], Any]:
    """Batches of random inputs and targets of some shapes."""
    return lambda generator: (numbers(generator, examples, *inputs), numbers(generator, examples, *outputs))
