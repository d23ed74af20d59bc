"""The segment between two networks and the loss on it: what a prediction and a measurement have in common."""

import warnings
from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from lmc_curvature.objective import BatchNormPolicy, Objective
from lmc_curvature.segment import Frozen, PartitionSpec, Segment
from lmc_curvature.segment.segment import EQUAL


def segment_and_objective(
    model_a: nn.Module,
    model_b: nn.Module,
    loader: Iterable[Any],
    *,
    layers: PartitionSpec,
    batch_norm: BatchNormPolicy,
    frozen: Frozen,
    base: Literal["a", "b"],
    **options: Any,
) -> tuple[Segment, Objective]:
    """Return the segment between two networks, and the loss along it, which checks that both are one architecture.

    Two networks that are equal are warned of, at the line that called the caller's caller.

    Args:
        model_a: The network at α = 0.
        model_b: The network at α = 1.
        loader: The loader.
        layers: The partition into layers.
        batch_norm: Policy for batch normalisation between the networks.
        frozen: What stays at the entries of one of them; see `Segment`.
        base: Which one, `"a"` or `"b"`.
        **options: Further options of the `Objective`.
    """
    segment = Segment(model_a, model_b, layers=layers, batch_norm=batch_norm, frozen=frozen, base=base)
    objective = Objective(model_a, loader, batch_norm=batch_norm, twins=[model_b], **options)
    if segment.is_point:
        # Between here and the user are predict_barrier or measure_barrier, and torch's wrapper around it.
        warnings.warn(f"{EQUAL}, so there is no barrier: is the same file given twice?", stacklevel=4)
    return segment.to(objective.device, objective.dtype), objective
