"""Small random networks with data, and backward passes that are not those of what is computed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from torch import nn

from lmc_curvature import Objective

ACTIVATIONS = [nn.ReLU, nn.GELU, nn.Tanh, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Softplus, nn.Hardswish, nn.Hardsigmoid]
LOSSES: list[Callable[[Any, Any], Any]] = [
    F.cross_entropy,
    lambda output, target: F.mse_loss(output, F.one_hot(target, 3).to(output)),
    lambda output, target: F.smooth_l1_loss(output, F.one_hot(target, 3).to(output), beta=0.3),
    nn.CrossEntropyLoss(label_smoothing=0.1),
]


@dataclass(frozen=True)
class RandomNetwork:
    """What a random network is made of; `make` makes the same network and data each time."""

    images: bool
    activations: tuple[int, ...]
    normalized: bool
    residual: bool
    loss: int
    double: bool
    policy: str
    examples: int
    seed: int

    def objective(
        self, fault: Callable[[torch.Tensor], torch.Tensor] | None = None, place: int = 0, **options: Any
    ) -> Objective:
        """The network's objective; a fault is put after one of its activations."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            blocks = [self._block(index, width) for index, width in zip(self.activations, self._widths(), strict=True)]
            if fault is not None:
                blocks.insert(1 + place % len(blocks), _Calling(fault))
            head = [nn.Flatten(), nn.Linear(4 * 9 if self.images else 4, 3)]
            network = nn.Sequential(*blocks, *head).to(torch.float64 if self.double else torch.float32)
            x = torch.randn(self.examples, *((2, 5, 5) if self.images else (4,)))
            y = torch.randint(0, 3, (self.examples,))
        return Objective(network, [(x, y)], loss_fn=LOSSES[self.loss], batch_norm=self.policy, **options)

    def _widths(self) -> list[tuple[int, int]]:
        return [(2 if self.images else 4, 4), *[(4, 4)] * (len(self.activations) - 1)]

    def _block(self, activation: int, width: tuple[int, int]) -> nn.Module:
        before, after = width
        if self.images:
            # The first convolution makes five pixels three.
            layers = [nn.Conv2d(before, after, 3, padding=int(before == after))]
            layers += [nn.BatchNorm2d(after)] if self.normalized else []
        else:
            layers = [nn.Linear(before, after), *([nn.LayerNorm(after)] if self.normalized else [])]
        block = nn.Sequential(*layers, ACTIVATIONS[activation]())
        return _Residual(block) if self.residual and before == after else block


class _Residual(nn.Module):
    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.block(x)


class _Calling(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


random_networks = st.builds(
    RandomNetwork,
    images=st.booleans(),
    activations=st.lists(st.integers(0, len(ACTIVATIONS) - 1), min_size=1, max_size=4).map(tuple),
    normalized=st.booleans(),
    residual=st.booleans(),
    loss=st.integers(0, len(LOSSES) - 1),
    double=st.booleans(),
    policy=st.sampled_from(["interpolate", "batch"]),
    examples=st.integers(2, 40),
    seed=st.integers(0, 2**31),
)


class OutsideAutograd(torch.autograd.Function):
    """x³ + x, whose backward pass is right and computed by NumPy: nothing tells autograd that it depends on x."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach()
        return x**3 + x

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.from_numpy(3 * ctx.x.numpy() ** 2 + 1)


class WrongScale(torch.autograd.Function):
    """The identity, whose backward pass is off by one percent."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 1.01 * gradient


class WrongSecond(torch.autograd.Function):
    """A sine whose backward pass is right, and whose backward pass has another backward pass."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        cosine = x.cos()
        return gradient * (0.7 * cosine.detach() + 0.3 * cosine)


def _half_detached(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=1)
    return torch.cat([first, second.detach()], dim=1)


def _straight_through(x: torch.Tensor) -> torch.Tensor:
    return x + ((8 * x).round() / 8 - x).detach()


def _hooked(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    if x.requires_grad:
        x.register_hook(lambda gradient: 0.9 * gradient)
    return x


def _same(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


Function = Callable[[torch.Tensor], torch.Tensor]
FAULTS: dict[str, tuple[Function, Function]] = {
    "outside autograd": (OutsideAutograd.apply, lambda x: x**3 + x),
    "wrong scale": (WrongScale.apply, _same),
    "wrong second derivative": (WrongSecond.apply, torch.sin),
    "half detached": (_half_detached, _same),
    "straight through": (_straight_through, _same),
    "gradient hook": (_hooked, _same),
}
"""Functions with derivatives that are not theirs, and functions with those derivatives' right values."""
