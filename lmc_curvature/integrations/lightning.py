"""A callback of Lightning's Trainer."""

import copy
from typing import Any

import torch
from torch import nn

from lmc_curvature.errors import OptionError
from lmc_curvature.integrations.recorder import Recorder
from lmc_curvature.objective.wrappers import unwrap

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise OptionError(
        f"LightningCallback needs the package lightning ({error}): pip install lmc-curvature[lightning]."
    ) from error


class LightningCallback(Recorder, Callback):
    """Record barriers and eigenvalues of a network while Lightning trains it, to the trainer's loggers.

    Numbers go to every logger of the trainer, beside the number of steps, and into `trainer.callback_metrics`, where
    other callbacks find them. Arguments and errors are those of `Recorder`.

    By default the network is the whole LightningModule, whose `forward` gives the outputs; `network="model"` looks at
    a module of it, and `loss_fn=BatchLoss(lambda module, batch: …)` computes a loss in another way. A LightningModule
    without `forward` needs one of the two.

    Example:
        `Trainer(max_epochs=10, callbacks=[LightningCallback(loader, every_n_epochs=1)]).fit(module, loader)`
    """

    _without_forward = (*Recorder._without_forward, LightningModule.forward)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take or read the reference."""
        if trainer.is_global_zero:
            self.begin(pl_module, trainer.global_step, training_data=trainer.train_dataloader)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record after a step."""
        if trainer.is_global_zero:
            _log(trainer, self.after_step(pl_module, trainer.global_step))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record after an epoch."""
        if trainer.is_global_zero:
            _log(trainer, self.after_epoch(pl_module, trainer.global_step, trainer.current_epoch + 1))

    def _copy(self, network: nn.Module) -> nn.Module:
        network = unwrap(network)
        # A module refers to its trainer, which holds data and optimisers.
        owners = [vars(module).get(name) for module in network.modules() for name in ("_trainer", "_fabric")]
        return copy.deepcopy(network, {id(owner): None for owner in owners if owner is not None})


def _log(trainer: Trainer, numbers: dict[str, float]) -> None:
    # Not by `log_dict`, which leaves out what is not at its own interval.
    if numbers:
        trainer.callback_metrics.update({name: torch.tensor(number) for name, number in numbers.items()})
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)
