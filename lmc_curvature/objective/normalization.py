"""Batch normalisation between two networks: its policies, and its statistics re-estimated from data.

A normalisation module that tracks running statistics is a different function under each policy:

- `"interpolate"`: it normalises by its running statistics, which are part of the state and move with their
  layer. torch's `batch_norm` has no derivative in them, so the affine map is written out here.
- `"batch"`: it normalises by the statistics of the batch at hand, without updating the running ones.
- `"recalibrate"`: as `"interpolate"`, with statistics re-estimated over the loader at every point.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.overrides import TorchFunctionMode

from lmc_curvature.errors import LoaderError, UnsupportedModelError
from lmc_curvature.objective.batches import Batch

BatchNormPolicy = Literal["interpolate", "batch", "recalibrate"]
POLICIES: tuple[str, ...] = get_args(BatchNormPolicy)

Statistics = Literal["running", "batch"]


def tracked_modules(model: nn.Module) -> Iterator[tuple[str, _NormBase]]:
    """Yield (name, module) for every batch or instance normalisation that tracks running statistics."""
    for name, module in model.named_modules():
        if isinstance(module, _NormBase) and module.running_mean is not None:
            yield name, module


def normalizes_by_batch(model: nn.Module, statistics: Statistics) -> bool:
    """Tell if a network normalises by the examples of a batch together, so that its loss depends on their cut."""
    modules = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return any(statistics == "batch" or module.running_mean is None for module in modules)


def statistic_names(module_name: str) -> tuple[str, str]:
    """Entry names of the running mean and variance of the module called `module_name`."""
    prefix = f"{module_name}." if module_name else ""
    return f"{prefix}running_mean", f"{prefix}running_var"


def is_batch_counter(entry: str) -> bool:
    """Tell a counter of the batches that a normalisation saw, the training's bookkeeping, from other entries."""
    return entry.rpartition(".")[2] == "num_batches_tracked"


Records = dict[str, list[tuple[int, Tensor]]]
"""Entry name to the means, or the unbiased variances, of a module's input channels, one for each of its calls.

Each comes with the number of the input's rows: the examples of a batch, the nodes of its graphs, …
"""


class Normalization:
    """Decides, for all normalisation modules of one network at once, which statistics they use.

    Args:
        network: Its modules with running statistics ask here, from now on.
        statistics: What they use: their running statistics, or those of the batch at hand.

    Attributes:
        statistics: What they use at the moment; see `by`.
        records: Where they add the statistics of the batch, if anywhere.
        left_out: Modules whose statistics were to be re-estimated, from data that did not reach them.
    """

    def __init__(self, network: nn.Module, statistics: Statistics = "running"):
        self.statistics: Statistics = statistics
        self.records: Records | None = None
        self.left_out: frozenset[str] = frozenset()
        self._names = frozenset(name for name, _ in tracked_modules(network))
        for name, module in tracked_modules(network):
            # The instance's own forward stays in charge (subclasses add activations, say); only the
            # functional call inside it is redirected, and only there, so other modules pay nothing.
            # Partial, so that a deep copy of all calls its own modules.
            module.forward = functools.partial(self._forward, module, module.forward, name)

    @contextlib.contextmanager
    def by(self, statistics: Statistics, records: Records | None = None) -> Iterator[None]:
        """Within the block, modules use these statistics.

        Args:
            statistics: Their running statistics, or those of the batch at hand.
            records: Modules that use those of the batch add them here.
        """
        before = self.statistics, self.records
        self.statistics, self.records = statistics, records
        try:
            yield
        finally:
            self.statistics, self.records = before

    def mean_statistics(
        self,
        states: Sequence[Mapping[str, Tensor]],
        batches: Iterable[Batch],
        evaluate: Callable[[Any, Batch], Any],
        gather: Callable[[Any], list[Any]] = lambda found: [found],
    ) -> list[dict[str, Tensor]]:
        """Running statistics at each state: means over all examples that a module has seen, in float64.

        They do not depend on what an example weighs in the loss.

        Args:
            states: The states; they are asked for anew with every batch.
            batches: Each is evaluated at every state.
            evaluate: Evaluates the network at a state on a batch.
            gather: Brings together what all ranks have found.

        Returns:
            For each state, entry name to statistic.
        """
        # Of each statistic the sum over examples, and behind it their number.
        totals: list[dict[str, Tensor]] = [{} for _ in range(len(states))]
        for batch in batches:
            for number, total in enumerate(totals):
                records: Records = {}
                with self.by("batch", records):
                    evaluate(states[number], batch)
                for entry, calls in records.items():
                    # A module called often counts by the mean of its calls.
                    lengths, values = zip(*calls, strict=True)
                    counted = [n * torch.cat([v.double(), v.new_ones(1)]) for n, v in zip(lengths, values, strict=True)]
                    total[entry] = total.get(entry, 0) + torch.stack(counted).mean(0)
        first, *others = gather(totals)
        for more in others:
            for total, found in zip(first, more, strict=True):
                total.update({entry: total.get(entry, 0) + value for entry, value in found.items()})
        self.left_out = frozenset(n for n in self._names if any(statistic_names(n)[0] not in total for total in first))
        return [{entry: value[:-1] / value[-1] for entry, value in total.items()} for total in first]

    def warn_of_batch_statistics(self, loss: Callable[[], Float[Tensor, ""]]) -> None:
        """Warn if the statistics of a batch make its loss far larger than the running ones do.

        Far is by more than 0.5 and by more than the loss itself. Statistics that merely lack the training's
        augmentation, or are of some twenty mixed examples, stay below.

        Args:
            loss: Evaluates the network on the batch.
        """
        values: dict[Statistics, float] = {}
        with torch.no_grad():
            for statistics in ("running", "batch"):
                with self.by(statistics):
                    values[statistics] = loss().item()
        running, by_batch = values["running"], values["batch"]
        if by_batch - running > max(0.5, abs(running)):
            warnings.warn(
                f"By batch statistics the loss of the first batch is {by_batch:.3g}, by the network's running "
                f"statistics {running:.3g}: the batch is too small, or not like the data that the network was trained "
                "on, for example of one class. Shuffle the data once, take larger batches, or choose "
                "batch_norm='interpolate'.",
                stacklevel=2,
            )

    def names_of_running(
        self, entries: Mapping[str, Tensor], differs: Callable[[Mapping[str, Tensor]], bool]
    ) -> list[str]:
        """Names of modules that normalise by running statistics whatever they are told.

        Such are those that a network folds into its weights, whose function it calls itself, or that are of a class of
        their own.

        Args:
            entries: All entries of the network.
            differs: Whether the loss is another one with other entries in the place of some.
        """
        owners: dict[str, dict[str, Tensor]] = {}
        for name, tensor in entries.items():
            owner, _, last = name.rpartition(".")
            if last.startswith("running_") and tensor.is_floating_point():
                owners.setdefault(owner, {})[name] = 1.5 * tensor + 0.25
        # Of most networks there is none.
        if not owners or not differs({name: other for each in owners.values() for name, other in each.items()}):
            return []
        return [owner for owner, others in owners.items() if differs(others)]

    def _forward(self, module: nn.Module, forward: Callable[..., Any], name: str, /, *args: Any, **kwargs: Any) -> Any:
        if self.statistics == "running" and name in self.left_out:
            self.left_out -= {name}
            warnings.warn(
                f"The data to re-estimate statistics on never reach the normalisation {name!r}, and other data do: its "
                "statistics stay as they were. Pass as recalibration=… a loader of all kinds of data.",
                stacklevel=2,
            )
        with _Redirection(self, name, module.training) as redirection:
            found = forward(*args, **kwargs)
        if self.statistics == "batch" and not redirection.used:
            raise UnsupportedModelError(
                f"Module {name!r} normalises by code of its own, not by torch.nn.functional.batch_norm, so "
                "batch statistics cannot be put into it: choose batch_norm='interpolate'."
            )
        return found


