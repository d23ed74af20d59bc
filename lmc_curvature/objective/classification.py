"""Cross-entropy and its like: which losses these are, what a batch's targets weigh in them, and which they refuse."""

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from lmc_curvature.errors import LossError
from lmc_curvature.objective.batches import describe
from lmc_curvature.objective.calls import LossCall

_FUNCTIONS: dict[Any, Callable[..., Tensor]] = {
    nn.CrossEntropyLoss.forward: F.cross_entropy,
    nn.NLLLoss.forward: F.nll_loss,
    nn.BCEWithLogitsLoss.forward: F.binary_cross_entropy_with_logits,
    nn.BCELoss.forward: F.binary_cross_entropy,
    nn.MSELoss.forward: F.mse_loss,
    nn.L1Loss.forward: F.l1_loss,
    nn.SmoothL1Loss.forward: F.smooth_l1_loss,
    nn.HuberLoss.forward: F.huber_loss,
}


# As segmentations mark what is of no class.
_IGNORED_LABEL = 255


def torch_function(loss_fn: Any) -> tuple[Any, Mapping[str, Any]]:
    """The function of torch that a loss calls, of a module as of a partial function, and the options it is given."""
    if isinstance(loss_fn, functools.partial):
        # What is bound by its place is no option.
        return None if loss_fn.args else loss_fn.func, loss_fn.keywords
    # What is done before and after `forward` may change targets, and the mean.
    is_plain = isinstance(loss_fn, nn.Module) and type(loss_fn).__call__ is nn.Module.__call__
    is_plain = is_plain and not (loss_fn._forward_pre_hooks or loss_fn._forward_hooks)
    function = _FUNCTIONS.get(getattr(type(loss_fn), "forward", None)) if is_plain else None
    return (loss_fn, {}) if function is None else (function, {**vars(loss_fn), **vars(loss_fn)["_buffers"]})


