"""What training continues from: a network, its optimiser, and the metrics of the epochs behind it."""

import dataclasses
import os

from torch import Tensor, nn
from torch.optim import Optimizer

from lmc_curvature.checkpoints import read_snapshot, write_snapshot
from lmc_curvature.errors import CheckpointError


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
        try:
            history = [EpochMetrics(int(epoch), *map(float, values)) for epoch, *values in metadata["history"]]
            return cls(int(metadata["epoch"]), model, optimizer, tuple(history))
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:
            raise CheckpointError(f"{path} does not tell how far the training has come, as a snapshot does.") from error


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
