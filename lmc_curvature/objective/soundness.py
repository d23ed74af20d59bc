"""The checks that an objective makes of itself on its first batch: refusals, and warnings."""

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lmc_curvature.agreement import near
from lmc_curvature.errors import LMCCurvatureError, UnsupportedModelError, naming
from lmc_curvature.objective.batches import Batch, tensors_in
from lmc_curvature.objective.caches import check_caches
from lmc_curvature.objective.copies import Given, check_copies
from lmc_curvature.objective.cuts import warn_of_cuts, watch_cuts
from lmc_curvature.objective.dependence import Dependence, refuse_changes
from lmc_curvature.objective.differentiable import plain_calls
from lmc_curvature.objective.lines import own_functions
from lmc_curvature.objective.losses import NetworkLoss, check_differentiable
from lmc_curvature.objective.memo import Memo
from lmc_curvature.objective.network import (
    State,
    as_leaves,
    check_finite,
    copies_of,
    entries_of,
    operation_counts,
)
from lmc_curvature.objective.normalization import BatchNormPolicy, Normalization, normalizes_by_batch
from lmc_curvature.objective.numerics import Numerics, outside_inference
from lmc_curvature.objective.passes import Passes
from lmc_curvature.objective.randomness import drawing_module
from lmc_curvature.objective.twins import check_twin
from lmc_curvature.objective.witness import WITHOUT_WITNESS, check_derivatives
from lmc_curvature.objective.wrappers import unwrap

# Numbers of a tensor that is not copied to be summed with others.
_LARGE = 2**20


