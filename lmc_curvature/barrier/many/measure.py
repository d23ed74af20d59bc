"""The barriers among several networks, measured in one pass over the data."""

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import nn

from lmc_curvature.barrier.evaluation import evaluate_points
from lmc_curvature.barrier.losses import loss_name
from lmc_curvature.barrier.many.measurement import BarriersMeasurement
from lmc_curvature.barrier.many.subsets import Members, shares
from lmc_curvature.barrier.metrics import METRICS, Metric, check_metrics
from lmc_curvature.barrier.requests import Sets, positions_of, resolve_sets
from lmc_curvature.barrier.setup import hull_and_objective
from lmc_curvature.errors import OptionError
from lmc_curvature.objective import BatchNormPolicy, LossFunction
from lmc_curvature.objective.ranks import Group
from lmc_curvature.objective.recalibration import running_statistics
from lmc_curvature.objective.wrappers import unwrap
from lmc_curvature.segment import Frozen, HullPoints, PartitionSpec
from lmc_curvature.segment.hull import Weights, network_indices, network_names, network_weights


@torch.inference_mode(False)
def measure_barriers(
    models: Iterable[nn.Module],
    loader: Iterable[Any],
    *,
    names: Iterable[str] | None = None,
    weights: Weights | None = None,
    loss_fn: LossFunction | None = None,
    layers: PartitionSpec = "fused",
    frozen: Frozen = (),
    base: str | None = None,
    sets: Sets = (),
    subsets: Sequence[Iterable[str]] = (),
    alphas: int | np.integer | Sequence[float] | np.ndarray = 5,
    batch_norm: BatchNormPolicy = "interpolate",
    recalibration: Iterable[Any] | None = None,
    metrics: Sequence[Metric] = METRICS,
    max_batches: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    allow_tf32: bool = False,
    group: Group = None,
    timeout: float | int = 60.0,
    progress: bool | None = None,
) -> BarriersMeasurement:
    """Measure the barriers among several networks: of all pairs, of their mean, and of the means of some subsets.

    Every pair is measured as `measure_barrier` does. The mean of all networks is θ̄ = Σ_k w_k θ_k, and the barrier of a
    set S of layers between the networks and their mean

        B_S = Σ_k w_k L(θ_k with S at θ̄) − Σ_k w_k L(θ_k)

    Each state is evaluated once a batch, all on the same batches; `"recalibrate"` visits the loader once before.

    Args:
        models: The networks, two or more, of one architecture; they are not modified.
        loader: Yields `(x, y)` batches, or what `loss_fn` expects.
        names: A name for each network; by default model_a, model_b, ….
        weights: What each counts for in the mean, positive numbers that sum to one, in the order of the networks or by
            their names; equal by default. In the mean of a subset they count in proportion.
        loss_fn: `loss_fn(output, target)` returning the mean over the batch (default: cross-entropy), or a `BatchLoss`.
        layers: The partition into layers; see `LayerPartition.of`.
        frozen: Layers that stay at the entries of one network in all of them: their names, regular expressions for
            entries, or `"requires_grad"` for what does not require gradients; see `Segment`.
        base: The name of that network; by default the first.
        sets: Sets of layers to move to the mean, besides all: `"each"` layer alone, or a list of sets of layer names.
            Each takes as many evaluations as there are networks.
        subsets: Sets of networks whose means to measure, besides that of all: a list of sets of names.
        alphas: Positions in [0, 1] on the segment of each pair, or how many to space evenly from 0 to 1.
        batch_norm: Policy for batch normalisation between the networks; see `BatchNormPolicy`.
        recalibration: Under `"recalibrate"`, the loader on whose batches statistics are re-estimated; see
            `measure_barrier`.
        metrics: `"loss"` and `"error"`; see `measure_barrier`.
        max_batches: Use only this many batches.
        device: Device to compute on; the first network's device by default.
        dtype: Floating-point type to compute in; by default the first network's, float32 at least.
        allow_tf32: On a CUDA device, round convolutions to TF32; see `Objective`.
        group: Processes that share the batches, such as `"world"` under `torchrun`; see `Objective`.
        timeout: Seconds that they wait for a sign of life of each other.
        progress: Show a progress bar over batches; by default on a terminal and in notebooks.

    Raises:
        LMCCurvatureError: The networks, the loader or an option are not what they should be; the subclasses of
            `lmc_curvature.errors` tell which.
    """
    positions, networks = positions_of(alphas), list(models)
    check_metrics(metrics, loss_fn)
    labels = network_names(len(networks), names)
    shares_of_all, members = network_weights(weights, labels), _members(subsets, labels)
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
        group=group,
        timeout=timeout,
    )
    layers_of_sets = resolve_sets(hull.groups, sets)
    points = HullPoints(hull)
    pairs = _pair_numbers(points, labels, positions)
    mean = points.add(shares_of_all[None], "the mean of all networks")
    sides = [
        [
            points.add(hull.mixture(corner, shares_of_all, some), f"{label} with {', '.join(some)} at the mean")
            for corner, label in zip(np.eye(len(labels)), labels, strict=True)
        ]
        for some in layers_of_sets
    ]
    chosen = tuple(tuple(name for name, is_in in zip(labels, row, strict=True) if is_in) for row in members)
    means = [
        points.add(y[None], f"the mean of {', '.join(some)}")
        for y, some in zip(shares(shares_of_all, members), chosen, strict=True)
    ]
    # What is frozen makes other networks of them, to which their statistics do not belong.
    own = [] if hull.notes else [objective.place(running_statistics(unwrap(model))) for model in networks]
    sizes, batch_weights, values, _ = evaluate_points(objective, points, metrics, own_statistics=own, progress=progress)
    return BarriersMeasurement(
        labels,
        shares_of_all,
        positions,
        layers_of_sets,
        chosen,
        tuple(metrics),
        batch_norm,
        sizes,
        values[:, :, list(points.networks)],
        values[:, :, pairs],
        values[:, :, mean],
        values[:, :, np.array(sides, dtype=int).reshape(-1, len(labels))],
        values[:, :, means],
        objective.notes + hull.notes,
        batch_weights,
        loss_name(objective.loss_fn),
    )


def _members(subsets: Sequence[Iterable[str]], names: Sequence[str]) -> Members:
    """Sets of networks as rows that are true at their members.

    Raises:
        OptionError: They are no sets of names of networks.
    """
    if isinstance(subsets, str) or not isinstance(subsets, Iterable):
        raise OptionError(f"subsets={subsets!r}: expected a list of sets of names, as in [['model_a', 'model_c']].")
    found = np.zeros((len(subsets), len(names)), dtype=bool)
    for row, some in zip(found, subsets, strict=True):
        row[list(network_indices(some, names))] = True
    return found


def _pair_numbers(
    points: HullPoints, names: Sequence[str], positions: Float[np.ndarray, " n"]
) -> Int[np.ndarray, "pairs n"]:
    """Numbers of the states at some positions on the segment of each pair."""
    corners = dict(zip(names, np.eye(len(names)), strict=True))
    return np.array(
        [
            [
                points.add(((1 - a) * corners[i] + a * corners[j])[None], f"alpha={a:.3g} between {i} and {j}")
                for a in positions.tolist()
            ]
            for i, j in combinations(names, 2)
        ]
    )
