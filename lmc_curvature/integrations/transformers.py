"""A callback of Hugging Face's Trainer."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from lmc_curvature.errors import OptionError
from lmc_curvature.integrations.recorder import Recorder
from lmc_curvature.objective import LossFunction
from lmc_curvature.sources.libraries import kind_of
from lmc_curvature.sources.losses import NEXT_TOKEN_LOSS, OWN_LOSS

try:
    from transformers.trainer import Trainer
    from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
    from transformers.training_args import TrainingArguments
except ImportError as error:
    raise OptionError(
        f"TransformersCallback needs the package transformers ({error}): pip install lmc-curvature[transformers]."
    ) from error


class TransformersCallback(Recorder, TrainerCallback):
    """Record barriers and eigenvalues of a network while Hugging Face's Trainer trains it, by `Trainer.log`.

    So they stand in `trainer.state.log_history`, and go to whatever the trainer reports to.

    Example:
        `trainer.add_callback(TransformersCallback(trainer, loader, every_n_steps=500))` for a trainer that was made.

    Args:
        trainer: The trainer that it is added to.
        loader: A DataLoader of one's own over batches on the CPU, best with `trainer.data_collator`; not one that the
            trainer makes, which shares the data out between processes.
        loss_fn: The loss, by default what the network itself returns, `model(**batch).loss`; that of a causal
            language model is a mean over tokens.
        **options: The other arguments of `Recorder`.
    """

    def __init__(self, trainer: Trainer, loader: Iterable[Any], *, loss_fn: LossFunction | None = None, **options: Any):
        is_causal = kind_of(type(trainer.model).__name__) == "CausalLM"
        own = NEXT_TOKEN_LOSS if is_causal else OWN_LOSS
        super().__init__(loader, loss_fn=own if loss_fn is None else loss_fn, **options)
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Take or read the reference."""
        if state.is_world_process_zero:
            self.begin(given["model"], state.global_step, training_data=given.get("train_dataloader"))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Record after a step."""
        if state.is_world_process_zero:
            self._log(self.after_step(given["model"], state.global_step))

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Record after an epoch."""
        if state.is_world_process_zero:
            self._log(self.after_epoch(given["model"], state.global_step, round(state.epoch or 0)))

    def _log(self, numbers: dict[str, float]) -> None:
        if numbers:
            self._trainer.log(numbers)

    def _copy(self, network: nn.Module) -> nn.Module:
        copied = super()._copy(network)
        # In mixed precision accelerate puts a forward of its own before the network's, which rounds.
        if vars(copied).pop("_original_forward", None) is not None:
            del copied.forward
        return copied
