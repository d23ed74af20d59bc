"""The empirical risk of a network: a function of its state, averaged over the batches of a loader."""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.data import Dataset, IterableDataset
from tqdm.auto import tqdm

from lmc_curvature.averages import weighted_mean
from lmc_curvature.errors import (
    DirectionError,
    LoaderError,
    LossError,
    OptionError,
    UnsupportedModelError,
    check_choice,
    suggest,
)
from lmc_curvature.objective.batches import (
    Batch,
    check_count,
    count_leading,
    count_pair,
    describe,
    loader_length,
    map_tensors,
    refuse_iterator,
    to_device,
)
from lmc_curvature.objective.losses import (
    BatchLoss,
    LossFunction,
    check_differentiable,
    check_loss,
    check_reduction,
    finite_loss,
    own_loss,
)
from lmc_curvature.objective.memo import Memo
from lmc_curvature.objective.network import (
    State,
    as_leaves,
    check_finite,
    check_module,
    device_of,
    dtype_of,
    graph_nodes,
    movable_entries,
    parse_device,
    parse_dtype,
    skeleton_of,
    tied_names,
)
from lmc_curvature.objective.normalization import (
    POLICIES,
    BatchNormPolicy,
    NormalizationControl,
    Statistics,
    statistic_names,
)
from lmc_curvature.objective.numerics import channels_last, ignores_layout, prefers_channels_last
from lmc_curvature.objective.randomness import drawing_module, global_rng_preserved


