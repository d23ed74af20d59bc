"""The curvature at anchors between two networks, and the prediction that is made of it."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from lmc_curvature.averages import GroupMeans
from lmc_curvature.barrier.cube import Anchor, Cube
from lmc_curvature.barrier.evaluation import ErrorWatch
from lmc_curvature.barrier.expansions import check_anchors
from lmc_curvature.barrier.losses import loss_name
from lmc_curvature.barrier.offloading import Offload, offload_notes, offloads
from lmc_curvature.barrier.prediction import BarrierPrediction
from lmc_curvature.barrier.setup import segment_and_objective
from lmc_curvature.curvature.problem import Method
from lmc_curvature.curvature.projection import Projection, project_hessian_at
from lmc_curvature.errors import check_choice
from lmc_curvature.objective import BatchNormPolicy, LossFunction, Objective, State
from lmc_curvature.objective.extent import Extent, check_tolerance
from lmc_curvature.objective.gathering import gathering
from lmc_curvature.objective.loaders import refuse_iterator
from lmc_curvature.objective.ranks import Group
from lmc_curvature.objective.recalibration import recalibrate, running_statistics, warn_of_worse
from lmc_curvature.objective.sharding import is_spread
from lmc_curvature.objective.wrappers import unwrap
from lmc_curvature.segment import Frozen, PartitionSpec, Segment, StatesOnDemand


@torch.inference_mode(False)
def predict_barrier(
    model_a: nn.Module,
    model_b: nn.Module,
    loader: Iterable[Any],
    *,
    loss_fn: LossFunction | None = None,
    layers: PartitionSpec = "fused",
    frozen: Frozen = (),
    base: Literal["a", "b"] = "a",
    anchors: int | Sequence[float | int] = 3,
    batch_norm: BatchNormPolicy = "interpolate",
    recalibration: Iterable[Any] | None = None,
    method: Method = "auto",
    memory_gib: float | None = None,
    offload: Offload = "auto",
    max_batches: int | None = None,
    tolerance: float | int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    allow_tf32: bool = False,
    witness: bool = True,
    group: Group = None,
    timeout: float | int = 60.0,
    keep_partial: bool = True,
    progress: bool | None = None,
) -> "BarrierPrediction":
    """Predict the barrier between two networks, for all their layers and for any set of them, in one pass.

    Loss, slopes and the layer-by-layer curvature ΔᵀHΔ are computed exactly at both networks and at anchors between
    them, on the same batches; barriers follow from Taylor expansions at all of them, see `blending`, or at the two
    networks alone (Propositions 1 and 2 of Singh et al. 2024).

    Args:
        model_a: The network at α = 0; it is not modified.
        model_b: The network at α = 1; it is not modified.
        loader: Yields `(x, y)` batches, or what `loss_fn` expects; visited once.
        loss_fn: `loss_fn(output, target)` returning the mean over the batch (default: cross-entropy), or a `BatchLoss`.
        layers: The partition into L layers; see `LayerPartition.of`.
        frozen: Layers that stay at the entries of `model_a` in both networks, or of `model_b` with `base="b"`: their
            names, regular expressions for entries, or `"requires_grad"` for what does not require gradients; see
            `Segment`.
        base: The network at which they stay, `"a"` or `"b"`.
        anchors: How many points of the segment to differentiate at, evenly spaced, or their positions α, which include
            0 and 1. The work grows with their number. With the two ends alone, barriers are of second order.
        batch_norm: Policy for batch normalisation between the networks; see `BatchNormPolicy`. Under
            `"recalibrate"` the prediction differentiates through batch statistics, as under `"batch"`.
        recalibration: Under `"recalibrate"`, the loader on whose batches a measurement or a merge would re-estimate
            statistics. The prediction differentiates on `loader` alone; before it does, either network whose loss rises
            by statistics of this one is warned of, which takes a pass over each.
        method: Method to compute curvature; see `project_hessian`.
        memory_gib: Memory to compute it in, in GiB; see `project_hessian`.
        offload: Where the two networks and the states at the anchors are meanwhile: `"none"`, all on the device;
            `"cpu"`, in the host's memory, and on the device one at a time, which results say where it is not the host
            itself; `"auto"`, on the device where they take little of it, 256 MiB or a quarter of what is free. On a
            CPU, one at a time means that it is made from the two networks when its turn comes.
        max_batches: Use only this many batches; the standard errors say how far to trust the result.
        tolerance: Read only as many batches as it takes for the standard error of the whole network's barrier at
            α = 1/2 to be this small, in units of the loss; the loader should be shuffled.
        device: Device to compute on; `model_a`'s device by default.
        dtype: Floating-point type to compute in; by default `model_a`'s, float32 at least.
        allow_tf32: On a CUDA device, round convolutions to TF32; see `Objective`.
        witness: Compare derivatives with differences of the loss first; see `Objective`.
        group: Processes that share the batches, such as `"world"` under `torchrun`; see `Objective`. Networks that
            `fully_shard` has sharded go by `method="differences"` or `"losses"`, all their ranks on the same batches.
        timeout: Seconds that they wait for a sign of life of each other.
        keep_partial: Interrupted by Ctrl-C, or by an error of the loader's own, return what the batches before came to,
            `partial`, with a warning; False raises the error.
        progress: Show a progress bar over batches; by default on a terminal and in notebooks.

    Raises:
        LMCCurvatureError: The networks, the loader or an option are not what they should be; the subclasses of
            `lmc_curvature.errors` tell which.
    """
    positions = check_anchors(anchors)
    check_tolerance(tolerance)
    check_choice("offload", offload, get_args(Offload))
    with gathering(model_a, model_b, method=method, group=group) as (model_a, model_b):
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
            witness=witness,
            group=group,
            timeout=timeout,
            places=False,
        )
        if recalibration is not None:
            ends = {
                "model_a": (model_a, objective.place(segment.start)),
                "model_b": (model_b, objective.place(segment.end)),
            }
            warn_of_statistics(objective, ends, progress=progress)
            del ends
        return predict_on_segment(
            objective,
            segment,
            anchors=positions,
            method=method,
            memory_gib=memory_gib,
            offload=offload,
            tolerance=tolerance,
            # Ranks that compute together do not end in the same place.
            keep_partial=keep_partial and not is_spread(segment.start),
            progress=progress,
        )


def warn_of_statistics(
    objective: Objective, networks: Mapping[str, tuple[nn.Module, State]], *, progress: bool | None
) -> None:
    """Warn of statistics that make the loss of a network larger than its own do, at the line of the caller's caller.

    Args:
        objective: The loss, under `"recalibrate"`.
        networks: Networks with their states, by what they are called.
        progress: Show progress bars over batches.

    Raises:
        LoaderError: The loader can be visited only once.
    """
    refuse_iterator(objective.loader, "recalibration=… visits the loader twice")
    own = {name: objective.place(running_statistics(unwrap(model))) for name, (model, _) in networks.items()}
    states = [{**state, **own[name]} for name, (_, state) in networks.items()]
    _, found = recalibrate(objective, states, progress=progress)
    for recalibration, name in zip(found, networks, strict=True):
        # Between here and the user are predict_barrier and torch's wrapper around it.
        warn_of_worse(recalibration, name, stacklevel=4)


def predict_on_segment(
    objective: Objective,
    segment: Segment,
    *,
    anchors: int | Sequence[float | int] | Float[np.ndarray, " anchors"] = 3,
    method: Method = "auto",
    memory_gib: float | None = None,
    offload: Offload = "auto",
    tolerance: float | int | None = None,
    keep_partial: bool = False,
    progress: bool | None = None,
) -> "BarrierPrediction":
    """Predict the barrier along a segment, as `predict_barrier` does for two networks.

    Several segments with one objective share what it keeps about its network, such as the graph of its operations.

    Args:
        objective: The loss, of a network of the segment's architecture and under its policy.
        segment: The segment between the two networks.
        anchors: How many points to differentiate at, or their positions; see `predict_barrier`.
        method: Method to compute curvature; see `project_hessian`.
        memory_gib: Memory to compute it in, in GiB; see `project_hessian`.
        offload: Where the states at the anchors are; see `predict_barrier`.
        tolerance: Standard error to read as many batches for as it takes; see `predict_barrier`.
        keep_partial: Return what the batches before an interruption came to; see `predict_barrier`.
        progress: Show a progress bar over batches; by default on a terminal and in notebooks.
    """
    positions = check_anchors(anchors)
    offloaded = offloads(offload, objective, segment, len(positions))
    segment = segment.to("cpu" if offloaded else objective.device, objective.dtype)
    ends = {0.0: "model_a", 1.0: "model_b"}
    states: Mapping[str, State] = StatesOnDemand(
        {
            ends.get(alpha, f"alpha={alpha}"): functools.partial(_placed_point, objective, segment, alpha)
            for alpha in positions.tolist()
        }
    )
    if not offloaded:
        states = dict(states)
    groups: list[GroupMeans] = []

    def estimate() -> tuple[float, float]:
        merged = objective.ranks.merge(groups)
        anchors = tuple(Anchor(alpha, Projection.of(merged, number)) for number, alpha in enumerate(positions.tolist()))
        return Cube(segment.layers, anchors).midpoint()

    extent = Extent(estimate, tolerance, keep_partial=keep_partial)
    projections = project_hessian_at(
        objective,
        states,
        segment.directions(),
        method=method,
        memory_gib=memory_gib,
        watch=(watch := ErrorWatch(objective, states)),
        groups=groups,
        extent=extent,
        held=not offloaded,
        progress=progress,
    )
    notes = offload_notes(objective.device) if offloaded else ()
    return prediction_of(objective, segment, positions, projections, watch.errors(), method, extent, notes)


def _placed_point(objective: Objective, segment: Segment, alpha: float) -> State:
    return objective.place(segment.point(alpha))


def prediction_of(
    objective: Objective,
    segment: Segment,
    positions: Float[np.ndarray, " anchors"],
    projections: Sequence[Projection],
    errors: Float[np.ndarray, " anchors"] | None,
    method: Method,
    extent: Extent | None = None,
    notes: tuple[str, ...] = (),
) -> "BarrierPrediction":
    """The prediction that what is known at the anchors of a segment makes.

    Args:
        objective: The loss.
        segment: The segment.
        positions: Positions of the anchors.
        projections: Loss, slopes and curvature along the layers' directions at each.
        errors: Share of the examples that is classified wrongly at each; None where that is not known.
        method: The method that they are known by.
        extent: How far the pass went, if it may have been interrupted.
        notes: Further sentences that belong beside the numbers.
    """
    named = {name for name, _ in objective.network.named_parameters()}
    moved = [[name for name in entries if name in named] for entries in segment.partition.groups.values()]
    return BarrierPrediction(
        segment.layers,
        tuple(Anchor(*pair) for pair in zip(positions.tolist(), projections, strict=True)),
        segment.distances(),
        objective.batch_norm,
        objective.notes + segment.notes + (extent.notes if extent else ()) + notes + _method_notes(projections, method),
        np.array([sum(segment.start[name].numel() for name in names) for names in moved]),
        errors,
        _cosine([name for names in moved for name in names], segment),
        segment.whole.groups,
        segment.base,
        segment.norms(),
        loss_name(objective.loss_fn),
        objective.loss_fn,
        extent.interruption if extent else None,
    )


def _method_notes(projections: Sequence[Projection], method: Method) -> tuple[str, ...]:
    errors = [each.difference_error for each in projections if each.difference_error is not None]
    how = (
        "slopes and curvature by differences of losses"
        if method == "losses"
        else "curvature by differences of gradients"
    )
    return (f"{how}, off by about {max(errors):.1g} of its largest",) if errors else ()


def _cosine(moved: Iterable[str], segment: Segment) -> float | None:
    """Cosine of the angle between two networks' weights, those of matrices and kernels."""
    pairs = [(segment.start[name], segment.end[name]) for name in moved]
    pairs = [pair for pair, name in zip(pairs, moved, strict=True) if segment.start[name].ndim > 1]
    products = [[float((a.double() * b.double()).sum()) for a, b in ((a, b), (a, a), (b, b))] for a, b in pairs]
    if not products:
        return None
    dot, first, second = np.sum(products, axis=0)
    return float(dot / np.sqrt(first * second)) if first * second > 0 else None
