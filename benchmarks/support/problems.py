"""Problems for benchmarks: networks, batches and directions, all drawn from a seed."""

import copy
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from benchmarks.support.gpt2 import GPT2, next_token_loss, random_tokens
from benchmarks.support.graphs import replayed
from benchmarks.support.kinks import far_from_kinks
from benchmarks.support.memory import peak_bytes
from lmc_curvature import BatchLoss, HessianOperator, Objective, Segment
from lmc_curvature.objective.batches import Batch
from lmc_curvature.sources.data import load_digits
from lmc_curvature.sources.resnets import digits_resnet, resnet


@dataclass(frozen=True, eq=False)
class Problem:
    """A network in evaluation mode, data, and the directions towards a second network.

    Attributes:
        model: The network at which derivatives are taken.
        other: A second one of the same architecture.
        batches: `(x, y)` pairs, contiguous.
        loss: The mean loss of a batch; None for the cross-entropy of `model(x)` and y.
    """

    model: nn.Module
    other: nn.Module
    batches: Sequence[tuple[Tensor, Tensor]]
    loss: BatchLoss | None = None

    @property
    def data(self) -> tuple[Tensor, Tensor]:
        """The first batch."""
        return self.batches[0]

    @property
    def device(self) -> torch.device:
        """The device of the data."""
        return self.data[0].device

    @property
    def examples(self) -> int:
        """Number of examples."""
        return sum(len(x) for x, _ in self.batches)

    @cached_property
    def objective(self) -> Objective:
        """The mean loss; the network is checked already."""
        objective = self.new_objective()
        objective.loss()
        return objective

    def new_objective(self) -> Objective:
        """An objective that has checked and kept nothing yet."""
        return Objective(self.model, list(self.batches), loss_fn=self.loss)

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """Parameters and running statistics."""
        return self.objective.state()

    @cached_property
    def directions(self) -> dict[str, dict[str, Tensor]]:
        """Layer name to displacement: parameters and running statistics."""
        return Segment(self.model, self.other).directions()

    @cached_property
    def parameter_directions(self) -> dict[str, dict[str, Tensor]]:
        """The same for the parameters alone."""
        names = {name for name, _ in self.model.named_parameters()}
        return {
            layer: {name: tensor for name, tensor in direction.items() if name in names}
            for layer, direction in self.directions.items()
        }

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """The network's parameters, in order."""
        return list(self.model.parameters())

    @property
    def parameter_count(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters)

    @cached_property
    def parameter_hessian(self) -> HessianOperator:
        """The Hessian in the parameters alone, in which other libraries differentiate."""
        return HessianOperator(self.objective, statistics=False)

    @cached_property
    def gradient_peak(self) -> float:
        """Bytes that a gradient by plain autograd has allocated at its peak: the unit of peaks."""
        return peak_bytes(self.forward_backward, self.device)

    @cached_property
    def batch(self) -> Batch:
        """The first batch, as an objective yields it."""
        return Batch(0, len(self.data[0]), self.data)

    def forward(self) -> None:
        """One forward pass without gradients over all the data: the unit F.

        On CUDA it is replayed as one graph, so that its launches, which a small network waits for, flatter nobody.
        """
        self._forward()

    @cached_property
    def _forward(self) -> Callable[[], Any]:
        try:
            return replayed(self.eager_forward, self.device)
        except RuntimeError as error:
            warnings.warn(f"F is not replayed as a CUDA graph, which could not be captured: {error}", stacklevel=2)
            return self.eager_forward

    def eager_forward(self) -> None:
        """The forward pass of F, launched from Python."""
        with torch.no_grad():
            for x, _ in self.batches:
                self.model(x)

    def forward_backward(self) -> tuple[Tensor, ...]:
        """The gradient on the first batch by plain autograd."""
        return torch.autograd.grad(self._mean_loss(), self.parameters)

    def _mean_loss(self) -> Tensor:
        x, y = self.data
        return F.cross_entropy(self.model(x), y) if self.loss is None else self.loss.fn(self.model, (x, y))

    @cached_property
    def for_peers(self) -> "Problem":
        """The same problem as other libraries take it: the loss is a cross-entropy of outputs (examples, classes)."""
        if self.loss is None:
            return self
        return Problem(_Flat(self.model), _Flat(self.other), [(x, y.flatten()) for x, y in self.batches])

    def vector(self, direction: dict[str, Tensor]) -> Tensor:
        """A direction as a vector over the parameters, in their order."""
        return torch.cat(
            [direction.get(name, torch.zeros_like(tensor)).flatten() for name, tensor in self.model.named_parameters()]
        ).detach()

    def dense(self, directions: dict[str, dict[str, Tensor]]) -> Tensor:
        """Directions as the rows of a matrix over the entries that they move between them, in the state's order."""
        moved = {name for direction in directions.values() for name in direction}
        entries = {name: tensor for name, tensor in self.state.items() if name in moved}
        return torch.stack(
            [
                torch.cat([direction.get(name, torch.zeros_like(tensor)).flatten() for name, tensor in entries.items()])
                for direction in directions.values()
            ]
        )

    def packed(self) -> bytes:
        """The problem for another process, which `unpacked` gives it back to: the same numbers, to the last bit."""
        models = [copy.deepcopy(model).cpu() for model in (self.model, self.other)]
        buffer = io.BytesIO()
        torch.save((*models, [(x.cpu(), y.cpu()) for x, y in self.batches]), buffer)
        return buffer.getvalue()

    @classmethod
    def unpacked(cls, packed: bytes, device: torch.device | str) -> "Problem":
        """The problem that was packed, on a device; its loss is a cross-entropy."""
        # The bytes come from `packed`, and hold classes.
        model, other, batches = torch.load(io.BytesIO(packed), weights_only=False)
        return cls(model.to(device), other.to(device), [(x.to(device), y.to(device)) for x, y in batches])

    def to(self, dtype: torch.dtype) -> "Problem":
        """The same problem in another floating-point type."""
        return Problem(
            copy.deepcopy(self.model).to(dtype),
            copy.deepcopy(self.other).to(dtype),
            [(x.to(dtype) if x.is_floating_point() else x, y) for x, y in self.batches],
            self.loss,
        )

    def channels_last(self) -> "Problem":
        """The same problem with weights and images in the layout that processors convolve faster."""
        layout: Any = {"memory_format": torch.channels_last}
        return Problem(
            copy.deepcopy(self.model).to(**layout),
            copy.deepcopy(self.other).to(**layout),
            [(x.contiguous(**layout) if x.ndim == 4 else x, y) for x, y in self.batches],
            self.loss,
        )


