"""The empirical risk of a network: a function of its state, averaged over the batches of a loader."""

import contextlib
import functools
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from lmc_curvature.errors import LossError, check_choice, check_flags
from lmc_curvature.objective.batches import Batch, map_tensors, place_data, to_device
from lmc_curvature.objective.copies import Given
from lmc_curvature.objective.dependence import refuse_changes
from lmc_curvature.objective.differentiable import one_function
from lmc_curvature.objective.extent import Extent
from lmc_curvature.objective.gathering import same_batches
from lmc_curvature.objective.gradients import mean_gradient
from lmc_curvature.objective.loaders import check_loader, visit
from lmc_curvature.objective.losses import (
    BatchLoss,
    LossFunction,
    NetworkLoss,
    check_loss,
    check_reduction,
    finite_loss,
    own_loss,
)
from lmc_curvature.objective.memo import Memo
from lmc_curvature.objective.network import (
    State,
    check_entries,
    check_finite,
    check_module,
    choose_device,
    choose_dtype,
    copies_of,
    entries_of,
    movable_entries,
    placed_entries,
    precision_note,
    skeleton_of,
    tied_names,
    with_first_names,
)
from lmc_curvature.objective.normalization import POLICIES, BatchNormPolicy, Normalization, is_batch_counter
from lmc_curvature.objective.numerics import Numerics, bears_channels_last, channels_last, outside_inference
from lmc_curvature.objective.ranks import Group, Ranks
from lmc_curvature.objective.recalibration import check_recalibration, recalibrated_statistics
from lmc_curvature.objective.soundness import Soundness
from lmc_curvature.objective.summary import ObjectiveDisplay
from lmc_curvature.objective.wrappers import unwrap
from lmc_curvature.replay import Replays


