"""Losses by name: those that most networks are trained with, or any importable one."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lmc_curvature.errors import ConfigurationError, suggest
from lmc_curvature.objective import BatchLoss, LossFunction
from lmc_curvature.sources.models import import_function


def _returned_loss(model: Any, batch: Any) -> Tensor:
    return model(**batch).loss


def _predicted_tokens(batch: Any) -> int:
    # The first token of a text is predicted from nothing; -100 marks what is not to be predicted.
    return int((batch["labels"][..., 1:] != -100).sum())


OWN_LOSS = BatchLoss(_returned_loss)
"""The loss that a network returns for a batch of named tensors, as those of Hugging Face do."""

NEXT_TOKEN_LOSS = BatchLoss(_returned_loss, size=_predicted_tokens)
"""The same of a causal language model, a mean over the tokens that are predicted."""

_LOSSES: dict[str, LossFunction] = {
    "cross-entropy": F.cross_entropy,
    "mse": F.mse_loss,
    "bce": F.binary_cross_entropy_with_logits,
    "own": OWN_LOSS,
    "next-token": NEXT_TOKEN_LOSS,
}


def find_loss(spec: str) -> LossFunction:
    """Return a loss by its name.

    Args:
        spec: `"cross-entropy"`, `"mse"`, `"bce"` (binary cross-entropy of logits); `"own"` for the loss that the
            network returns for a batch of named tensors, `model(**batch).loss`, and `"next-token"` for that of a causal
            language model, a mean over tokens; or `package.module:name` for any importable function of output and
            target, a `BatchLoss`, or a class that is made without arguments, such as `torch.nn:HuberLoss`.

    Raises:
        ConfigurationError: The name is unknown, or the class needs arguments.
    """
    if ":" not in spec:
        if spec not in _LOSSES:
            raise ConfigurationError(
                f"loss {spec!r} is unknown: {suggest(spec, _LOSSES)} Losses from elsewhere are written "
                "'package.module:name'."
            )
        return _LOSSES[spec]
    loss = import_function(spec, what=f"loss {spec!r}", also=(BatchLoss,))
    if not isinstance(loss, type):
        return loss
    try:
        return loss()
    except TypeError as error:
        raise ConfigurationError(
            f"loss {spec!r} is a class that cannot be made without arguments ({error}); name a function or an object."
        ) from error
