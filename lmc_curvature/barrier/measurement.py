"""Measurements of the barrier between two networks, by evaluating the networks in between."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Real
from torch import nn

from lmc_curvature.averages import standard_error, weighted_mean, with_error
from lmc_curvature.barrier.evaluation import chord, evaluate_points
from lmc_curvature.barrier.fields import MEASUREMENT, measurement_fields
from lmc_curvature.barrier.kinds import CurveKind, classify_curve
from lmc_curvature.barrier.losses import data_in_words, loss_name
from lmc_curvature.barrier.metrics import METRICS, Metric, check_metrics
from lmc_curvature.barrier.requests import Sets, positions_of, refuse_former_options, resolve_sets
from lmc_curvature.barrier.setup import segment_and_objective
from lmc_curvature.barrier.summaries import measurement_summary
from lmc_curvature.errors import OptionError, check_choice
from lmc_curvature.objective import BatchNormPolicy, LossFunction
from lmc_curvature.objective.recalibration import running_statistics
from lmc_curvature.objective.wrappers import unwrap
from lmc_curvature.plotting.summary import Display, Summary
from lmc_curvature.segment import Frozen, PartitionSpec, SegmentPoints, check_points
from lmc_curvature.segment.frozen import frozen_choices
from lmc_curvature.storage import save_arrays

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


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
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    allow_tf32: bool = False,
    progress: bool | None = None,
    partition: None = None,
) -> "BarrierMeasurement":
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
        device: Device to compute on; `model_a`'s device by default.
        dtype: Floating-point type to compute in; by default `model_a`'s, float32 at least.
        allow_tf32: On a CUDA device, round convolutions to TF32; see `Objective`.
        progress: Show a progress bar over batches; by default on a terminal and in notebooks.
        partition: The former name of `layers`, which is refused.

    Raises:
        LMCCurvatureError: The networks, the loader or an option are not what they should be; the subclasses of
            `lmc_curvature.errors` tell which.
    """
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
    )
    members_of_sets, places = resolve_sets(segment.partition.groups, sets), check_points(segment.layers, points)
    states = SegmentPoints(segment)
    curves = (segment.layers, *members_of_sets)
    pairs = np.array([[states.pair(members, alpha) for alpha in positions] for members in curves])
    numbers = [states.at(list(place.values())) for place in places]
    # What is frozen makes other networks of the ends, to which their statistics do not belong.
    own = [] if frozen_choices(frozen) else [running_statistics(unwrap(model)) for model in (model_a, model_b)]
    sizes, weights, values = evaluate_points(
        objective, states, metrics, own_statistics=[objective.place(each) for each in own], progress=progress
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
        objective.notes + segment.notes,
        batch_weights=weights,
        batch_sides=sides[:, :, 1:],
        points=places,
        batch_points=values[:, :, numbers],
        loss=loss_name(objective.loss_fn),
    )


