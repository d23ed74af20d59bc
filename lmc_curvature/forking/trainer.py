"""One network in training: its data, its optimiser, and the step of SGD that is the same at every call.

A step reads its place in the epoch from a tensor and moves it on, and all else that it reads or writes stays where it
is in memory: the order and the augmentation of the epoch, the learning rates, the network, its momentum, and the
metrics, which are read once an epoch. So a CUDA device can record a step and replay it, and several networks can be
trained in turns.
"""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lmc_curvature.checkpoints import load_entries
from lmc_curvature.errors import NonFiniteError
from lmc_curvature.forking.configuration import TrainingConfig
from lmc_curvature.forking.graphs import Step, record_steps
from lmc_curvature.forking.numerics import fastest_layout, training_kernels
from lmc_curvature.forking.orders import epoch_generator
from lmc_curvature.forking.state import EpochMetrics, TrainingState, capture_state
from lmc_curvature.sources import ImageDataset
from lmc_curvature.sources.augmentation import Crops


class Trainer:
    """Trains a network, an epoch at a time, from any state of its schedule.

    On a CUDA device a step is recorded as a CUDA graph and replayed on a stream of the trainer's own, one graph for a
    whole batch and one for a short one at the end of an epoch. A network is recorded as it is: what its modules do in
    Python, such as counting their calls, happens only then. A step that waits for the device, draws random numbers, or
    does something else when it is replayed, is taken operation by operation, and a warning says why.

    Args:
        model: The network, on the device to train on; changed in place, and in training mode from here on.
        data: The training examples.
        config: The schedule.
        cuda_graph: Record steps, on a CUDA device.

    Attributes:
        epoch: Epochs of the schedule behind it.
        history: Their metrics.
    """

    def __init__(self, model: nn.Module, data: ImageDataset, config: TrainingConfig, *, cuda_graph: bool = True):
        device = next(model.parameters()).device
        self.epoch = 0
        self.history: tuple[EpochMetrics, ...] = ()
        self._model, self._data, self._config = model.train(), data.to(device), config
        self._layout = fastest_layout(model, config.precision)
        model.to(memory_format=self._layout)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with self._own_stream():
            steps = -(-len(data) // config.batch_size)
            # Until an epoch begins, any order and augmentation.
            self._order = torch.arange(len(data), device=device)
            drawn = Crops.draw(len(data), torch.Generator()).to(device)
            self._crops = drawn if config.augmentation == "crop-flip" else None
            self._rates, self._losses = torch.zeros(2, steps, device=device)
            self._place = torch.zeros(1, dtype=torch.int64, device=device)
            self._correct = torch.zeros((), dtype=torch.int64, device=device)
            self._optimizer = torch.optim.SGD(
                model.parameters(),
                torch.tensor(config.learning_rate, device=device),
                config.momentum,
                weight_decay=config.weight_decay,
                # Of torch's forms, this one alone reads a learning rate on a GPU without waiting for it.
                fused=True if device.type == "cuda" else None,
            )
            self._rate = self._optimizer.param_groups[0]["lr"]
            self._random_states: list[Tensor] = []
            self._sizes = [min(config.batch_size, len(data) - step * config.batch_size) for step in range(steps)]
            self._replays: dict[int, Step] = {}
            if cuda_graph and self._stream is not None:
                self._record(self._stream)

    @property
    def replays(self) -> bool:
        """Whether steps are replayed."""
        return bool(self._replays)

    def load(self, state: TrainingState) -> None:
        """Continue from a state.

        Raises:
            CheckpointError: It does not fit the network.
        """
        with self._own_stream():
            load_entries(self._model, state.model, source=f"The state at epoch {state.epoch}")
            for name, parameter in self._model.named_parameters():
                slot = self._optimizer.state[parameter]
                if name not in state.optimizer:
                    self._forget_momentum(slot)
                    continue
                if "momentum_buffer" not in slot:
                    slot["momentum_buffer"] = torch.empty_like(parameter, requires_grad=False)
                # A tensor from a file need not be aligned as torch aligns its own, which can change the last bits.
                slot["momentum_buffer"].copy_(state.optimizer[name])
        self.epoch, self.history = state.epoch, state.history

    def state(self) -> TrainingState:
        """Copy what later training continues from."""
        with self._own_stream():
            optimizer = self._optimizer if self.epoch else None
            return capture_state(self._model, optimizer, epoch=self.epoch, history=self.history)

    def steps(self, order_seed: int) -> Iterator[None]:
        """Train an epoch, which is over when the iterator is: it yields after each step.

        On a GPU a step has only been asked for then, so that another trainer's may be, too.

        Args:
            order_seed: Decides, with the epoch, the order of the examples and their augmentation. Not negative.

        Raises:
            NonFiniteError: The loss or an entry of the network became infinite or not a number.
            OptionError: The seed is negative.
        """
        rate = self._begin(epoch_generator(order_seed, self.epoch))
        try:
            for size in self._sizes:
                with torch.cuda.stream(self._stream):
                    if self.replays:
                        self._replays[size]()
                    else:
                        self._run_eagerly(size)
                yield
        finally:
            # Also of an epoch that is not gone on with: its steps write to memory that may soon be another's.
            if self._stream is not None:
                self._stream.synchronize()
        with self._own_stream():
            losses, entries = self._losses.double().cpu(), self._model.state_dict()
            finite = torch.stack([tensor.isfinite().all() for tensor in entries.values()]).tolist()
            strange = [name for name, is_finite in zip(entries, finite, strict=True) if not is_finite]
            _check_finite(losses, strange, self.epoch)
            count = len(self._order)
            metrics = EpochMetrics(self.epoch + 1, rate, losses.sum().item() / count, self._correct.item() / count)
        self.epoch, self.history = self.epoch + 1, (*self.history, metrics)

    def _begin(self, generator: torch.Generator) -> float:
        """Draw the order and the augmentation of an epoch; return the learning rate of its last step."""
        count, steps, config = len(self._order), len(self._sizes), self._config
        order = torch.randperm(count, generator=generator)
        rates = [learning_rate_at(config, self.epoch, fraction=(step + 1) / steps) for step in range(steps)]
        self._model.train()
        with self._own_stream():
            self._order.copy_(order)
            if self._crops is not None:
                drawn = Crops.draw(count, generator)
                self._crops.rows.copy_(drawn.rows)
                self._crops.columns.copy_(drawn.columns)
                self._crops.mirrored.copy_(drawn.mirrored)
            self._rates.copy_(torch.tensor(rates))
            self._place.zero_()
            self._correct.zero_()
        with self._random_numbers_restored():
            torch.manual_seed(generator.initial_seed())
            self._random_states = self._global_random_states()
        return rates[-1]

    def _step(self, size: int) -> None:
        """A step of SGD on the next `size` examples of the epoch."""
        device = self._order.device
        chosen = self._place * self._config.batch_size + torch.arange(size, device=device)
        drawn = self._crops
        crops = drawn and Crops(drawn.rows[chosen], drawn.columns[chosen], drawn.mirrored[chosen])
        x, y = next(iter(self._data.batches(size, order=self._order[chosen], crops=crops)))
        self._rate.copy_(self._rates.index_select(0, self._place).squeeze(0))
        self._optimizer.zero_grad()
        # What is kept of a cast parameter would outlive the recording of a step.
        with torch.autocast(
            device.type, torch.bfloat16, enabled=self._config.precision == "bfloat16", cache_enabled=False
        ):
            logits = self._model(x.contiguous(memory_format=self._layout))
            loss = functional.cross_entropy(logits, y)
        loss.backward()
        self._optimizer.step()
        self._losses.index_copy_(0, self._place, loss.detach().float().view(1) * size)
        self._correct += (logits.argmax(dim=1) == y).sum()
        self._place += 1

    def _run_eagerly(self, size: int) -> None:
        with self._random_numbers_restored(), training_kernels(self._order.device, self._config.precision):
            cpu, *others = self._random_states
            torch.set_rng_state(cpu)
            for state in others:
                torch.cuda.set_rng_state(state, self._order.device)
            self._step(size)
            self._random_states = self._global_random_states()

    def _record(self, stream: torch.cuda.Stream) -> None:
        """Let steps be replays; those that are taken for it leave no trace."""
        kept = [*self._model.parameters(), *self._model.buffers()]
        before = [tensor.detach().clone() for tensor in kept]
        self._rates.fill_(self._config.learning_rate)

        @torch.no_grad()
        def rewind() -> None:
            for tensor, value in zip(kept, before, strict=True):
                tensor.copy_(value)
            for slot in self._optimizer.state.values():
                slot["momentum_buffer"].zero_()
            self._place.zero_()

        @torch.no_grad()
        def outcome() -> Float[Tensor, "2"]:
            pairs = [pair for pair in zip(kept, before, strict=True) if pair[0].is_floating_point()]
            moved = torch.stack([(tensor - value).double().abs().sum() for tensor, value in pairs])
            return torch.stack([self._losses[0].double(), moved.sum()])

        steps = {size: partial(self._step, size) for size in self._sizes}
        with training_kernels(self._order.device, self._config.precision), self._random_numbers_restored():
            replays = record_steps(self._model, steps, stream, rewind=rewind, outcome=outcome)
        rewind()
        self._optimizer.zero_grad()
        if isinstance(replays, str):
            self._optimizer.state.clear()
            warnings.warn(f"Training takes longer, because a step cannot be replayed: {replays}.", stacklevel=4)
        else:
            self._replays = replays

    def _forget_momentum(self, slot: dict[str, Any]) -> None:
        if not self.replays:
            # The first step makes it.
            slot.clear()
        elif "momentum_buffer" in slot:
            # Recorded steps know it by its address.
            slot["momentum_buffer"].zero_()

    @contextlib.contextmanager
    def _own_stream(self) -> Iterator[None]:
        """Within the block, a CUDA device works on the trainer's stream, after what it has been asked for before."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def _random_numbers_restored(self) -> AbstractContextManager[None]:
        device = self._order.device
        return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])

    def _global_random_states(self) -> list[Tensor]:
        device = self._order.device
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def learning_rate_at(config: TrainingConfig, epoch: int, *, fraction: float = 1.0) -> float:
    """Return the learning rate in an epoch, counted from 0, when `fraction` of its steps are done."""
    passed = sum(epoch >= milestone for milestone in config.milestones)
    warmup = min(1.0, (epoch + fraction) / config.warmup_epochs) if config.warmup_epochs else 1.0
    return config.learning_rate * config.gamma**passed * warmup


def _check_finite(losses: Tensor, strange: Sequence[str], epoch: int) -> None:
    steps = (~losses.isfinite()).nonzero().flatten().tolist()
    if steps:
        problem = f"the loss is {losses[steps[0]].item()} in epoch {epoch + 1}, step {steps[0] + 1} of {len(losses)}"
    elif strange:
        problem = f"{strange[0]!r} is not finite after epoch {epoch + 1}, step {len(losses)}"
    else:
        return
    raise NonFiniteError(f"Training diverged: {problem}. Lower the learning rate or add warm-up epochs.")