class Objective(ObjectiveDisplay):
    """The mean loss of a network over a data set, as a function of the network's state.

        L(θ) = (1/n) Σ_i loss(model_θ(x_i), y_i)

    The objective takes a snapshot of the network: what is done to the network afterwards does not change it, and
    nothing done here changes the network (its parameters, buffers, mode and gradients) or the global random number
    generators. Dropout is off. Batches weigh by what their loss is a mean over, see `LossFunction`; sums over batches
    are kept in float64.

    Args:
        model: Any module. Its parameters need not require gradients.
        loader: Yields `(x, y)` batches, or what `loss_fn` expects. Visited once per evaluation; passes with other data
            than the first are warned of.
        loss_fn: `loss_fn(output, target)`, the scalar mean over the batch (default: cross-entropy), or a `BatchLoss`.
        batch_norm: See `BatchNormPolicy`. Derivatives under `"recalibrate"` are those of `"batch"`.
        recalibration: Under `"recalibrate"`, the loader to re-estimate statistics on, by default `loader`. They should
            be those that the network was trained on, augmentation included.
        max_batches: Use only this many batches of each loader.
        device: Where to compute; the model's device by default.
        dtype: Floating-point type to compute in; by default the one that holds all of the model's, float32 at least.
        allow_tf32: Let convolutions on a CUDA device round float32 to ten bits of mantissa, with errors of about 1e-3.
            Matrix products follow `torch.backends.cuda.matmul`, where that is off unless switched on.
        witness: Compare derivatives with differences of the loss before the first is used; see `witness.py`.
        twins: Further networks of the same structure, alone or by what errors call them. On the first batch each must
            have the loss that this objective has with the same entries (see `check_twin`).
        group: The processes that share the batches of every pass, all making the same calls: a process group of
            torch.distributed, or `"world"`; None for this process alone. Results are the same on all.
        timeout: Seconds after which one of them that gives no sign of life has ended the others.

    Attributes:
        network, network_loss, snapshot: The network's structure, the same with its loss, and what `state()` copies.
        loss_fn, device, dtype: The loss, a copy if it is a module; where, and in which type, it computes.
        numerics: The precision and the kernels it computes with: derivatives within `numerics.differentiating()`.
        memo: `memo(key, make)` keeps what others make once for this objective; it knows nothing of what it keeps.
        replays: Calls functions of tensors, and replays them on a CUDA device.
        ranks: The processes that share the batches.

    Raises:
        OptionError: `batch_norm`, `max_batches`, `device`, `dtype` or `allow_tf32` has a bad value, or `recalibration`
            is given under another policy.
        LoaderError: A loader cannot be iterated over, or is a data set of single examples.
        LossError: `loss_fn` is not a function, sums over the batch, or does not reduce.
        UnsupportedModelError: `model` is no network, has parameters that cannot move, or cannot be copied.
    """

    @outside_inference()
    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        loss_fn: LossFunction | None = None,
        batch_norm: BatchNormPolicy = "interpolate",
        recalibration: Iterable[Any] | None = None,
        max_batches: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        allow_tf32: bool = False,
        witness: bool = True,
        twins: Sequence[nn.Module] | Mapping[str, nn.Module] = (),
        group: Group = None,
        timeout: float | int = 60.0,
    ):
        check_module("model", model)
        original, model = model, unwrap(model)
        check_choice("batch_norm", batch_norm, POLICIES)
        check_flags(allow_tf32=allow_tf32, witness=witness)
        check_loader(loader, max_batches)
        check_recalibration(recalibration, batch_norm, max_batches)
        check_reduction(loss_fn)
        self._movable = movable_entries(model, batch_norm)
        # What acts on its mode is a copy by now.
        originals = [*original.named_parameters(), *(b for b in model.named_buffers() if b[0] in self._movable)]
        self.loader, self.recalibration = loader, recalibration
        self.max_batches, self.allow_tf32 = max_batches, allow_tf32
        self.batch_norm: BatchNormPolicy = batch_norm
        tensors = [*model.parameters(), *model.buffers()]
        self.device, self.dtype = choose_device(device, tensors), choose_dtype(dtype, tensors)
        self.loss_fn = own_loss(loss_fn, self.device, self.dtype)
        self.network, pristine = skeleton_of(model), skeleton_of(model)
        self.numerics = Numerics.of(self.network, self.device, self.dtype, allow_tf32)
        self._normalization = Normalization(self.network, "running" if batch_norm == "interpolate" else "batch")
        self.network_loss = NetworkLoss(self.network, self.loss_fn)
        self._entries, self._aliases = placed_entries(model, self.device, self.dtype), tied_names(model)
        self.snapshot = {name: self._entries[name] for name in self._movable}
        self._soundness = Soundness(
            self.network_loss,
            self._entries,
            self._movable,
            placeholders=[pair for pair in entries_of(self.network).items() if pair[0] in self._movable],
            originals=[(name, weakref.ref(tensor)) for name, tensor in originals],
            given=Given(weakref.ref(original), self.loss_fn if loss_fn is None else loss_fn),
            pristine=pristine,
            twins=list(twins.items()) if isinstance(twins, Mapping) else [("", twin) for twin in twins],
            normalization=self._normalization,
            batch_norm=batch_norm,
            numerics=self.numerics,
            witness=witness,
            note=precision_note(self.dtype, tensors),
        )
        self.memo, self.replays = Memo(), Replays.on(self.device)
        self.ranks = Ranks(group, timeout, self.device)

    @property
    def rounding(self) -> float:
        """Relative rounding error of one operation as things are: that of TF32 or of autocast where they are on."""
        return self.numerics.rounding

    def state(self) -> dict[str, Tensor]:
        """The network's state when the objective was made: entry name to tensor, what a segment may move."""
        return copies_of(self.snapshot)

    def complete(self, state: State) -> dict[str, Tensor]:
        """A placed state with every floating-point entry of the network: those left out are as in the network."""
        return {name: t for name, t in self._entries.items() if t.is_floating_point()} | self.place(state)

    def place(self, state: State) -> dict[str, Tensor]:
        """Bring a state or direction to the objective's device and floating-point type.

        What else a `state_dict()` holds is understood: further names of tied parameters, and the counters of
        normalisation modules, which are left out.

        Raises:
            DirectionError: An entry is unknown, has another shape, is not of a real floating-point type, or has other
                numbers under a further name.
        """
        state = with_first_names({n: t for n, t in state.items() if not is_batch_counter(n)}, self._aliases)
        check_entries(state, self._entries, self._movable)
        return {name: to_device(tensor.detach(), self.device, self.dtype) for name, tensor in state.items()}

    @contextlib.contextmanager
    def one_pass(
        self,
        *,
        progress: bool | None = None,
        description: str = "batches",
        weightless: bool = False,
        loader: Iterable[Any] | None = None,
        alone: bool = False,
        extent: Extent | None = None,
    ) -> Iterator[Iterator[Batch]]:
        """Visit the loader, or another, once: `with objective.one_pass() as batches: for batch in batches: …`.

        A shuffling or augmenting loader draws from the global random number generators; they are restored when
        the block ends, also by an exception. Batches without a target that counts come if `weightless`. Ranks have
        their share of the batches each, and go through all of a pass; what they find is brought together within the
        block, by `ranks.merge` or `ranks.total`. `alone`, this process has all batches, and need not go through them.
        By an `extent` a pass may end before the loader does.

        Raises:
            LoaderError: The loader yields nothing, or a batch is not of the form that the loss expects.
            RankError: Another rank has failed or vanished, or has other batches.
        """
        place = functools.partial(place_data, device=self.device, dtype=self.dtype)
        visited = self.loader if loader is None else loader
        count = functools.partial(self.network_loss.count, state=self._entries, place=place)
        ranks = Ranks() if alone else self.ranks
        options = {"progress": progress, "description": description, "ranks": ranks, "extent": extent}
        options |= {"max_batches": self.max_batches, "weightless": weightless, "count": count, "place": place}
        is_whole = extent is None or extent.tolerance is None
        with outside_inference(), one_function(), visit(visited, **options) as batches:
            # Passes over the loader are compared with each other; another has other data.
            own, batches = visited is self.loader, same_batches(batches, self.snapshot)
            yield self._soundness.watch(batches, ranks.gather, is_whole=is_whole) if own else batches

    def batch_loss(self, state: State, batch: Batch) -> Float[Tensor, ""]:
        """Mean loss over one batch at `state`: a scalar tensor, differentiable in the state.

        Raises:
            UnsupportedModelError: The loss is not a function of the state (see `check_soundness`); found on the first
                batch.
            LossError: The loss is not a real scalar.
        """
        return self.batch_evaluation(state, batch)[0]

    def batch_evaluation(self, state: State, batch: Batch) -> tuple[Float[Tensor, ""], Any, Any]:
        """Loss, network output and target of one batch at `state`; the last two are None for a `BatchLoss`."""
        entries = {**self._entries, **state}
        self._soundness.check(entries, batch)
        return self.network_loss.at(entries, batch.data, batch.index)

    def check_derivatives(
        self, state: State, batch: Batch, entries: Collection[str] = (), *, second: bool = True
    ) -> None:
        """Before derivatives are taken at a state, compare them with differences of the loss on a few examples.

        The state is a complete one. Derivatives are in some of its `entries` or all; the second, too, if asked for. It
        is done once for every state, on the first batch of a pass.

        Raises:
            UnsupportedModelError: They disagree.
        """
        self._soundness.check_derivatives({**self._entries, **state}, batch, entries, second=second)

    @property
    def notes(self) -> tuple[str, ...]:
        """A few words each on what is unusual about the numbers computed so far."""
        return self._soundness.notes

    def laid_out(self, batch: Batch) -> Batch:
        """The batch with its images laid out as the device convolves them fastest, if the network bears it."""
        loss = functools.partial(self.batch_loss, self.snapshot)
        bears_it = functools.partial(bears_channels_last, self.network, self.numerics, loss, batch)
        return channels_last(batch) if self.memo("channels last", bears_it) else batch

    @property
    def has_output(self) -> bool:
        """True for a loss of a network output and a target, False for a `BatchLoss`."""
        return not isinstance(self.loss_fn, BatchLoss)

    def output(self, state: State, batch: Batch) -> Any:
        """Output of the network for a batch's inputs at `state`; the batch's target is not looked at.

        Raises:
            LossError: The loss is a `BatchLoss`, which calls the network itself.
        """
        self._loss_of_output()
        return functional_call(self.network, {**self._entries, **state}, (map_tensors(torch.clone, batch.data[0]),))

    def output_loss(self, output: Any, batch: Batch) -> Float[Tensor, ""]:
        """Mean loss of a network output over a batch: `batch_loss` is `output_loss(output(state, batch), batch)`.

        Raises:
            LossError: The loss is a `BatchLoss`, or is not a real scalar.
        """
        loss = self._loss_of_output()(output, batch.data[1])
        check_loss(loss)
        return loss

    def _loss_of_output(self) -> Callable[[Any, Any], Tensor]:
        if isinstance(self.loss_fn, BatchLoss):
            raise LossError(
                "A BatchLoss calls the network itself, so the network's output is not known: pass "
                "loss_fn(output, target) with batches (x, y)."
            )
        return self.network_loss.of_output

    @outside_inference()
    def loss(self, state: State | None = None, *, progress: bool | None = None) -> float:
        """Mean loss over the data set at `state` (default: the snapshot), in one pass over the loader.

        Under `"recalibrate"` a pass that re-estimates the statistics goes first. A progress bar is shown on a
        terminal and in a notebook, unless `progress` says otherwise.

        Raises:
            NonFiniteError: The loss of a batch is infinite or not a number.
        """
        kept = self._point(state)
        kept |= self.recalibrated([kept], progress=progress)[0] if self.batch_norm == "recalibrate" else {}
        point = copies_of(kept)
        total, weight = torch.zeros((), dtype=torch.float64, device=self.device), 0.0
        with torch.no_grad(), self.measuring(), self.one_pass(progress=progress, description="loss") as batches:
            for batch in batches:
                total += batch.weight * finite_loss(self.batch_loss(point, batch), batch)
                weight += batch.weight
            weight = self.ranks.total(weight, total)
        refuse_changes(kept, point)
        return total.item() / weight

    @outside_inference()
    def gradient(self, state: State | None = None, *, progress: bool | None = None) -> dict[str, Tensor]:
        """Gradient of the mean loss at `state`: entry name to a tensor of its shape and type; progress as of `loss`.

        Raises:
            NonFiniteError: The loss of a batch or the gradient of an entry is infinite or not a number.
            LossError: The loss does not depend on the state.
            UnsupportedModelError: An operation has no derivative.
        """
        return mean_gradient(self, self._point(state), self._movable, progress=progress)

    def _point(self, state: State | None) -> dict[str, Tensor]:
        point = {**self.snapshot, **self.place(state or {})}
        check_finite(point, "the state")
        return point

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Within the block, values are exact, and `"recalibrate"` normalises by the state (see `recalibrated`)."""
        with self.numerics.exact(), self._normalization.by("batch" if self.batch_norm == "batch" else "running"):
            yield

    def recalibrated(self, states: Sequence[State], *, progress: bool | None = None) -> list[dict[str, Tensor]]:
        """Running statistics of the network at each state, re-estimated in one pass; see `recalibrated_statistics`."""
        return recalibrated_statistics(self, states, self._normalization, progress=progress)
