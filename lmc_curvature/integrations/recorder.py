"""What is recorded of a network in training, when, and against which reference, whoever trains it."""

import contextlib
import copy
import inspect
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lmc_curvature.barrier.measure import measure_barrier
from lmc_curvature.barrier.metrics import Metric, check_metrics
from lmc_curvature.barrier.predict import predict_barrier
from lmc_curvature.checkpoints.entries import load_entries
from lmc_curvature.checkpoints.files import read_contents
from lmc_curvature.checkpoints.unwrapping import unwrap as find_entries
from lmc_curvature.errors import OptionError, UnsupportedModelError, check_choice, suggest
from lmc_curvature.integrations.numbers import Quantity, check_quantities, network_numbers
from lmc_curvature.objective import BatchLoss, LossFunction
from lmc_curvature.objective.randomness import global_rng_preserved
from lmc_curvature.objective.sharding import sharded_part
from lmc_curvature.objective.wrappers import unwrap

Reference = int | str | os.PathLike[str] | Mapping[str, Any]
"""The network after so many steps (0: at the start of training), a checkpoint of any origin, or a state dict."""


class Recorder:
    """Compute barriers and eigenvalues of a network in training, every so many steps or epochs.

    Training goes on as if nothing had been computed: numbers are those of copies of the network, without dropout, and
    all random number generators, the loader's own included, are left as they were. That takes memory for some four
    further networks, and the time of three forward passes over the data for a measured barrier, more for the rest;
    `max_batches` bounds both. Only the first process of a distributed training computes. The others do not wait, but
    at their next exchange with it: let it take less than the time after which they give up.

    Args:
        loader: Yields batches as `loss_fn` expects them. They should be the same in every visit; data that the network
            is not trained on, or training data without augmentation.
        reference: The network at the other end of barriers: the one after so many steps of this training, by default
            that at its start, or a checkpoint file or state dict.
        every_n_steps: Record after every so many steps of the optimiser.
        every_n_epochs: Record after every so many epochs, instead.
        record: What to record: `"barrier"`, measured halfway to the reference; `"predicted-barrier"`, by
            `predict_barrier`; `"eigenvalues"`, the largest of the Hessian in the parameters. See `network_numbers` for
            the names of what is logged.
        loss_fn: `loss_fn(output, target)` returning the mean over the batch (default: cross-entropy), or a `BatchLoss`.
        metrics: `"loss"`, and `"error"` for classifiers: what is measured of a barrier.
        eigenvalues: How many of the largest eigenvalues to record.
        max_batches: Use only this many batches.
        network: The name of the module to look at, such as `"model"`; by default all that is trained.
        prefix: What the names of numbers begin with in the log.
        on_error: What becomes of an error while numbers are computed: `"warn"` says so and lets training go on,
            `"raise"` ends it. Mistakes that can be seen at the start are raised in any case.
        **options: Options of barriers, such as `batch_norm`, `frozen` or `dtype`, as `measure_barrier` and
            `predict_barrier` both take them.

    Raises:
        OptionError: An option is unknown, has a bad value, or does not go with another.
    """

    # What stands for a forward in classes that have none.
    _without_forward: tuple[Any, ...] = (nn.Module.forward,)

    def __init__(
        self,
        loader: Iterable[Any],
        *,
        reference: Reference = 0,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        record: Sequence[Quantity] = ("barrier",),
        loss_fn: LossFunction | None = None,
        metrics: Sequence[Metric] = ("loss",),
        eigenvalues: int = 1,
        max_batches: int | None = None,
        network: str = "",
        prefix: str = "lmc/",
        on_error: Literal["warn", "raise"] = "warn",
        **options: Any,
    ):
        check_quantities(record)
        check_metrics(metrics, loss_fn)
        check_choice("on_error", on_error, ("warn", "raise"))
        _check_shared(options)
        self._reference = _check_reference(reference)
        self._steps, self._epochs = _check_interval(every_n_steps, every_n_epochs)
        self._loader, self._record, self._network, self._prefix = loader, tuple(record), network, prefix
        self._on_error = on_error
        self._options = {"loss_fn": loss_fn, "metrics": metrics, "eigenvalues": eigenvalues, "max_batches": max_batches}
        self._options |= options
        # What is known of the training at hand: the reference's entries, and the last step that was recorded.
        self._entries: dict[str, Any] | None = None
        self._last = -1

    def begin(self, trained: nn.Module, step: int, *, training_data: Any = None) -> None:
        """Take or read the reference when training begins.

        Args:
            trained: What is trained.
            step: The number of steps that were made before, in an earlier run that is continued.
            training_data: The loader that training visits.

        Raises:
            CheckpointError: The reference cannot be read, or is not of the network's architecture.
            OptionError: There is no such network in what is trained, it has no `forward` to give outputs, the
                reference was before the step at which training continues, or the loader cannot be visited while
                training visits it.
            UnsupportedModelError: The network is spread over several processes.
        """
        self._entries, self._last = None, step
        network = self._find(trained)
        _check_whole(network)
        self._check_forward(network)
        if training_data is self._loader and getattr(training_data, "persistent_workers", False):
            raise OptionError(
                "The loader is that of the training, whose persistent workers can serve one visit at a time: pass "
                "another DataLoader of the same data."
            )
        if not isinstance(self._reference, int):
            self._entries = _read(self._copy(network), self._reference)
        elif step > self._reference and self._needs_reference:
            raise OptionError(
                f"The reference is the network after {self._reference} steps, and training continues at step {step}: "
                "pass reference=FILE with a checkpoint of that network."
            )
        self._keep_reference(network, step)

    def after_step(self, trained: nn.Module, step: int) -> dict[str, float]:
        """The numbers to be logged after a step of the optimiser, by name; none if it is not the time."""
        network = self._find(trained)
        self._keep_reference(network, step)
        return self._numbers(network, step, f"step {step}") if self._steps and step % self._steps == 0 else {}

    def after_epoch(self, trained: nn.Module, step: int, epoch: int) -> dict[str, float]:
        """The numbers to be logged after an epoch, of which this is the number, from 1."""
        is_due = self._epochs and epoch % self._epochs == 0
        return self._numbers(self._find(trained), step, f"epoch {epoch}") if is_due else {}

    @property
    def _needs_reference(self) -> bool:
        return self._record != ("eigenvalues",)

    def _find(self, trained: nn.Module) -> nn.Module:
        try:
            return trained.get_submodule(self._network)
        except AttributeError:
            names = [name for name, _ in trained.named_children()]
            raise OptionError(
                f"network={self._network!r}: {type(trained).__name__} has no such module: "
                f"{suggest(self._network, names)}"
            ) from None

    def _keep_reference(self, network: nn.Module, step: int) -> None:
        if self._entries is None and self._needs_reference and step == self._reference:
            state = unwrap(network).state_dict()
            self._entries = {n: t.detach().cpu().clone() if isinstance(t, Tensor) else t for n, t in state.items()}

    def _numbers(self, network: nn.Module, step: int, when: str) -> dict[str, float]:
        # The network that is the reference has no barrier to itself; one step may consist of several batches.
        if step <= self._last or step == self._reference:
            return {}
        if self._entries is None and "eigenvalues" not in self._record:
            return {}
        self._last = step
        try:
            with global_rng_preserved(), _generators_preserved(self._loader), torch.enable_grad():
                own, other = self._copy(network), None
                if self._entries is not None:
                    other = self._copy(network)
                    load_entries(other, self._entries, source="the reference")
                found = network_numbers(own, other, self._loader, self._record, **self._options)
        except Exception as error:
            if self._on_error == "raise":
                raise
            warnings.warn(f"Nothing was recorded after {when}: {type(error).__name__}: {error}", stacklevel=3)
            return {}
        return {self._prefix + name: number for name, number in found.items()}

    def _check_forward(self, network: nn.Module) -> None:
        """Refuse a network that gives no outputs, unless the loss does without."""
        if isinstance(self._options["loss_fn"], BatchLoss) or not self._lacks_forward(unwrap(network)):
            return
        parts = {f"{self._network}.{name}".lstrip("."): part for name, part in network.named_children()}
        names = ", ".join(repr(name) for name, part in parts.items() if not self._lacks_forward(part))
        raise OptionError(
            f"{type(network).__name__} has no forward, so it gives no outputs: pass network= with the name of the "
            f"module that does{f' (there are {names})' if names else ''}, or loss_fn=BatchLoss(lambda module, batch: "
            "…), which computes the loss of a batch in another way."
        )

    def _lacks_forward(self, network: nn.Module) -> bool:
        forward = network.forward
        return getattr(forward, "__func__", forward) in self._without_forward

    def _copy(self, network: nn.Module) -> nn.Module:
        """A copy of the network without what the trainer has attached to it."""
        return copy.deepcopy(unwrap(network))


