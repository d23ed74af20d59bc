"""Losses of a batch: their forms, and the checks that they are real, finite, differentiable means."""

import copy
import functools
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from lmc_curvature.errors import LossError, NonFiniteError, counted
from lmc_curvature.objective.batches import (
    Batch,
    check_first_axes,
    check_size,
    count_examples,
    describe,
    first_rows,
    map_tensors,
    tensors_in,
    to_device,
)
from lmc_curvature.objective.classification import ClassLoss, check_weights, torch_function
from lmc_curvature.objective.explanations import batch_loss_error, loss_error, network_error, translate_errors
from lmc_curvature.objective.forms import check_lengths_of_lists, lengths_of_lists
from lmc_curvature.objective.sight import FEW, Sight, Sights, see


@dataclass(frozen=True)
class BatchLoss:
    """A loss computed from a network and a whole batch, for batches that are not `(x, y)` pairs.

    Attributes:
        fn: `fn(model, batch)` returns the mean loss over the batch's examples, a scalar tensor.
        size: `size(batch)` is what `fn` divides by in that mean, and what the batch counts for in the mean over the
            data: a whole number of examples (or tokens, …), or any positive real number (the sum of their weights).
            Batches of size 0 are left out. By default what torch's `cross_entropy` or `nll_loss` divides by, if `fn`
            returns its mean over one of the batch's tensors, else the leading dimension of its tensors; batches whose
            tensors have different ones are refused.

    Example:
        `BatchLoss(lambda model, batch: model(**batch).loss)` for a Hugging Face model and its dict batches.
    """

    fn: Callable[[Any, Any], Tensor]
    size: Callable[[Any], float] | None = None


LossFunction = Callable[[Any, Any], Tensor] | BatchLoss
"""`loss_fn(output, target)` returning the scalar mean over a batch, or a `BatchLoss`.

A module is used in evaluation mode, in a copy: label smoothing or the like that it has in training alone is off. The
`fn` of a `BatchLoss` is used as it is.

A batch weighs by what its loss is a mean over, so that the mean over the data does not depend on how they are cut into
batches: by its number of examples, by the `size` of a `BatchLoss`, and for torch's `cross_entropy` and `nll_loss`, as
functions, partial functions or modules, by the positions that count (`ignore_index`) and their classes' `weight`. So it
is for functions that return what one of these makes of their target, in whatever shape.
"""


