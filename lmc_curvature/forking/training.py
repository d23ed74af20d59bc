"""Training by stochastic gradient descent that can be stopped, continued and repeated bit for bit.

The order of the examples in an epoch, and their augmentation, are functions of the order seed and the epoch alone, so a
run that continues from a stored state takes the same steps as one that was never stopped. Bits are those of one machine
with one number of threads; on a CUDA device they also need a network whose operations have deterministic kernels.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from tqdm.auto import tqdm

from lmc_curvature.checkpoints import load_entries, read_snapshot, write_snapshot
from lmc_curvature.errors import NonFiniteError, OptionError
from lmc_curvature.forking.configuration import TrainingConfig
from lmc_curvature.forking.orders import epoch_generator
from lmc_curvature.sources import ImageDataset
from lmc_curvature.sources.augmentation import Crops


@dataclasses.dataclass(frozen=True)
class EpochMetrics:
    """The metrics of one epoch of training.

    Attributes:
        epoch: Epochs completed, counting this one.
        learning_rate: The learning rate at the last step.
        loss: Mean cross-entropy in nats over the examples, each at the step that used it.
        accuracy: Fraction classified correctly, likewise.
    """

    epoch: int
    learning_rate: float
    loss: float
    accuracy: float


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingState:
    """All that training needs to continue: the network, the optimiser, and how far it has come.

    Attributes:
        epoch: Epochs completed; 0 at initialisation.
        model: The network's state dict, on the CPU.
        optimizer: Parameter name to momentum buffer, on the CPU; empty before the first step or without
            momentum.
        history: The metrics of every epoch so far, including those of a parent.
    """

    epoch: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    history: tuple[EpochMetrics, ...] = ()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state as one safetensors file, whole or not at all."""
        history = [dataclasses.astuple(metrics) for metrics in self.history]
        write_snapshot(path, self.model, self.optimizer, {"epoch": self.epoch, "history": history})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TrainingState":
        """Read a state that `save` wrote.

        Raises:
            CheckpointError: The file is missing, damaged, not a snapshot, or from a newer version.
        """
        model, optimizer, metadata = read_snapshot(path)
        history = tuple(EpochMetrics(*values) for values in metadata["history"])
        return cls(metadata["epoch"], model, optimizer, history)


def train(
    model: nn.Module,
    data: ImageDataset,
    config: TrainingConfig,
    *,
    order_seed: int,
    start: TrainingState | None = None,
    until: int | None = None,
    on_epoch: Callable[[EpochMetrics], None] | None = None,
    progress: bool | None = None,
) -> TrainingState:
    """Train a classifier with SGD and the cross-entropy loss.

    Args:
        model: The network, on the device to train on; changed in place.
        data: The training examples.
        config: The schedule.
        order_seed: Decides the order of the examples and their augmentation, and nothing else does. Not negative.
        start: Where to continue; by default from the network as it is, at epoch 0 of the schedule.
        until: The epoch of the schedule to stop at; by default its end.
        on_epoch: Called with the metrics of each epoch as it ends.
        progress: Show a bar of epochs; by default on a terminal and in notebooks.

    Returns:
        The state at epoch `until`.

    Raises:
        NonFiniteError: The loss or an entry of the network became infinite or not a number.
        CheckpointError: `start` does not fit the network.
        OptionError: `until` lies before the start or beyond the schedule, or the seed is negative.
    """
    first = 0 if start is None else start.epoch
    last = config.epochs if until is None else until
    if not first <= last <= config.epochs:
        raise OptionError(f"until={last} must lie between the epoch of the start, {first}, and {config.epochs}.")
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
    )
    model.to(memory_format=_fastest_layout(model))
    if start is not None:
        _restore(model, optimizer, start)
    history = list(() if start is None else start.history)
    data = data.to(next(model.parameters()).device)
    was_training = model.training
    off = None if progress is None else not progress
    with tqdm(total=last - first, desc="training", unit="epoch", disable=off) as bar:
        for epoch in range(first, last):
            metrics = _train_epoch(model.train(), optimizer, data, config, epoch_generator(order_seed, epoch), epoch)
            history.append(metrics)
            bar.update()
            bar.set_postfix(loss=f"{metrics.loss:.3g}", accuracy=f"{metrics.accuracy:.1%}")
            if on_epoch is not None:
                on_epoch(metrics)
    model.train(was_training).to(memory_format=torch.contiguous_format)
    return capture_state(model, optimizer, epoch=last, history=tuple(history))


