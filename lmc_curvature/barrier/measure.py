"""The measurement of the barrier between two networks, by evaluating the networks in between."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from lmc_curvature.barrier.evaluation import chord, evaluate_points
from lmc_curvature.barrier.losses import loss_name
from lmc_curvature.barrier.measurement import BarrierMeasurement
from lmc_curvature.barrier.metrics import METRICS, Metric, check_metrics
from lmc_curvature.barrier.requests import Sets, positions_of, refuse_former_options, resolve_sets
from lmc_curvature.barrier.setup import segment_and_objective
from lmc_curvature.objective import BatchNormPolicy, LossFunction
from lmc_curvature.objective.extent import check_tolerance
from lmc_curvature.objective.ranks import Group
from lmc_curvature.objective.recalibration import running_statistics
from lmc_curvature.objective.wrappers import unwrap
from lmc_curvature.segment import Frozen, PartitionSpec, SegmentPoints, check_points
from lmc_curvature.segment.frozen import frozen_choices


@torch.inference_mode(False)
def measure_barrier(
    model_a: nn.Module,
    model_b: nn.Module,
    loader: Iterable[Any],
    *,
    loss_fn: LossFunction | None = None,
    layers: PartitionSpec = "fused",
    frozen: Frozen = (),
    base: Literal["a", "b"] = "a",
    sets: Sets = (),
    points: Sequence[Mapping[str, float | int]] = (),
    alphas: int | np.integer | Sequence[float] | np.ndarray = 11,
    batch_norm: BatchNormPolicy = "interpolate",
    recalibration: Iterable[Any] | None = None,
    metrics: Sequence[Metric] = METRICS,
    max_batches: int | None = None,
    tolerance: float | int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    allow_tf32: bool = False,
    group: Group = None,
    timeout: float | int = 60.0,
    keep_partial: bool = True,
    progress: bool | None = None,
    partition: None = None,
) -> BarrierMeasurement:
    """Measure the barrier between two networks, for the whole network and for sets of layers.

    For a set S of layers, moved from either end while the others stay (Adilova et al. 2023 for one layer),

        B_S(α) = (1−α) L(θ₁ + α P_S Δ) + α L(θ₂ − (1−α) P_S Δ) − [(1−α) L(θ₁) + α L(θ₂)]

    which for all layers is the barrier curve of linear mode connectivity (Frankle et al. 2020). The loader is visited
    once, all points on the same batch; `"recalibrate"` visits it once before, to re-estimate statistics.

    Args:
        model_a: The network at α = 0; it is not modified.
        model_b: The network at α = 1; it is not modified.
        loader: Yields `(x, y)` batches, or what `loss_fn` expects.
        loss_fn: `loss_fn(output, target)` returning the mean over the batch (default: cross-entropy), or a `BatchLoss`.
        layers: The partition into layers; see `LayerPartition.of`.
        frozen: Layers that stay at the entries of `model_a` in both networks, or of `model_b` with `base="b"`: their
            names, regular expressions for entries, or `"requires_grad"` for what does not require gradients; see
            `Segment`.
        base: The network at which they stay, `"a"` or `"b"`.
        sets: Sets of layers to measure besides the whole network: `"each"` layer of the partition alone, or a list of
            sets of layer names.
        points: Points of the cube of layers to measure besides, θ(x) = θ₁ + Σ_ℓ x_ℓ Δ_ℓ: every layer's x_ℓ in [0, 1].
        alphas: Positions in [0, 1], or how many to space evenly from 0 to 1.
        batch_norm: Policy for batch normalisation between the networks; see `BatchNormPolicy`.
        recalibration: Under `"recalibrate"`, the loader on whose batches statistics are re-estimated, by default
            `loader`. They should be those that the networks were trained on, augmentation included: if the loss of
            either network rises, that is warned of.
        metrics: `"loss"`, and `"error"` (the share of examples, or of positions that are not ignored, whose largest
            output is not the target's class; for one column with binary cross-entropy, whose sign is wrong).
        max_batches: Use only this many batches.
        tolerance: Read only as many batches as it takes for the standard error of the whole network's curve at the
            position nearest to α = 1/2 to be this small, in units of the first metric; the loader should be shuffled.
        device: Device to compute on; `model_a`'s device by default.
        dtype: Floating-point type to compute in; by default `model_a`'s, float32 at least.
        allow_tf32: On a CUDA device, round convolutions to TF32; see `Objective`.
        group: Processes that share the batches, such as `"world"` under `torchrun`; see `Objective`.
        timeout: Seconds that they wait for a sign of life of each other.
        keep_partial: Interrupted by Ctrl-C, or by an error of the loader's own, return what the batches before came to,
            `partial`, with a warning; False raises the error.
        progress: Show a progress bar over batches; by default on a terminal and in notebooks.
        partition: The former name of `layers`, which is refused.

    Raises:
        LMCCurvatureError: The networks, the loader or an option are not what they should be; the subclasses of
            `lmc_curvature.errors` tell which.
    """
    check_tolerance(tolerance)
    refuse_former_options(layers, partition)
    positions = positions_of(alphas)
    check_metrics(metrics, loss_fn)
    segment, objective = segment_and_objective(
        model_a,
        model_b,
        loader,
        layers=layers,
        batch_norm=batch_norm,
        frozen=frozen,
        base=base,
        loss_fn=loss_fn,
        recalibration=recalibration,
        max_batches=max_batches,
        device=device,
        dtype=dtype,
        allow_tf32=allow_tf32,
        group=group,
        timeout=timeout,
    )
    members_of_sets, places = resolve_sets(segment.partition.groups, sets), check_points(segment.layers, points)
    states = SegmentPoints(segment)
    curves = (segment.layers, *members_of_sets)
    pairs = np.array([[states.pair(members, alpha) for alpha in positions] for members in curves])
    numbers = [states.at(list(place.values())) for place in places]
    # What is frozen makes other networks of the ends, to which their statistics do not belong.
    own = [] if frozen_choices(frozen) else [running_statistics(unwrap(model)) for model in (model_a, model_b)]
    middle = int(np.abs(positions - 0.5).argmin())

    def curve_at_middle(values: Float[np.ndarray, "batches points"]) -> Float[np.ndarray, " batches"]:
        """The barrier of every batch at the position that is nearest to 1/2."""
        place, ends = values[:, pairs[0, middle, 0]], values[:, [states.START, states.END]]
        return place - chord(positions[middle : middle + 1], ends[:, :1], ends[:, 1:])[:, 0]

    sizes, weights, values, extent = evaluate_points(
        objective,
        states,
        metrics,
        own_statistics=[objective.place(each) for each in own],
        of_interest=curve_at_middle,
        tolerance=tolerance,
        keep_partial=keep_partial,
        progress=progress,
    )
    ends, sides = values[:, :, [states.START, states.END]], values[:, :, pairs]
    return BarrierMeasurement(
        positions,
        members_of_sets,
        tuple(metrics),
        batch_norm,
        sizes,
        ends,
        chord(positions, sides[..., 0], sides[..., 1]),
        objective.notes + segment.notes + extent.notes,
        batch_weights=weights,
        batch_sides=sides[:, :, 1:],
        points=places,
        batch_points=values[:, :, numbers],
        loss=loss_name(objective.loss_fn),
        interruption=extent.interruption,
    )