class Objective:
    """The mean loss of a network over a data set, as a function of the network's state.

        L(θ) = (1/n) Σ_i loss(model_θ(x_i), y_i)

    The objective takes a snapshot of the network: what is done to the network afterwards does not change it, and
    nothing done here changes the network (its parameters, buffers, mode and gradients) or the global random number
    generators. Dropout is off. Batches weigh by their number of examples; sums over batches are kept in float64.

    Args:
        model: Any module. Its parameters need not require gradients.
        loader: Yields `(x, y)` batches, or what `loss_fn` expects. Visited once per evaluation.
        loss_fn: `loss_fn(output, target)` returning the scalar mean over the batch (default: cross-entropy), or a
            `BatchLoss`.
        batch_norm: `"interpolate"`, `"batch"` or `"recalibrate"`; see `BatchNormPolicy`. Derivatives
            under `"recalibrate"` are those of `"batch"`.
        max_batches: Use only this many batches of the loader.
        device: Where to compute; the model's device by default.
        dtype: Floating-point type to compute in; by default the one that holds all of the model's.
        allow_tf32: Let convolutions on a CUDA device round float32 to TF32's ten bits of mantissa: faster, with errors
            of about 1e-3. Matrix products follow `torch.backends.cuda.matmul`, where it is off unless switched on.

    Attributes:
        memo: `memo(key, make)` keeps what others make once for this objective; it knows nothing of what it keeps.

    Raises:
        OptionError: `batch_norm`, `max_batches`, `device`, `dtype` or `allow_tf32` has a bad value.
        LoaderError: `loader` cannot be iterated over, or is a data set of single examples.
        LossError: `loss_fn` is not a function, sums over the batch, or does not reduce.
        UnsupportedModelError: `model` is no network, has parameters that cannot move, or cannot be copied.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        loss_fn: LossFunction | None = None,
        batch_norm: BatchNormPolicy = "interpolate",
        max_batches: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        allow_tf32: bool = False,
    ):
        check_module("model", model)
        check_choice("batch_norm", batch_norm, POLICIES)
        if not isinstance(allow_tf32, bool):
            raise OptionError(f"allow_tf32={allow_tf32!r}: expected True or False.")
        if max_batches is not None and (not isinstance(max_batches, int) or max_batches < 1):
            raise OptionError(f"max_batches={max_batches!r}: expected a whole number, at least 1 (or None for all).")
        _check_iterable(loader)
        check_reduction(loss_fn)
        self._movable = movable_entries(model, batch_norm)
        self.loader = loader
        self.batch_norm: BatchNormPolicy = batch_norm
        self.max_batches = max_batches
        self.allow_tf32 = allow_tf32
        tensors = (*model.parameters(), *model.buffers())
        self.device = parse_device(device) if device is not None else device_of(tensors)
        self.dtype = parse_dtype(dtype) if dtype is not None else dtype_of(tensors)

        self.network = skeleton_of(model)
        self._control = NormalizationControl(self.network)
        self._control.statistics = "running" if batch_norm == "interpolate" else "batch"
        self._evaluation = _Evaluation(self.network, own_loss(loss_fn, self.device, self.dtype))
        self._loss_fn = loss_fn

        entries = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self._entries = {
            name: to_device(tensor.detach(), self.device, self.dtype).clone() for name, tensor in entries.items()
        }
        # Kept, because functional_call may leave another tensor in a module that the network holds twice.
        self._placeholders = dict(self.network.named_parameters())
        self._originals = [(weakref.ref(tensor), name) for name, tensor in model.named_parameters()]
        self._aliases = tied_names(model)
        self._checked = False
        self.memo = Memo()

    @property
    def rounding(self) -> float:
        """Relative rounding error of one operation as things are: that of TF32 or of autocast where they are on."""
        kind = self.device.type
        errors = [torch.finfo(self.dtype).eps]
        if kind == "cuda" and self.dtype == torch.float32 and self.allow_tf32:
            errors.append(2.0**-10)
        if torch.is_autocast_enabled(kind):
            errors.append(torch.finfo(torch.get_autocast_dtype(kind)).eps)
        return max(errors)

    def state(self) -> dict[str, Tensor]:
        """The network's state when the objective was made: entry name to tensor, what a segment may move."""
        return {name: self._entries[name] for name in self._movable}

    def complete(self, state: State) -> dict[str, Tensor]:
        """A placed state with every floating-point entry of the network: those left out are as in the network."""
        return {name: t for name, t in self._entries.items() if t.is_floating_point()} | self.place(state)

    def place(self, state: State) -> dict[str, Tensor]:
        """Bring a state or direction to the objective's device and floating-point type.

        What else a `state_dict()` holds is understood: further names of tied parameters, and the counters of
        normalisation modules, which are left out.

        Raises:
            DirectionError: An entry is unknown, has another shape, or is not of a real floating-point type.
        """
        state = {
            self._aliases.get(name, name): tensor
            for name, tensor in state.items()
            if name.rpartition(".")[2] != "num_batches_tracked"
        }
        for name, tensor in state.items():
            if name not in self._entries:
                raise DirectionError(f"The network has no entry {name!r}: {suggest(name, self._movable)}")
            if tensor.shape != self._entries[name].shape:
                raise DirectionError(
                    f"Entry {name!r} has shape {tuple(tensor.shape)}; expected {tuple(self._entries[name].shape)}."
                )
            if not tensor.is_floating_point():
                raise DirectionError(
                    f"Entry {name!r} has type {tensor.dtype}; expected real floating-point numbers. Leave out counters "
                    "and other buffers that do not move."
                )
        return {name: to_device(tensor.detach(), self.device, self.dtype) for name, tensor in state.items()}

    @contextlib.contextmanager
    def one_pass(self, *, progress: bool | None = False, description: str = "batches") -> Iterator[Iterator[Batch]]:
        """Visit the loader once: `with objective.one_pass() as batches: for batch in batches: …`.

        A shuffling or augmenting loader draws from the global random number generators; they are restored when
        the block ends, also by an exception.

        Raises:
            LoaderError: The loader yields nothing, or a batch is not of the form that the loss expects.
        """
        total = loader_length(self.loader, self.max_batches)
        with (
            global_rng_preserved(),
            tqdm(total=total, desc=description, disable=None if progress is None else not progress, leave=False) as bar,
        ):
            yield self._visit(bar)

    def _visit(self, bar: Any) -> Iterator[Batch]:
        index = -1
        for index, data in enumerate(islice(self.loader, self.max_batches)):
            size = self._count_examples(data, index)
            yield Batch(index, size, map_tensors(lambda tensor: to_device(tensor, self.device, self.dtype), data))
            bar.update()
        if index < 0:
            refuse_iterator(self.loader, "The loader yielded no batch: it may have been used up by an earlier pass")
            raise LoaderError("The loader yielded no batch; expected at least one.")

    def _count_examples(self, data: Any, index: int) -> int:
        if not isinstance(self._loss_fn, BatchLoss):
            return count_pair(data, index)
        if self._loss_fn.size is None:
            return count_leading(data, index)
        return check_count(int(self._loss_fn.size(data)), index)

    def batch_loss(self, state: State, batch: Batch) -> Float[Tensor, ""]:
        """Mean loss over one batch at `state`: a scalar tensor, differentiable in the state.

        Raises:
            UnsupportedModelError: The loss is not a function of the state, because a module draws random numbers (found
                on the first batch; names the module).
            UnsupportedModelError: The loss is not a function of the state, because the network changes an entry in
                place, or reaches past the state for the parameters of the original network.
            LossError: The loss is not a real scalar.
        """
        return self.batch_evaluation(state, batch)[0]

    def batch_evaluation(self, state: State, batch: Batch) -> tuple[Float[Tensor, ""], Any, Any]:
        """Loss, network output and target of one batch at `state`; the last two are None for a `BatchLoss`."""
        entries = {f"network.{name}": tensor for name, tensor in {**self._entries, **state}.items()}
        if not self._checked:
            self._check_network(entries, batch)
            self._checked = True
        loss, output, target = functional_call(self._evaluation, entries, (batch.data,))
        check_loss(loss)
        return loss, output, target

    def laid_out(self, batch: Batch) -> Batch:
        """The batch with its images laid out as the device convolves them fastest, if the network bears it."""

        def bears_it() -> bool:
            if not prefers_channels_last(self.network, self.device, self.dtype):
                return False
            return ignores_layout(lambda batch: self.batch_loss(self.state(), batch), batch)

        return channels_last(batch) if self.memo("channels last", bears_it) else batch

    @property
    def has_output(self) -> bool:
        """Whether the loss is a function of a network output and a target, rather than a `BatchLoss`."""
        return not isinstance(self._loss_fn, BatchLoss)

    def output(self, state: State, batch: Batch) -> Any:
        """Output of the network for a batch's inputs at `state`; the batch's target is not looked at.

        Raises:
            LossError: The loss is a `BatchLoss`, which calls the network itself.
        """
        self._loss_of_output()
        return functional_call(self.network, {**self._entries, **state}, (batch.data[0],))

    def output_loss(self, output: Any, batch: Batch) -> Float[Tensor, ""]:
        """Mean loss of a network output over a batch: `batch_loss` is `output_loss(output(state, batch), batch)`.

        Raises:
            LossError: The loss is a `BatchLoss`, or is not a real scalar.
        """
        loss = self._loss_of_output()(output, batch.data[1])
        check_loss(loss)
        return loss

    def _loss_of_output(self) -> Callable[[Any, Any], Tensor]:
        if isinstance(self._evaluation.loss_fn, BatchLoss):
            raise LossError(
                "A BatchLoss calls the network itself, so the network's output is not known: pass "
                "loss_fn(output, target) with batches (x, y)."
            )
        return self._evaluation.loss_fn

    def _check_network(self, entries: State, batch: Batch) -> None:
        """On the first batch, refuse networks whose loss is not a function of the state."""
        # Copies: what is looked for may write into them.
        constants = {name: tensor.detach().clone() for name, tensor in entries.items()}
        leaves = as_leaves({name: constants[name].clone() for name in self._movable_in(constants)})
        check_finite({name.removeprefix("network."): tensor for name, tensor in constants.items()}, "the network")
        versions = {name: tensor._version for name, tensor in constants.items()}
        losses: list[Any] = []

        def evaluate(state: dict[str, Tensor]) -> None:
            losses.append(functional_call(self._evaluation, state, (batch.data,))[0])

        with torch.no_grad():
            name = drawing_module(self._evaluation, lambda: evaluate(constants))
        check_loss(losses[0])
        if name is not None:
            self._refuse_drawing(name)
        changed = [name for name, tensor in constants.items() if tensor._version != versions[name]]
        if changed:
            raise UnsupportedModelError(
                f"The network changes {changed[0].removeprefix('network.')!r} in place while it is evaluated, so its "
                "loss depends on what was evaluated before. Switch that off (max_norm of an embedding, running "
                "averages in evaluation mode)."
            )
        with torch.enable_grad():
            evaluate({**constants, **leaves})
        self._refuse_reaching_past(losses[1])
        first, second = (loss.item() for loss in losses)
        # Beyond what reordered sums on a GPU explain.
        if not np.isclose(first, second, rtol=1e-3, atol=1e-6, equal_nan=True):
            raise UnsupportedModelError(
                f"The network has losses {first:.6g} and {second:.6g} for one state and batch: a module draws from a "
                "generator of its own, or keeps something from call to call. Switch that off."
            )

    def _movable_in(self, entries: State) -> list[str]:
        return [name for name in entries if name.removeprefix("network.") in self._movable]

    def _refuse_drawing(self, name: str) -> None:
        kind = type(self._evaluation.get_submodule(name)).__name__
        culprit = f"Module {name.removeprefix('network.')!r} ({kind})" if "." in name else f"The {name or 'loss'}"
        raise UnsupportedModelError(
            f"{culprit} draws random numbers in evaluation mode, so its loss is not a function of the parameters. "
            "Switch the randomness off (dropout-like functions take training=self.training)."
        )

    def _refuse_reaching_past(self, loss: Tensor) -> None:
        originals = {id(ref()): name for ref, name in self._originals if ref() is not None}
        placeholders = {id(parameter): name for name, parameter in self._placeholders.items()}
        for node in graph_nodes([loss]):
            leaf = id(getattr(node, "variable", None))
            name = originals.get(leaf) or placeholders.get(leaf)
            if name is not None:
                raise UnsupportedModelError(
                    f"The loss uses parameter {name!r} of the network itself instead of the state at hand: a closure, "
                    "a list of parameters outside nn.ParameterList, or loss_fn refers to it. Reach it through its "
                    "module (self.layer.weight), or pass loss_fn=BatchLoss(fn) with fn(model, batch)."
                )

    def loss(self, state: State | None = None) -> float:
        """Mean loss over the data set at `state` (default: the snapshot), in one pass over the loader.

        Under `"recalibrate"` a pass that re-estimates the statistics goes first.

        Raises:
            NonFiniteError: The loss of a batch is infinite or not a number.
        """
        point = {**self.state(), **self.place(state or {})}
        check_finite(point, "the state")
        if self.batch_norm == "recalibrate":
            point |= self.recalibrated([point])[0]
        values, sizes = [], []
        with torch.no_grad(), self.measuring(), self.one_pass() as batches:
            for batch in batches:
                values.append(finite_loss(self.batch_loss(point, batch), batch))
                sizes.append(batch.size)
        return float(weighted_mean(np.array(values), np.array(sizes)))

    def gradient(self, state: State | None = None) -> dict[str, Tensor]:
        """Gradient of the mean loss at `state`: entry name to a tensor of the entry's shape and dtype.

        Raises:
            NonFiniteError: The loss of a batch is infinite or not a number.
            LossError: The loss does not depend on the state.
        """
        point = {**self.state(), **self.place(state or {})}
        check_finite(point, "the state")
        leaves = as_leaves({name: point[name] for name in self._movable})
        total = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in leaves.items()}
        examples = 0
        with self.one_pass() as batches, self.differentiating():
            for batch in batches:
                loss = self.batch_loss({**point, **leaves}, batch)
                finite_loss(loss, batch)
                check_differentiable(loss)
                gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
                for accumulated, gradient in zip(total.values(), gradients, strict=True):
                    accumulated.add_(gradient, alpha=batch.size)
                examples += batch.size
        return {name: (tensor / examples).to(self.dtype) for name, tensor in total.items()}

    @contextlib.contextmanager
    def differentiating(self) -> Iterator[None]:
        """Within the block, all that the network calls has exact first and second derivatives, on a CUDA device too."""
        with self.differentiating_operations(), _TwiceDifferentiable():
            yield

    @contextlib.contextmanager
    def differentiating_operations(self) -> Iterator[None]:
        """The same for operations of a graph that is there: without a look at every call on its way to torch."""
        recurrent = any(isinstance(module, nn.RNNBase) for module in self.network.modules())
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            # The fused attention kernels have no second derivative; the plain mathematics has.
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            # cuDNN's recurrent kernels have no second derivative.
            stack.enter_context(self._exact_kernels(enabled=not recurrent))
            yield

    @contextlib.contextmanager
    def _exact_kernels(self, *, enabled: bool = True) -> Iterator[None]:
        """Within the block, convolutions on a CUDA device are deterministic, and rounded to TF32 only if asked to."""
        if self.device.type != "cuda":
            yield
            return
        with torch.backends.cudnn.flags(
            enabled=enabled, benchmark=False, deterministic=True, allow_tf32=self.allow_tf32
        ):
            yield

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Within the block, values are exact, and `"recalibrate"` normalises by the state (see `recalibrated`)."""
        with self._exact_kernels(), self._normalizing_by("batch" if self.batch_norm == "batch" else "running"):
            yield

    def recalibrated(self, states: Sequence[State], *, progress: bool = False) -> list[dict[str, Tensor]]:
        """Running statistics of the network at each state, re-estimated over the loader: one pass for all states.

        A statistic is the mean over the batches, weighted by examples, of the batch's mean or unbiased variance
        (what `torch.optim.swa_utils.update_bn` computes when all batches have one size).

        Args:
            states: The states; they are asked for anew with every batch, so they may be made on demand.
            progress: Show a progress bar over batches.

        Returns:
            For each state, entry name to statistic.

        Raises:
            LoaderError: The loader is an iterator, which could not be visited again afterwards.
            NonFiniteError: The loss of a batch is infinite or not a number.
        """
        refuse_iterator(self.loader, "batch_norm='recalibrate' visits the loader twice")
        totals: list[dict[str, Tensor]] = [{} for _ in range(len(states))]
        examples = 0
        with (
            torch.no_grad(),
            self._normalizing_by("record"),
            self.one_pass(progress=progress, description="recalibrating") as batches,
        ):
            for batch in batches:
                for number, total in enumerate(totals):
                    for entry, value in self._batch_statistics(states[number], batch).items():
                        total[entry] = total.get(entry, 0) + batch.size * value
                examples += batch.size
        return [{entry: (value / examples).to(self.dtype) for entry, value in total.items()} for total in totals]

    def _batch_statistics(self, state: State, batch: Batch) -> dict[str, Tensor]:
        """Entry name to the statistic of one batch, in float64; the mean over calls of a module called often."""
        self._control.recorded.clear()
        # Statistics that are not finite would spoil the mean over all batches: here the batch is still known.
        finite_loss(self.batch_loss(state, batch), batch, ", while statistics are re-estimated")
        statistics = {}
        for module, calls in self._control.recorded.items():
            for entry, values in zip(statistic_names(module), zip(*calls, strict=True), strict=True):
                statistics[entry] = torch.stack(values).double().mean(0)
        self._control.recorded.clear()
        return statistics

    @contextlib.contextmanager
    def _normalizing_by(self, statistics: Statistics) -> Iterator[None]:
        before = self._control.statistics
        self._control.statistics = statistics
        try:
            yield
        finally:
            self._control.statistics = before


class _TwiceDifferentiable(TorchFunctionMode):
    """Writes out what torch cannot differentiate twice: the hard sigmoid, and (wrong without a word) weight norm."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.hardsigmoid:
            return torch.clamp(args[0] / 6 + 0.5, 0, 1)
        if func is torch._weight_norm:  # pyright: ignore[reportPrivateImportUsage]
            weight, length, *axis = args
            return weight * (length / torch.norm_except_dim(weight, 2, *axis))
        return func(*args, **(kwargs or {}))


class _Evaluation(nn.Module):
    """Network and loss as one module, so that one functional call evaluates both at a state."""

    def __init__(self, network: nn.Module, loss_fn: LossFunction):
        super().__init__()
        self.network = network
        self.loss_fn = loss_fn

    def forward(self, data: Any) -> tuple[Any, Any, Any]:
        if isinstance(self.loss_fn, BatchLoss):
            return self.loss_fn.fn(self.network, data), None, None
        inputs, target = data
        output = self.network(inputs)
        return self.loss_fn(output, target), output, target


def _check_iterable(loader: Any) -> None:
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise LoaderError(f"The loader is {describe(loader)}; expected an iterable of batches, such as a DataLoader.")
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise LoaderError(
            f"The loader is a data set ({type(loader).__name__}), which yields examples; expected batches: pass "
            "DataLoader(dataset, batch_size=...)."
        )