class _Redirection(TorchFunctionMode):
    """Replaces torch's functional normalisation by one with the statistics that its `Normalization` names."""

    def __init__(self, normalization: Normalization, module_name: str, training: bool):
        super().__init__()
        self._training = training
        self._normalization = normalization
        self._module_name = module_name
        self.used = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.batch_norm, F.instance_norm):
            self.used = True
            return self._normalize(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _normalize(
        self,
        function: Callable[..., Tensor],
        input: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        by_batch: bool | None = None,
        _momentum: float = 0.1,
        eps: float = 1e-5,
        **by_name: Any,
    ) -> Tensor:
        if by_batch is None:
            by_batch = by_name.get("use_input_stats", by_name.get("training", function is F.instance_norm))
        # A module that asks for the batch's statistics in evaluation mode, too, is another function without them.
        running = self._normalization.statistics == "running" and (self._training or not by_batch)
        if running and running_mean is not None and running_var is not None:
            differentiates = torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
            if not differentiates and input.dtype == running_var.dtype in (torch.float32, torch.float64):
                # Torch's own takes a third of the time; not all of its derivatives can be trusted.
                return function(input, running_mean, running_var, weight, bias, False, eps=eps)
            return normalize_by(input, running_mean, running_var, weight, bias, eps)
        if function is F.batch_norm and input.numel() == input.shape[1]:
            raise LoaderError(
                f"Module {self._module_name!r} has one value a channel (input of shape {tuple(input.shape)}), and no "
                "variance: batch statistics need batches of at least two examples. Use drop_last=True, another batch "
                "size, or batch_norm='interpolate'."
            )
        records = self._normalization.records
        if records is not None:
            # Instance normalisation has statistics of every example; their means are what it keeps.
            examples = [0] if function is F.batch_norm else []
            found = torch.var_mean(input, dim=[*examples, *range(2, input.ndim)])
            for entry, statistic in zip(reversed(statistic_names(self._module_name)), found, strict=True):
                records.setdefault(entry, []).append((len(input), statistic.reshape(-1, input.shape[1]).mean(0)))
        return function(input, None, None, weight, bias, True, eps=eps)


def normalize_by(
    input: Float[Tensor, "batch channels *positions"],
    mean: Float[Tensor, " channels"],
    variance: Float[Tensor, " channels"],
    weight: Float[Tensor, " channels"] | None,
    bias: Float[Tensor, " channels"] | None,
    eps: float,
) -> Float[Tensor, "batch channels *positions"]:
    """Normalise by given statistics, differentiably in all of them (Ioffe & Szegedy 2015, Algorithm 2).

    Mean, variance, weight and bias are folded into a scale and a shift per channel first, which takes one pass over
    the input, or two where it is differentiated.
    """
    scale = torch.rsqrt(variance + eps)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias
    shape = (1, -1) + (1,) * (input.ndim - 2)
    scale, shift = scale.view(shape), shift.view(shape)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (input, scale, shift)):
        # A product and a sum, whose derivatives take fewer passes than those of both in one.
        return (input * scale).add_(shift)
    return torch.addcmul(shift, input, scale)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """The function of torch with derivatives in the running statistics; NotImplemented where it does not use them."""
    if training or running_mean is None or running_var is None:
        return NotImplemented
    return normalize_by(input, running_mean, running_var, weight, bias, eps)