class NetworkLoss(nn.Module):
    """A network and its loss as one module, so that one functional call evaluates both at a state.

    Attributes:
        class_loss: The loss, if it is cross-entropy or its like.
        classes: The number of classes, once a batch has been evaluated that tells it.
        sights: What is seen within any other loss, once batches are counted.
        is_cut: Whether it was warned of that the value depends on how the data are cut into batches.
    """

    def __init__(self, network: nn.Module, loss_fn: LossFunction):
        super().__init__()
        self.network = network
        self.loss_fn = loss_fn
        self.class_loss = ClassLoss.of(loss_fn)
        self.classes: int | None = None
        self.sights = Sights()
        self._lists: Mapping[tuple[Any, ...], int] | None = None
        self.is_cut = False

    def forward(self, data: Any, index: int = 0) -> tuple[Any, Any, Any]:
        """Loss, network output and target of a batch's data; the last two are None for a `BatchLoss`."""
        # Inputs are copied: a network may write into them, and others are evaluated on them after it.
        if isinstance(self.loss_fn, BatchLoss):
            data = map_tensors(torch.clone, data)
            with translate_errors(lambda error: batch_loss_error(error, data, index)), self.sights.watch(data):
                loss, output, target = self.loss_fn.fn(self.network, data), None, None
        else:
            inputs, target = map_tensors(torch.clone, data[0]), data[1]
            with translate_errors(lambda error: network_error(error, inputs, index)):
                output = self.network(inputs)
            if self.class_loss is not None and self.classes is None:
                self.classes = self.class_loss.check(output, target, index)
            check_shapes(self.loss_fn, output, target, index)
            of_classes = self.class_loss is not None
            with translate_errors(lambda error: loss_error(error, output, target, index, of_classes=of_classes)):
                loss = self.of_output(output, target)
        check_loss(loss)
        return loss, output, target

    def of_output(self, output: Any, target: Any) -> Any:
        """What a loss of a network's output returns; it may write into its own copy of the target."""
        loss_fn: Any = self.loss_fn
        own = map_tensors(torch.clone, target)
        with self.sights.watch(own):
            return loss_fn(output, own)

    def at(self, state: Mapping[str, Tensor], data: Any, index: int = 0) -> tuple[Any, Any, Any]:
        """Loss, network output and target of a batch's data, where the network's entries are those of a state.

        Args:
            state: Entries of the network.
            data: Data of the batch.
            index: Place of the batch in the loader, for errors.

        Raises:
            LossError: The loss is not a real scalar, a target is none of the classes, or the loss raised an error.
            LoaderError: The network raised an error.
            UnsupportedModelError: The network raised an error that has to do with no data.
        """
        return functional_call(self, {f"network.{name}": tensor for name, tensor in state.items()}, (data, index))

    @property
    def sight(self) -> Sight | None:
        """What is seen within a loss that is a function in the first batch, once it is counted."""
        return self.sights.first

    def _targets_in(self, data: Any) -> Any:
        return data if isinstance(self.loss_fn, BatchLoss) else data[1]

    def sight_of(self, state: Mapping[str, Tensor], data: Any, examples: int) -> Sight:
        """What is seen within the loss of so many examples, whose data are on the state's device.

        Raises:
            LossError: It calls cross-entropy with class weights by whose sum nothing can be divided.
        """
        # Copies: what is looked for may write into them.
        data, state = map_tensors(torch.clone, data), {name: t.detach().clone() for name, t in state.items()}
        return see(lambda: self.at(state, data), self._targets_in(data), examples)

    def count(
        self, data: Any, index: int, *, state: Mapping[str, Tensor] | None = None, place: Any = None
    ) -> tuple[int, float]:
        """Number of examples of a batch, and its weight in means over the data.

        Args:
            data: Data of the batch, as the loader yields them.
            index: Its place in the loader, for errors.
            state: Entries of the network, for a look into the loss; None for no look.
            place: Brings a tensor to their device.

        Raises:
            LoaderError: It cannot be counted, or may count for other things than examples.
            LossError: A target is none of the classes.
        """
        of_batch = isinstance(self.loss_fn, BatchLoss)
        if isinstance(self.loss_fn, BatchLoss) and self.loss_fn.size is not None:
            return _sizes(self.loss_fn.size(data), data, index)
        examples = count_examples(data, index, any_form=of_batch)
        targets = self._targets_in(data)
        if state is not None and self.class_loss is None:

            def look() -> Sight:
                few, number = first_rows(data, examples, FEW)
                return self.sight_of(state, map_tensors(place, few), number)

            self.sights.look(look, targets, index)
        sight = self.sights.of(targets)
        if sight.class_loss is not None:
            return examples, _weight(sight.class_loss, sight.labels_in(targets), sight.classes, index)
        if of_batch:
            check_first_axes(data, index)
        self._lists = lengths_of_lists(data) if self._lists is None else self._lists
        check_lengths_of_lists(data, self._lists, index)
        if self.class_loss is None or not isinstance(data[1], Tensor):
            return examples, float(examples)
        return examples, _weight(self.class_loss, data[1], self.classes, index)


def _weight(class_loss: ClassLoss, target: Tensor, classes: int | None, index: int) -> float:
    if not target.is_floating_point():
        # A device is asked once.
        target = target.cpu()
        # Here, because a label out of range ends the process's use of a CUDA device.
        if classes is not None:
            class_loss.check_labels(target, classes, index)
        if class_loss.weights is not None:
            class_loss.check_labels(target, len(class_loss.weights), index, of="the loss's weights")
    return class_loss.weight_of(target)


def _sizes(size: Any, data: Any, index: int) -> tuple[int, float]:
    """Number of examples and weight of a batch, by what the function of a `BatchLoss` says of it."""
    weight = check_size(size, index)
    value = size.item() if isinstance(size, Tensor) else size
    leading = next((len(tensor) for tensor in tensors_in(data) if tensor.ndim), 0)
    # A whole number counts examples; a real one is a sum of their weights.
    whole = isinstance(value, numbers.Integral)
    return math.ceil(weight) if whole or not leading else leading, weight


def own_loss(loss_fn: LossFunction | None, device: torch.device, dtype: torch.dtype) -> LossFunction:
    """The loss to use, for a device and type: cross-entropy by default, a copy of one that holds tensors."""
    if isinstance(loss_fn, nn.Module):
        # A loss may carry tensors of its own (class weights); the caller's copy stays as it is.
        try:
            loss_fn = copy.deepcopy(loss_fn).to(device=device, dtype=dtype)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise LossError(f"loss_fn={type(loss_fn).__name__} cannot be copied ({error}).") from error
        loss_fn.eval()
    if isinstance(loss_fn, functools.partial):
        bound = map_tensors(lambda tensor: to_device(tensor, device, dtype), loss_fn.keywords)
        return functools.partial(loss_fn.func, *loss_fn.args, **bound)
    return F.cross_entropy if loss_fn is None else loss_fn