@dataclass(frozen=True, eq=False)
class Soundness:
    """The checks that an objective makes of itself on its first batch, each once.

    Attributes:
        network_loss: The network and its loss.
        entries: All entries of the network.
        movable: Names of those that move.
        placeholders: Entries that stand in the network's structure, which the loss must not reach for. Kept here,
            because functional_call may leave another tensor in a module that the network holds twice.
        originals: Movable entries of the network that the objective was made of, as long as that network lives; the
            loss must not reach for them, nor for those of the twins.
        given: The network and the loss that copies were made of.
        pristine: The network's structure in a copy that was never called.
        twins: Further networks, which must be of the same structure, each with what errors call it.
        normalization: The statistics that the network's normalisation uses.
        batch_norm: The policy that decides on them.
        numerics: The precision and the kernels that the network is computed with.
        witness: Whether derivatives are compared with differences of the loss.
        note: A few words on the precision, if that is unusual; one of the `notes`.
    """

    network_loss: NetworkLoss
    entries: State
    movable: Collection[str]
    placeholders: Sequence[tuple[str, Tensor]]
    originals: Sequence[tuple[str, Callable[[], Tensor | None]]]
    given: Given
    pristine: nn.Module
    twins: Sequence[tuple[str, nn.Module]]
    normalization: Normalization
    batch_norm: BatchNormPolicy
    numerics: Numerics
    witness: bool
    note: str
    _memo: Memo = field(default_factory=Memo)
    _passes: Passes = field(default_factory=Passes)

    def check(self, state: State, batch: Batch) -> None:
        """Refuse, on the first batch, a network whose loss is not a function of its state or not what it seems.

        Raises:
            UnsupportedModelError: The loss is not a function of the state; see `check_soundness` and
                `check_caches`.
            ArchitectureMismatchError: A twin computes something else; see `check_twin`.
        """
        # A batch in which nothing counts has no loss.
        if batch.weight:
            self._memo("checks of the loss", lambda: self._check(state, batch))
            device = self.numerics.device.type
            if torch.is_autocast_enabled(device):
                dtype = str(torch.get_autocast_dtype(device)).removeprefix("torch.")
                self._memo.replace("autocast", f"computed under torch.autocast, in {dtype} where it chooses to")

    def watch(self, batches: Iterator[Batch], gather: Callable[[Any], list[Any]], *, is_whole: bool) -> Iterator[Batch]:
        """Pass on the batches of one pass; in the first complete one, each is looked at for how its loss is a mean.

        Every further pass is compared with it, also in how it is cut where the loss depends on that.

        Args:
            batches: The batches.
            gather: Brings together what all ranks have found.
            is_whole: Whether the pass goes on to the end of the loader; else it is not compared with others.
        """
        mixes = normalizes_by_batch(self.network_loss.network, self.normalization.statistics)
        cause = "batch normalisation" if mixes else "loss_fn" if self.network_loss.is_cut else ""
        batches = self._passes.watch(batches, cut_matters=cause, gather=gather) if is_whole else batches
        if not self._memo.get("cuts", False):
            batches = watch_cuts(self.network_loss, self.entries, batches, self.normalization, gather)
        yield from batches
        if is_whole:
            self._memo("cuts", lambda: True)

    @outside_inference()
    def _check(self, state: State, batch: Batch) -> None:
        originals = ((name, tensor) for name, reference in self.originals if (tensor := reference()) is not None)
        own = [(f"{name!r} of the network itself", tensor) for name, tensor in (*self.placeholders, *originals)]
        others = (pair for _, twin in self.twins for pair in entries_of(unwrap(twin)).items())
        own += [(f"{name!r} of another network itself", tensor) for name, tensor in others if name in self.movable]

        def check_against_given() -> None:
            args = self.given, self.network_loss, self.entries, batch, self.movable
            check_copies(*args, own, self.normalization)

        try:
            options = {"movable": self.movable, "others": own, "normalization": self.normalization}
            loss = check_soundness(self.network_loss, state, batch, **options)
        except LMCCurvatureError as error:
            # What a copy does not find may make it fail.
            if error.__cause__ is not None:
                check_against_given()
            raise
        self._memo.replace("functions", own_functions(loss))
        self._memo.replace("operations", operation_counts([loss]))
        self._memo.replace("loss", loss.detach().requires_grad_(loss.requires_grad))
        # Its graph holds all that the batch takes.
        del loss
        if self.batch_norm != "interpolate":
            self._note_running_statistics(batch)
        if self.batch_norm == "batch":
            self.normalization.warn_of_batch_statistics(lambda: self.network_loss.at(self.entries, batch.data)[0])
        policy, rounding = self.batch_norm, self.numerics.rounding
        check_caches(self.pristine, self.network_loss, self.entries, batch, self.movable, self.normalization)
        check_against_given()
        for called, twin in self.twins:
            with naming(called):
                note = check_twin(twin, self.network_loss, self.entries, batch, self.normalization, policy, rounding)
            if note:
                note = f"{called}: {note}" if called else note
                warnings.warn(f"{note}. If other data tell them apart, the numbers mix two functions.", stacklevel=2)
                self._memo.replace("twins", note)

    def _note_running_statistics(self, batch: Batch) -> None:
        """Warn of modules that the policy does not reach."""

        def loss(others: State) -> float:
            return self.network_loss.at({**self.entries, **others}, batch.data, batch.index)[0].item()

        with torch.no_grad(), self.normalization.by("batch"):
            before = loss({})
            options = {"rounding": self.numerics.rounding, "scale": abs(before), "floor": 1e-12}
            names = self.normalization.names_of_running(
                self.entries, lambda others: not near("running statistics", loss(others), before, **options)
            )
        if names:
            note = f"normalised by running statistics in spite of batch_norm={self.batch_norm!r}: {', '.join(names)}"
            self._memo.replace("running statistics", note)
            warnings.warn(
                f"{note[0].upper()}{note[1:]}, which is not called as torch's module (folded into weights, a function "
                "that the network calls itself, a class of its own): choose batch_norm='interpolate', or call the "
                "module.",
                stacklevel=2,
            )

    def check_derivatives(self, state: State, batch: Batch, entries: Collection[str], *, second: bool) -> None:
        """Compare derivatives with differences of the loss; see `witness.check_derivatives`.

        Raises:
            UnsupportedModelError: They disagree.
            LossError: No entry of the state has any part in the loss.
        """
        self.check(state, batch)
        if batch.weight:
            # Its derivatives would be zero without a word.
            check_differentiable(self._memo.get("loss", None))
        if not (self.witness and batch.is_first):
            return
        moved = tuple(sorted(entries or self.movable))

        def is_other_graph(data: Any) -> bool:
            # Once: a graph hardly hangs on the state, and whole batches take long.
            if self._memo.get("graphs were compared", False):
                return False
            self._memo.replace("graphs were compared", True)
            leaves = as_leaves({name: state[name] for name in self.movable})
            with torch.enable_grad(), plain_calls():
                loss = self.network_loss.at({**state, **leaves}, data)[0]
            return operation_counts([loss]) != self._memo.get("operations", None)

        def compare() -> str:
            options = {"movable": moved, "numerics": self.numerics, "second": second}
            options |= {"functions": self._memo.get("functions", ())}
            options |= {"is_other_graph": is_other_graph}
            note = check_derivatives(self.network_loss, state, batch, **options)
            if note:
                # Many results have no place for notes.
                warnings.warn(f"{note[0].upper()}{note[1:]}: see docs/trust.md, witness.", stacklevel=2)
                self._memo.replace("what could not be compared", note)
            return note

        self._memo(("derivatives", moved, second, _fingerprint(state)), compare)

    @property
    def notes(self) -> tuple[str, ...]:
        """A few words each on what is unusual about numbers computed so far."""
        witness = self._memo.get("what could not be compared", "") if self.witness else WITHOUT_WITNESS
        names = ("twins", "autocast", "running statistics")
        found = self.note, *(self._memo.get(name, "") for name in names), witness
        return tuple(note for note in found if note)