def _check_shared(options: Mapping[str, Any]) -> None:
    """Refuse options that measurements and predictions do not both take."""
    of_both = [inspect.signature(function).parameters for function in (measure_barrier, predict_barrier)]
    known = (of_both[0].keys() & of_both[1].keys()) - {"model_a", "model_b", "loader", "progress"}
    for name in options:
        check_choice("option", name, sorted(known))


def _check_reference(reference: Reference) -> Reference:
    if isinstance(reference, bool) or (isinstance(reference, int) and reference < 0):
        raise OptionError(f"reference={reference!r}: expected a number of steps, a file or a state dict.")
    return reference


def _check_interval(steps: int | None, epochs: int | None) -> tuple[int | None, int | None]:
    if (steps is None) == (epochs is None):
        raise OptionError(
            f"Give one of every_n_steps and every_n_epochs; {'neither' if steps is None else 'both'} was."
        )
    for name, value in {"every_n_steps": steps, "every_n_epochs": epochs}.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise OptionError(f"{name}={value!r}: expected a whole number from 1.")
    return steps, epochs


def _check_whole(network: nn.Module) -> None:
    """Refuse a network of which a process holds a part: by FSDP, tensor parallelism, or DeepSpeed's third stage."""
    if part := sharded_part(network):
        raise UnsupportedModelError(
            f"{part} is spread over several processes, and one of them alone computes here: write checkpoints of the "
            "whole network, and compare these after training."
        )


def _read(network: nn.Module, reference: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """The entries of the reference under the names that the network has for them."""
    source, contents = "the reference", reference
    if not isinstance(reference, Mapping):
        source, contents = str(reference), read_contents(Path(reference))
    entries, place = find_entries(contents, network.state_dict(), key=None, strip_prefix=None, source=source)
    # What does not fit is told of now; a training that goes on does not change what a state dict holds.
    load_entries(network, entries, source=place)
    return {name: entry.detach().clone() if isinstance(entry, Tensor) else entry for name, entry in entries.items()}


@contextlib.contextmanager
def _generators_preserved(loader: Any) -> Iterator[None]:
    """Restore the generators that a DataLoader and its samplers draw from when the block ends."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    parts = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = [getattr(part, "generator", None) for part in parts]
    states = [(each, each.get_state()) for each in found if isinstance(each, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)
