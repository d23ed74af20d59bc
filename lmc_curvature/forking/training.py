"""Training by stochastic gradient descent that can be stopped, continued and repeated bit for bit.

The order of the examples in an epoch, and their augmentation, are functions of the order seed and the epoch alone, so a
run that continues from a stored state takes the same steps as one that was never stopped. Bits are those of one machine
with one number of threads; on a CUDA device they also need a network whose operations have deterministic kernels.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional
from tqdm.auto import tqdm

from lmc_curvature.errors import OptionError
from lmc_curvature.forking.configuration import TrainingConfig
from lmc_curvature.forking.state import EpochMetrics, TrainingState, capture_state
from lmc_curvature.forking.trainer import Trainer, learning_rate_at
from lmc_curvature.sources import ImageDataset

__all__ = ["EpochMetrics", "TrainingState", "capture_state", "evaluate", "learning_rate_at", "train"]


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

    On a CUDA device a step is recorded once and replayed; see `Trainer`.

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
    was_training = model.training
    trainer = Trainer(model, data, config)
    if start is not None:
        trainer.load(start)
    off = None if progress is None else not progress
    with tqdm(total=last - first, desc="training", unit="epoch", disable=off) as bar:
        while trainer.epoch < last:
            for _ in trainer.steps(order_seed):
                pass
            metrics = trainer.history[-1]
            bar.update()
            bar.set_postfix(loss=f"{metrics.loss:.3g}", accuracy=f"{metrics.accuracy:.1%}")
            if on_epoch is not None:
                on_epoch(metrics)
    state = trainer.state()
    model.train(was_training).to(memory_format=torch.contiguous_format)
    return state


@torch.no_grad()
def evaluate(model: nn.Module, data: ImageDataset, *, batch_size: int = 512) -> tuple[float, float]:
    """Return the mean cross-entropy in nats and the accuracy of a network in evaluation mode."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    # Read once, because a GPU would wait for the CPU at every batch.
    loss = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    for x, y in data.to(device).batches(batch_size):
        logits = model(x)
        loss += functional.cross_entropy(logits, y, reduction="sum")
        correct += (logits.argmax(dim=1) == y).sum()
    model.train(was_training)
    return loss.item() / len(data), correct.item() / len(data)
