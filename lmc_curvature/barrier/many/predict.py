"""The barriers among several networks, predicted in one pass over the data."""

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import nn

from lmc_curvature.barrier.expansions import check_anchors
from lmc_curvature.barrier.many.lines import pair_lines, predict_on_lines, spoke_lines
from lmc_curvature.barrier.many.prediction import BarriersPrediction
from lmc_curvature.barrier.predict import warn_of_statistics
from lmc_curvature.barrier.setup import hull_and_objective
from lmc_curvature.curvature.problem import Method
from lmc_curvature.objective import BatchNormPolicy, LossFunction
from lmc_curvature.objective.ranks import Group
from lmc_curvature.segment import Frozen, PartitionSpec
from lmc_curvature.segment.hull import Weights, network_names, network_weights


@torch.inference_mode(False)
def predict_barriers(
    models: Iterable[nn.Module],
    loader: Iterable[Any],
    *,
    names: Iterable[str] | None = None,
    weights: Weights | None = None,
    loss_fn: LossFunction | None = None,
    layers: PartitionSpec = "fused",
    frozen: Frozen = (),
    base: str | None = None,
    anchors: int | Sequence[float | int] = 3,
    batch_norm: BatchNormPolicy = "interpolate",
    recalibration: Iterable[Any] | None = None,
    method: Method = "auto",
    memory_gib: float | None = None,
    max_batches: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    allow_tf32: bool = False,
    witness: bool = True,
    group: Group = None,
    timeout: float | int = 60.0,
    progress: bool | None = None,
) -> BarriersPrediction:
    """Predict the barriers among several networks: of all pairs, of their mean, and of the means of subsets.

    Every pair is predicted as `predict_barrier` does. The mean of all networks is differentiated, too, and so is the
    mean of all but each: their losses are then known, and barriers of sets of layers towards the mean follow from
    Taylor expansions on the lines through it. All on the same batches, in one pass: each of N networks is
    differentiated once a batch, along the directions to all others, so the work grows with N².

    Args:
        models: The networks, two or more, of one architecture; they are not modified.
        loader: Yields `(x, y)` batches, or what `loss_fn` expects; visited once.
        names: A name for each network; by default model_a, model_b, ….
        weights: What each counts for in the mean, positive numbers that sum to one, in the order of the networks or by
            their names; equal by default. In the mean of a subset they count in proportion.
        loss_fn: `loss_fn(output, target)` returning the mean over the batch (default: cross-entropy), or a `BatchLoss`.
        layers: The partition into L layers; see `LayerPartition.of`.
        frozen: Layers that stay at the entries of one network in all of them: their names, regular expressions for
            entries, or `"requires_grad"` for what does not require gradients; see `Segment`.
        base: The name of that network; by default the first.
        anchors: How many points between each two networks to differentiate at, both included, or their positions; see
            `predict_barrier`. Where the mean of two networks is none of them, it is predicted.
        batch_norm: Policy for batch normalisation between the networks; see `BatchNormPolicy`.
        recalibration: Under `"recalibrate"`, the loader on whose batches a measurement or a merge would re-estimate
            statistics; see `predict_barrier`.
        method: Method to compute curvature; see `project_hessian`.
        memory_gib: Memory to compute it in, in GiB; see `project_hessian`. Beside it there are as many directions,
            each as large as the network, as there are pairs and networks.
        max_batches: Use only this many batches; the standard errors say how far to trust the result.
        device: Device to compute on; the first network's device by default.
        dtype: Floating-point type to compute in; by default the first network's, float32 at least.
        allow_tf32: On a CUDA device, round convolutions to TF32; see `Objective`.
        witness: Compare derivatives with differences of the loss first; see `Objective`.
        group: Processes that share the batches, such as `"world"` under `torchrun`; see `Objective`.
        timeout: Seconds that they wait for a sign of life of each other.
        progress: Show a progress bar over batches; by default on a terminal and in notebooks.

    Raises:
        LMCCurvatureError: The networks, the loader or an option are not what they should be; the subclasses of
            `lmc_curvature.errors` tell which.
    """
    positions, networks = check_anchors(anchors), list(models)
    labels = network_names(len(networks), names)
    shares = network_weights(weights, labels)
    hull, objective = hull_and_objective(
        networks,
        labels,
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
        witness=witness,
        group=group,
        timeout=timeout,
    )
    if recalibration is not None:
        own = dict(zip(labels, zip(networks, hull.states, strict=True), strict=True))
        warn_of_statistics(objective, own, progress=progress)
    lines = [*pair_lines(labels, positions), *spoke_lines(labels, shares)]
    found = predict_on_lines(objective, hull, lines, method=method, memory_gib=memory_gib, progress=progress)
    pairs = dict(zip(combinations(labels, 2), found, strict=False))
    return BarriersPrediction(labels, shares, pairs, dict(zip(labels, found[len(pairs) :], strict=True)))