@dataclass(frozen=True, eq=False)
class ClassLoss:
    """A loss of torch between outputs (n, classes, …) and class indices (n, …), or class probabilities.

    Attributes:
        function: `F.cross_entropy` or `F.nll_loss`.
        weights: The weight of each class, in float64 on the CPU; None where all weigh the same.
        ignore_index: The label of positions that do not count.
    """

    function: Callable[..., Tensor]
    weights: Tensor | None
    ignore_index: int

    @classmethod
    def of(cls, loss_fn: Any) -> "ClassLoss | None":
        """A loss as one of these; None for any other."""
        function, options = torch_function(loss_fn)
        if {"size_average", "reduce"} & options.keys():
            return None
        return cls._of(function, options)

    @classmethod
    def of_call(cls, call: LossCall) -> "ClassLoss | None":
        """The mean over class indices that a call takes; None for any other call."""
        options = call.arguments
        reduced = options["reduction"] == "mean" and options["size_average"] is options["reduce"] is None
        if not reduced or call.target.is_floating_point():
            return None
        _check_options(call.function, options)
        return cls._of(call.function, options)

    @classmethod
    def _of(cls, function: Any, options: Mapping[str, Any]) -> "ClassLoss | None":
        if function not in (F.cross_entropy, F.nll_loss):
            return None
        weights = options.get("weight")
        weights = None if weights is None else weights.detach().double().cpu()
        return cls(function, weights, options.get("ignore_index", -100))

    def labels(self, target: Tensor) -> Int[Tensor, " counted"]:
        """The class indices of the positions that count."""
        # Of an unsigned type, a label may equal the index that is left out modulo 256, as 156 does −100.
        labels = target.long()
        return labels[labels != self.ignore_index]

    def weight_of(self, target: Tensor) -> float:
        """What torch divides by in the mean over targets: the sum of their classes' weights, without ignored ones.

        Class probabilities count by their number, whatever the classes weigh.
        """
        if target.is_floating_point():
            return float(target.numel() // target.shape[1]) if target.ndim > 1 else 1.0
        labels = self.labels(target)
        return float(labels.numel()) if self.weights is None else float(self.weights[labels.cpu()].sum())

    def weighs_as(self, other: "ClassLoss") -> bool:
        """Tell if another loss divides by the same, whatever the targets."""
        if self.weights is None or other.weights is None:
            same = self.weights is other.weights
        else:
            same = torch.equal(self.weights, other.weights)
        return same and self.ignore_index == other.ignore_index

    def check_labels(self, target: Tensor, classes: int, index: int, *, of: str = "the network's output") -> None:
        """Refuse class indices that are none of the classes of the network's output, or of something else.

        Raises:
            LossError: Names the label, its batch and the number of classes.
        """
        labels = self.labels(target)
        if not labels.numel():
            return
        least, most = (int(label) for label in labels.aminmax())
        if least < 0 or most >= classes:
            label = least if least < 0 else most
            remedy = f"Correct the targets (are they counted from 1?), or the length of {of}"
            if label < 0 or label == _IGNORED_LABEL:
                remedy += f"; what should not count is left out by loss_fn=nn.CrossEntropyLoss(ignore_index={label})"
            raise LossError(
                f"Batch {index} has the label {label}, which is none of the {classes} classes of {of} (0 to "
                f"{classes - 1}). {remedy}."
            )

    def check(self, output: Any, target: Any, index: int) -> int | None:
        """Refuse outputs and targets that are not of classes.

        Args:
            output: The network's output.
            target: The targets.
            index: Place of the batch in the loader.

        Returns:
            The number of classes; None where it cannot be told (torch will say why), or may change with the batch.

        Raises:
            LossError: The output has one column, a target is no class, or no probability.
        """
        if not isinstance(output, Tensor) or not isinstance(target, Tensor) or output.ndim == 0:
            return None
        if output.ndim == 1 and target.ndim == 0:
            return None
        classes = output.shape[1] if output.ndim > 1 else 1
        if classes == 1 and self.function is F.cross_entropy:
            raise LossError(
                f"Cross-entropy of one column is always 0: batch {index} has {describe(output)}, with targets "
                f"{describe(target)}. For real-valued targets pass loss_fn=F.mse_loss, for targets 0 and 1 "
                "loss_fn=F.binary_cross_entropy_with_logits."
            )
        if not target.is_floating_point():
            if target.shape != (output.shape[0], *output.shape[2:]):
                return None
            self.check_labels(target, classes, index)
            # As many classes as examples: the examples may be the classes, as in a contrastive loss.
            return classes if output.shape[0] != classes else None
        if target.shape == output.shape and not are_probabilities(target):
            fault = (
                f"Batch {index} has real-valued targets that are no class probabilities, of which cross-entropy is made"
            )
            remedy = "For regression pass loss_fn=F.mse_loss, for several labels F.binary_cross_entropy_with_logits."
            if bool((target < 0).any()):
                raise LossError(f"{fault}: some are negative. {remedy}")
            warnings.warn(f"{fault}: they do not sum to 1. {remedy}", stacklevel=2)
        return classes


def check_weights(loss_fn: Any) -> None:
    """Refuse class weights by whose sum a mean cannot be divided.

    Raises:
        LossError: Some are negative or not finite, so that their sum may vanish; or some are zero together with label
            smoothing, so that examples of such a class have a loss, and no part in what the mean divides by.
    """
    _check_options(*torch_function(loss_fn))


def _check_options(function: Any, options: Mapping[str, Any]) -> None:
    weights = options.get("weight")
    if function not in (F.cross_entropy, F.nll_loss) or not isinstance(weights, Tensor):
        return
    if not bool(((weights >= 0) & weights.isfinite()).all()):
        raise LossError(
            f"Class weights of {weights.tolist()}: the loss divides by the sum of the targets' weights, so they must "
            "be finite, and none negative."
        )
    if options.get("label_smoothing") and bool((weights == 0).any()):
        raise LossError(
            "Class weights of zero with label smoothing: examples of such a class have a loss, but no part in what the "
            "mean divides by, so that the mean over the data depends on how they are cut into batches. Use small "
            "weights instead, or no label smoothing."
        )


def are_probabilities(target: Tensor) -> bool:
    """Whether a tensor (n, classes, …) holds probabilities of classes, up to the rounding of half precision."""
    if not target.is_floating_point() or target.ndim < 2:
        return False
    sums = target.sum(dim=1)
    return bool((target >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), rtol=1e-2)