class _Flat(nn.Module):
    """A network with outputs (batch, tokens, classes), as one with outputs (examples, classes)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).flatten(0, 1)


def network_named(name: str, *, width: int = 16, classes: int = 10) -> nn.Module:
    """`"resnet18"` of torchvision, else `"resnet20"`, `"resnet56"`, … for small images, with projections."""
    if name == "resnet18":
        import torchvision  # Here alone, so that other networks can be measured without it.

        return torchvision.models.resnet18(num_classes=classes)
    return resnet(int(name.removeprefix("resnet")), width=width, num_classes=classes, shortcut="projection")


def image_problem(
    network: str = "resnet20",
    batch: int = 128,
    *,
    batches: int = 1,
    width: int = 16,
    pixels: int = 32,
    device: torch.device | str = "cpu",
    away_from_kinks: bool = False,
) -> Problem:
    """A residual network with batch normalisation, on random images with random labels.

    The running statistics are those of the images, so that activations have the sizes they have in a trained network.

    Args:
        network: A name that `network_named` knows.
        batch: Examples in a batch.
        batches: Number of batches.
        width: Channels of the first stage.
        pixels: Height and width of the images.
        device: The device of networks and data.
        away_from_kinks: Draw twice as many images, and take those whose derivatives rounding disturbs least.
    """
    torch.manual_seed(0)
    models = [network_named(network, width=width).to(device) for _ in range(2)]
    drawn = 2 * batch if away_from_kinks else batch
    images = [torch.randn(drawn, 3, pixels, pixels).to(device) for _ in range(batches)]
    for model in models:
        with torch.no_grad():
            update_bn(images[:1], model)
        model.eval()
    if away_from_kinks:
        images = [x[far_from_kinks(models[0], x, batch)] for x in images]
    return Problem(models[0], models[1], [(x, torch.randint(10, (batch,)).to(device)) for x in images])


def language_problem(
    *,
    layers: int,
    width: int,
    heads: int,
    vocabulary: int,
    tokens: int,
    batch: int,
    device: torch.device | str = "cpu",
) -> Problem:
    """A GPT-2 on one batch of random tokens, (batch, tokens), with the loss of the next token."""
    torch.manual_seed(0)
    sizes = {"layers": layers, "width": width, "heads": heads, "vocabulary": vocabulary, "positions": tokens}
    models = [GPT2(**sizes).to(device).eval() for _ in range(2)]
    drawn, following = random_tokens(batch, tokens, vocabulary)
    loss = BatchLoss(next_token_loss, size=lambda batch: batch[1].numel())
    return Problem(models[0], models[1], [(drawn.to(device), following.to(device))], loss)


def mlp_problem(width: int, examples: int, *, inputs: int = 10, device: torch.device | str = "cpu") -> Problem:
    """A perceptron with two hidden layers and tanh, of width² + (inputs + 12) · width + 10 parameters."""
    torch.manual_seed(0)
    models = [
        nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)).to(
            device
        )
        for _ in range(2)
    ]
    x, y = torch.randn(examples, inputs, device=device), torch.randint(10, (examples,), device=device)
    return Problem(models[0], models[1], [(x, y)])


def digits_problem(examples: int, *, width: int, epochs: int, device: torch.device | str = "cpu") -> Problem:
    """A small residual network, trained on scikit-learn's digits, and some of its training examples in one batch.

    Of twice as many examples these are the ones whose derivatives rounding disturbs least.
    """
    torch.manual_seed(0)
    model, other = (digits_resnet(width=width, shortcut="projection").to(device) for _ in range(2))
    data = load_digits("train").to(device)
    for network in (model, other):
        _train(network, data, epochs)
    model.eval()
    other.eval()
    drawn = min(2 * examples, len(data))
    x, y = next(iter(data.subset(drawn).batches(drawn)))
    chosen = far_from_kinks(model, x, examples)
    return Problem(model, other, [(x[chosen], y[chosen])])


def _train(model: nn.Module, data: Any, epochs: int) -> None:
    """Plain stochastic gradient descent with momentum."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        order = torch.randperm(len(data), generator=generator)
        for x, y in data.batches(64, order=order):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