@dataclass(frozen=True, eq=False, repr=False)
class BarrierMeasurement(Display):
    """Measured barrier curves of the whole network and of sets of layers, with the values of every batch.

    Attributes:
        alphas: Positions on the segment, (n,).
        sets: The measured sets of layers, each a tuple of names.
        metrics: Measured metrics: `"loss"` (in units of the loss), `"error"` (a share of the examples or positions).
        batch_norm: The batch-normalisation policy.
        batch_sizes: Examples in each batch, (batches,).
        batch_ends: Metrics of each batch at the two networks, (batches, metrics, 2).
        batch_values: Metrics of each batch along the segment, (batches, metrics, 1 + sets, n): first for the whole
            network, then for each set (the weighted sum of its two sides).
        notes: Sentences that belong beside the numbers, such as what is frozen.
        batch_weights: What each batch counts for in the mean of each metric, (batches, metrics); None where that is its
            number of examples.
        batch_sides: Metrics of each batch at the two sides of each set, θ₁ + α P_S Δ and θ₂ − (1−α) P_S Δ,
            (batches, metrics, sets, n, 2); None in files of earlier versions. At α = 0 and 1 both are the end.
        points: The measured points of the cube, each a number for every layer.
        batch_points: Metrics of each batch at these points, (batches, metrics, points); None in such files.
        loss: Name of the loss; None likewise.
    """

    alphas: Float[np.ndarray, " n"]
    sets: tuple[tuple[str, ...], ...]
    metrics: tuple[Metric, ...]
    batch_norm: BatchNormPolicy
    batch_sizes: Int[np.ndarray, " batches"]
    batch_ends: Float[np.ndarray, "batches metrics 2"]
    batch_values: Float[np.ndarray, "batches metrics curves n"]
    notes: tuple[str, ...] = ()
    batch_weights: Float[np.ndarray, "batches metrics"] | None = None
    batch_sides: Float[np.ndarray, "batches metrics sets n 2"] | None = None
    points: tuple[dict[str, float], ...] = ()
    batch_points: Float[np.ndarray, "batches metrics points"] | None = None
    loss: str | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """A name for each measured set: its layer, two layers joined by ' + ', or the ends of a longer list."""
        return tuple(
            " + ".join(members) if len(members) < 3 else f"{members[0]} … {members[-1]} ({len(members)} layers)"
            for members in self.sets
        )

    @property
    def examples(self) -> int:
        """Number of examples visited."""
        return int(self.batch_sizes.sum())

    def weights(self, metric: str = "loss") -> Real[np.ndarray, " batches"]:
        """What each batch counts for in the mean of a metric."""
        index = self._metric(metric)
        return self.batch_sizes if self.batch_weights is None else self.batch_weights[:, index]

    def values(self, metric: str = "loss") -> Float[np.ndarray, " n"]:
        """The metric itself along the segment, L(θ(α))."""
        return weighted_mean(self.batch_values[:, self._metric(metric), 0], self.weights(metric))

    def ends(self, metric: str = "loss") -> tuple[float, float]:
        """The metric at the two networks."""
        first, second = weighted_mean(self.batch_ends[:, self._metric(metric)], self.weights(metric))
        return float(first), float(second)

    def curve(self, metric: str = "loss") -> Float[np.ndarray, " n"]:
        """Barrier curve of the whole network: the metric minus the chord between the ends."""
        return self._curves(metric)[0]

    def layer_curves(self, metric: str = "loss") -> Float[np.ndarray, "sets n"]:
        """Barrier curve of each measured set of layers."""
        return self._curves(metric)[1:]

    def sides(self, metric: str = "loss") -> Float[np.ndarray, "sets n 2"]:
        """The metric at the two networks whose weighted sum makes up each set's curve: which one is the better base?

        Raises:
            OptionError: The measurement comes from a file of an earlier version, which has their sums alone.
        """
        if self.batch_sides is None:
            raise OptionError("This measurement comes from an earlier version, without its sides: measure again.")
        return weighted_mean(self.batch_sides[:, self._metric(metric)], self.weights(metric))

    def rises(self, metric: str = "loss") -> Float[np.ndarray, " points"]:
        """The metric at each of `points`, minus the mean of the two ends."""
        return weighted_mean(self.batch_rises(metric), self.weights(metric))

    def rise_errors(self, metric: str = "loss") -> Float[np.ndarray, " points"]:
        """Standard errors of `rises`, from the spread between batches; NaN for a single batch."""
        return standard_error(self.batch_rises(metric), self.weights(metric))

    def barrier(self, metric: str = "loss") -> float:
        """Barrier of the whole network: the maximum of its curve over the measured positions."""
        return float(self.curve(metric).max())

    def layer_barriers(self, metric: str = "loss") -> Float[np.ndarray, " sets"]:
        """Barrier of each measured set of layers.

        Raises:
            OptionError: No sets were measured.
        """
        if not self.sets:
            raise OptionError("No sets of layers were measured: pass sets='each' or sets=[…] to measure_barrier.")
        return self.layer_curves(metric).max(axis=1)

    def layer_standard_errors(self, metric: str = "loss") -> Float[np.ndarray, " sets"]:
        """Standard errors of `layer_barriers`, see `standard_error`."""
        return self._standard_errors(metric)[1:]

    def standard_error(self, metric: str = "loss") -> float:
        """Standard error of `barrier`, from the spread between batches.

        It is that of the curve at its highest position, or nearest to α = 1/2 where the curve nowhere rises above the
        chord. NaN for a single batch.
        """
        return float(self._standard_errors(metric)[0])

    def curve_errors(self, metric: str = "loss") -> Float[np.ndarray, "curves n"]:
        """Standard errors of `curve`, and then of each of `layer_curves`, at every position."""
        return standard_error(self._batch_curves(metric), self.weights(metric))

    @property
    def kind(self) -> CurveKind:
        """Name of the shape of the loss's barrier curve; see `classify_curve` for the kinds and their thresholds."""
        return classify_curve(self.alphas, self.curve("loss"), tolerance=0.02 * (1 + max(map(abs, self.ends("loss")))))

    def _metric(self, metric: str) -> int:
        check_choice("metric", metric, self.metrics)
        return self.metrics.index(metric)

    def _batch_curves(self, metric: str) -> Float[np.ndarray, "batches curves n"]:
        ends, values = (each[:, self._metric(metric)] for each in (self.batch_ends, self.batch_values))
        return values - chord(self.alphas, ends[:, :1], ends[:, 1:])[:, None]

    def _curves(self, metric: str) -> Float[np.ndarray, "curves n"]:
        curves = weighted_mean(self._batch_curves(metric), self.weights(metric))
        # Shares of examples often lie on the chord, but for rounding.
        rounding = 32 * np.finfo(np.float64).eps * np.abs(self.batch_values[:, self._metric(metric)]).max()
        return np.where(np.abs(curves) <= rounding, 0.0, curves)

    def batch_rises(self, metric: str = "loss") -> Float[np.ndarray, "batches points"]:
        """The rises of every batch, of which `rises` are the means."""
        index, points = self._metric(metric), self.batch_points
        if points is None:
            return np.zeros((len(self.batch_sizes), 0))
        return points[:, index] - self.batch_ends[:, index].mean(axis=1, keepdims=True)

    def _standard_errors(self, metric: str) -> Float[np.ndarray, " curves"]:
        curves, peaks = self._batch_curves(metric), self._curves(metric).argmax(axis=1)
        # At the ends every batch's curve is zero, whatever that of all data is.
        is_between = (self.alphas > 0) & (self.alphas < 1)
        peaks = np.where(is_between[peaks], peaks, np.abs(self.alphas - 0.5).argmin())
        return standard_error(curves[:, np.arange(len(peaks)), peaks], self.weights(metric))

    def to_dataframe(self) -> "pd.DataFrame":
        """A row a measured set: its name and layers, and its barriers in each metric with standard errors."""
        import pandas as pd

        columns: dict[str, Any] = {"layers": list(self.layers), "set": list(self.sets)}
        for metric in self.metrics:
            columns[f"{metric}_barrier"] = self.layer_curves(metric).max(axis=1)
            columns[f"{metric}_barrier_se"] = self.layer_standard_errors(metric)
        return pd.DataFrame(columns)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the measurement to one safetensors file, without loss."""
        arrays = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        metadata = {name: getattr(self, name) for name in ("sets", "points", "metrics", "batch_norm", "notes", "loss")}
        save_arrays(path, MEASUREMENT, arrays, **metadata)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "BarrierMeasurement":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            FileFormatError: The file is damaged or holds something else.
        """
        return cls(**measurement_fields(path))

    def plot(self) -> "Figure":
        """Draw the measured curves."""
        from lmc_curvature.barrier.drawing import draw_measurement

        return draw_measurement(self)

    def _summary(self) -> Summary:
        return measurement_summary(self)

    def __str__(self) -> str:
        data = data_in_words(self.examples, self.weights(self.metrics[0]), self.loss)
        lines = [f"Barrier measured on {data}, batch_norm={self.batch_norm!r}"]
        if "loss" in self.metrics:
            lines[0] += f": {self.kind}"
        for metric in self.metrics:
            first, second = self.ends(metric)
            barrier, highest = self.barrier(metric), self.alphas[self.curve(metric).argmax()]
            place = f"at alpha {highest:.2f}" if barrier > 0 else "(nowhere above the chord)"
            height = with_error(barrier, self.standard_error(metric))
            lines.append(f"  {metric:<6} {height} {place}; at the ends {first:.4g}, {second:.4g}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])