@torch.no_grad()
def evaluate(model: nn.Module, data: ImageDataset, *, batch_size: int = 512) -> tuple[float, float]:
    """Return the mean cross-entropy in nats and the accuracy of a network in evaluation mode."""
    data = data.to(next(model.parameters()).device)
    was_training = model.training
    model.eval()
    loss, correct = 0.0, 0
    for x, y in data.batches(batch_size):
        logits = model(x)
        loss += functional.cross_entropy(logits, y, reduction="sum").item()
        correct += int((logits.argmax(dim=1) == y).sum())
    model.train(was_training)
    return loss / len(data), correct / len(data)


def learning_rate_at(config: TrainingConfig, epoch: int, *, fraction: float = 1.0) -> float:
    """Return the learning rate in an epoch, counted from 0, when `fraction` of its steps are done."""
    passed = sum(epoch >= milestone for milestone in config.milestones)
    warmup = min(1.0, (epoch + fraction) / config.warmup_epochs) if config.warmup_epochs else 1.0
    return config.learning_rate * config.gamma**passed * warmup


def capture_state(
    model: nn.Module, optimizer: Optimizer | None = None, *, epoch: int = 0, history: tuple[EpochMetrics, ...] = ()
) -> TrainingState:
    """Copy a network and its optimiser, if any, into a state that later training does not change."""
    slots = {} if optimizer is None else optimizer.state
    found = {name: slots.get(parameter, {}).get("momentum_buffer") for name, parameter in model.named_parameters()}
    buffers = {name: _cpu_copy(buffer) for name, buffer in found.items() if buffer is not None}
    entries = {name: _cpu_copy(tensor) for name, tensor in model.state_dict().items()}
    return TrainingState(epoch, entries, buffers, history)


def _cpu_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _restore(model: nn.Module, optimizer: Optimizer, state: TrainingState) -> None:
    load_entries(model, state.model, source=f"The state at epoch {state.epoch}")
    for name, parameter in model.named_parameters():
        if name in state.optimizer:
            # A tensor from a file need not be aligned as torch aligns its own, which can change the last bits.
            buffer = torch.empty_like(parameter, requires_grad=False).copy_(state.optimizer[name])
            optimizer.state[parameter]["momentum_buffer"] = buffer


def _fastest_layout(model: nn.Module) -> torch.memory_format:
    """Channels-last, in which convolutions are up to twice as fast; contiguous where normalisation loses more by it.

    On several threads of a CPU, torch's backward pass of batch normalisation takes four times longer on channels-last
    images than on one.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    normalized = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    return torch.contiguous_format if on_cpu and normalized and torch.get_num_threads() > 1 else torch.channels_last


def _train_epoch(
    model: nn.Module,
    optimizer: Optimizer,
    data: ImageDataset,
    config: TrainingConfig,
    generator: torch.Generator,
    epoch: int,
) -> EpochMetrics:
    layout, device = _fastest_layout(model), data.images.device
    order = torch.randperm(len(data), generator=generator).to(device)
    crops = Crops.draw(len(data), generator).to(device) if config.augmentation == "crop-flip" else None
    loader = data.batches(config.batch_size, order=order, crops=crops)
    losses, correct = [], torch.zeros((), dtype=torch.int64, device=device)
    rate = 0.0
    with _reproducible(generator, device):
        for step, (x, y) in enumerate(loader):
            rate = learning_rate_at(config, epoch, fraction=(step + 1) / len(loader))
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            logits = model(x.contiguous(memory_format=layout))
            loss = functional.cross_entropy(logits, y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach() * len(y))
            correct += (logits.argmax(dim=1) == y).sum()
    totals = torch.stack(losses).double()
    _check_finite(totals, model, epoch)
    return EpochMetrics(epoch + 1, rate, totals.sum().item() / len(data), correct.item() / len(data))


def _check_finite(losses: Tensor, model: nn.Module, epoch: int) -> None:
    # Once an epoch, because reading the loss at every step would make a GPU wait for the CPU.
    steps = (~losses.isfinite()).nonzero().flatten().tolist()
    entries = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if steps:
        problem = f"the loss is {losses[steps[0]].item()} in epoch {epoch + 1}, step {steps[0] + 1} of {len(losses)}"
    elif entries:
        problem = f"{entries[0]!r} is not finite after epoch {epoch + 1}, step {len(losses)}"
    else:
        return
    raise NonFiniteError(f"Training diverged: {problem}. Lower the learning rate or add warm-up epochs.")


@contextlib.contextmanager
def _reproducible(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """Tie dropout to the epoch's generator and choose deterministic convolutions; put everything back after."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(generator.initial_seed())
        cudnn.deterministic, cudnn.benchmark = True, False
        try:
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark = before