def check_soundness(
    network_loss: NetworkLoss,
    state: State,
    batch: Batch,
    *,
    movable: Collection[str],
    others: Iterable[tuple[str, Tensor]],
    normalization: Normalization,
) -> Tensor:
    """Refuse a network whose loss is not a function of its state; it is evaluated twice.

    A loss whose value depends on how the data are cut into batches is warned of.

    Args:
        network_loss: The network and its loss.
        state: All entries of the network.
        batch: The batch.
        movable: Names of the entries that move.
        others: Tensors that the loss must not depend on, being no part of the state, with what they are.
        normalization: The statistics that the network uses.

    Returns:
        The loss, with the graph that it has to the entries that move.

    Raises:
        UnsupportedModelError: A module draws random numbers, an entry is changed in place, the loss reaches past the
            state for one of the `others`, or two evaluations differ.
        NonFiniteError: An entry of the state is not finite.
        LossError: The loss is not a real scalar.
    """
    # Copies: what is looked for may write into them.
    constants = copies_of(state)
    leaves = as_leaves({name: constants[name].clone() for name in movable})
    # Buffers that stay may be infinite, as a mask of attention is.
    check_finite({name: constants[name] for name in movable}, "the network")
    losses: list[Any] = []
    with torch.no_grad():
        drawing = drawing_module(
            network_loss, lambda: losses.append(network_loss.at(constants, batch.data, batch.index)[0])
        )
    if drawing is not None:
        _refuse_drawing(network_loss, drawing)
    refuse_changes(state, constants)
    with torch.enable_grad(), plain_calls(), Dependence(others, given=tensors_in(batch.data)) as dependence:
        again, output, target = network_loss.at({**constants, **leaves}, batch.data, batch.index)
    dependence.refuse(again)
    # On a CUDA device hard swish and sigmoid hold 1/6 in single precision, whatever their argument's type.
    coarsest = torch.float32 if again.is_cuda else again.dtype
    rounding = max(torch.finfo(dtype).eps for dtype in (again.dtype, coarsest))
    _refuse_difference(losses[0].item(), again.item(), rounding)
    warn_of_cuts(network_loss, constants, batch, output, target, normalization)
    return again


def _fingerprint(state: State) -> tuple[float, ...]:
    """Numbers that two states hardly share unless they are equal, also where one is a permutation of the other."""
    sums: list[Tensor] = []
    small: list[Tensor] = []

    def add(flat: Tensor) -> None:
        sums.extend(part.sum(dtype=torch.float64) for part in (flat, flat[::2], flat[::3]))

    # Few calls for all that are small, and no copy of what is large.
    for flat in (tensor.flatten() for tensor in state.values() if tensor.is_floating_point()):
        if flat.numel() < _LARGE:
            small.append(flat)
        else:
            add(flat)
    if small:
        add(torch.cat(small))
    return tuple(torch.stack(sums).tolist()) if sums else ()


def _refuse_drawing(network_loss: nn.Module, name: str) -> None:
    kind = type(network_loss.get_submodule(name)).__name__
    culprit = f"Module {name.removeprefix('network.')!r} ({kind})" if "." in name else f"The {name or 'loss'}"
    raise UnsupportedModelError(
        f"{culprit} draws random numbers in evaluation mode, so its loss is not a function of the parameters. "
        "Switch the randomness off (dropout-like functions take training=self.training)."
    )


def _refuse_difference(first: float, second: float, rounding: float) -> None:
    # Beyond what reordered sums on a GPU explain.
    if not near("two evaluations", first, second, rounding=rounding, scale=abs(second), floor=1e-6):
        raise UnsupportedModelError(
            f"The network has losses {first:.6g} and {second:.6g} for one state and batch: a module draws from a "
            "generator of its own, or keeps something from call to call. Switch that off."
        )