def check_reduction(loss_fn: Any) -> None:
    """Refuse what is no function, and a torch loss that does not take the mean over the batch.

    Raises:
        LossError: It cannot be called, it sums over the batch, or does not reduce; or its class weights cannot be.
    """
    if loss_fn is None:
        return
    if isinstance(loss_fn, BatchLoss):
        _check_batch_loss(loss_fn)
        return
    if isinstance(loss_fn, type) or not callable(loss_fn):
        raise LossError(
            f"loss_fn={loss_fn!r} is not a function of output and target: pass an instance such as "
            "torch.nn.CrossEntropyLoss(), a function, or a BatchLoss."
        )
    check_weights(loss_fn)
    # functools.partial keeps what it binds in .keywords.
    options = getattr(loss_fn, "keywords", {})
    # What a module with a forward of its own makes of the option is its own business.
    if getattr(getattr(type(loss_fn), "forward", None), "__module__", "").startswith("torch.nn."):
        options = vars(loss_fn)
    reduction = options.get("reduction", "mean")
    if reduction in ("sum", "none"):
        raise LossError(
            f"loss_fn={type(loss_fn).__name__}(reduction={reduction!r}): batches are weighted by their number of "
            "examples, so the loss must be their mean: use reduction='mean'."
        )


def _check_batch_loss(loss_fn: BatchLoss) -> None:
    if not callable(loss_fn.fn):
        raise LossError(f"BatchLoss(fn={loss_fn.fn!r}): expected a function of model and batch.")
    if loss_fn.size is not None and not callable(loss_fn.size):
        raise LossError(
            f"BatchLoss(size={loss_fn.size!r}): expected a function of the batch, such as size=lambda batch: "
            "len(batch[0]), or None to count the rows of its first tensor."
        )


def check_loss(loss: Any) -> None:
    """Refuse what is not a real scalar.

    Raises:
        LossError: It has another form; says which.
    """
    if not isinstance(loss, Tensor):
        raise LossError(f"The loss is {describe(loss)}; expected a scalar tensor, the mean over the batch.")
    if loss.ndim != 0:
        raise LossError(
            f"The loss has shape {tuple(loss.shape)}; expected a scalar, the mean over the batch (reduction='mean')."
        )
    if not loss.is_floating_point():
        raise LossError(f"The loss has type {loss.dtype}; expected a real floating-point scalar.")


_ELEMENTWISE = {F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss}


def check_shapes(loss_fn: Any, output: Any, target: Any, index: int) -> None:
    """Refuse outputs and targets of different shapes for a loss of their elements, which torch would broadcast.

    Raises:
        LossError: Names both shapes.
    """
    if torch_function(loss_fn)[0] not in _ELEMENTWISE or not (
        isinstance(output, Tensor) and isinstance(target, Tensor)
    ):
        return
    if output.shape != target.shape:
        raise LossError(
            f"Batch {index} has {describe(output)} with targets {describe(target)}: a loss of elements compares "
            "tensors of one shape. Reshape one of them, as with loss_fn=lambda output, target: "
            "F.mse_loss(output.squeeze(1), target)."
        )


def check_differentiable(loss: Float[Tensor, ""]) -> None:
    """Refuse a loss without a graph, although it was computed from entries that require gradients.

    Raises:
        LossError: No entry of the state has any part in it.
    """
    if not loss.requires_grad:
        raise LossError(
            "The loss does not depend on any entry of the network's state: the network or loss_fn cuts the graph "
            "(.detach(), .item(), torch.no_grad()); remove that, or predict with method='losses'."
        )


def finite_loss(loss: float | Float[Tensor, ""], batch: Batch, where: str = "") -> float:
    """The loss of a batch as a number.

    Raises:
        NonFiniteError: It is infinite or not a number; names the batch, and `where` on the segment.
    """
    value = loss.item() if isinstance(loss, Tensor) else loss
    if not math.isfinite(value):
        raise NonFiniteError(
            f"The loss is {value} at batch {batch.index} ({counted(batch.size, 'example')}){where}. "
            "Check the data of that batch and the scale of the networks' parameters."
        )
    return value
