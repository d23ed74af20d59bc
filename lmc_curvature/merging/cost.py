"""What a prediction will cost, measured on its first batch."""

import contextlib
import itertools
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lmc_curvature.barrier.expansions import check_anchors
from lmc_curvature.barrier.predict import predict_on_segment
from lmc_curvature.barrier.setup import segment_and_objective
from lmc_curvature.curvature.problem import Method
from lmc_curvature.errors import LoaderError, counted
from lmc_curvature.objective import BatchNormPolicy
from lmc_curvature.objective.loaders import check_loader, loader_length
from lmc_curvature.objective.randomness import global_rng_preserved
from lmc_curvature.segment import Frozen, PartitionSpec


@dataclass(frozen=True)
class PredictionCost:
    """What a prediction will cost, from what the first batch has cost.

    Attributes:
        batches: How many batches the loader yields; None if it does not say.
        anchors: How many points of the segment are differentiated at.
        first: Seconds for the first batch, in which the network is captured and checked.
        further: Seconds for every further one.
        memory_gib: Most memory in use so far, of the device or else of the process, in GiB.
    """

    batches: int | None
    anchors: int
    first: float
    further: float
    memory_gib: float

    @property
    def seconds(self) -> float | None:
        """Seconds for all batches; None if it is not known how many there are."""
        return None if self.batches is None else self.first + (self.batches - 1) * self.further

    def __str__(self) -> str:
        costs = f"{self.first:.2g} s for the first batch, {self.further:.2g} s for each further one"
        total = "" if self.seconds is None else f", {_duration(self.seconds)} for {counted(self.batches or 0, 'batch')}"
        return f"A prediction with {self.anchors} anchors takes about {costs}{total}, and {self.memory_gib:.2g} GiB"


def _duration(seconds: float) -> str:
    unit, size = ("s", 1) if seconds < 100 else ("min", 60) if seconds < 6000 else ("h", 3600)
    return f"{seconds / size:.2g} {unit}"


def estimate_prediction(
    model_a: nn.Module,
    model_b: nn.Module,
    loader: Iterable[Any],
    *,
    anchors: int | Sequence[float] = 3,
    layers: PartitionSpec = "fused",
    batch_norm: BatchNormPolicy = "interpolate",
    frozen: Frozen = (),
    base: Literal["a", "b"] = "a",
    max_batches: int | None = None,
    method: Method = "auto",
    memory_gib: float | None = None,
    **options: Any,
) -> PredictionCost:
    """Predict the barrier on the first batch alone, twice, and say what `predict_barrier` will cost on all of them.

    What it would refuse is refused here, too.

    Args:
        model_a: The network at α = 0.
        model_b: The network at α = 1.
        loader: The loader; its first batch is taken.
        anchors: See `predict_barrier`, as for all further options.
        layers: The partition into layers.
        batch_norm: Policy for batch normalisation.
        frozen: Layers that stay.
        base: Where they stay.
        max_batches: Use only this many batches.
        method: Method to compute curvature.
        memory_gib: Memory to compute it in.
        **options: Further options of the objective.

    Raises:
        LMCCurvatureError: What `predict_barrier` raises.
    """
    check_loader(loader, max_batches)
    # An iterator says how many are left.
    batches = loader_length(loader, max_batches)
    with global_rng_preserved():
        batch = list(itertools.islice(loader, 1))
    if not batch:
        raise LoaderError("The loader yields no batches.")
    segment, objective = segment_and_objective(
        model_a, model_b, batch, layers=layers, batch_norm=batch_norm, frozen=frozen, base=base, **options
    )
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        predict_on_segment(objective, segment, anchors=anchors, method=method, memory_gib=memory_gib, progress=False)
        seconds.append(time.perf_counter() - start)
    count = len(check_anchors(anchors))
    return PredictionCost(batches, count, seconds[0], seconds[1], _peak_gib(objective.device))


def _peak_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    with contextlib.suppress(ImportError):
        import resource

        # In KiB on Linux, in bytes on macOS.
        unit = 1 if os.uname().sysname == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    import psutil

    return psutil.Process().memory_info().rss / 2**30
