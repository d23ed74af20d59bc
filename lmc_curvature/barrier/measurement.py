"""Measured barrier curves of a network and of sets of its layers, with the values of every batch."""

from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int, Real

from lmc_curvature.averages import interval, standard_error, weighted_mean, with_error
from lmc_curvature.barrier.evaluation import chord
from lmc_curvature.barrier.fields import MEASUREMENT, measurement_fields
from lmc_curvature.barrier.kinds import CurveKind, classify_curve
from lmc_curvature.barrier.losses import data_in_words
from lmc_curvature.barrier.metrics import Metric
from lmc_curvature.barrier.summaries import measurement_summary
from lmc_curvature.errors import OptionError, check_choice
from lmc_curvature.objective import BatchNormPolicy
from lmc_curvature.plotting.summary import Display, Summary
from lmc_curvature.storage import save_arrays

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


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
        interruption: What interrupted the pass over the data, and after how many batches; None if nothing did.
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
    interruption: str | None = None

    @property
    def partial(self) -> bool:
        """Whether it is of the batches before an interruption alone."""
        return self.interruption is not None

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

    def interval(
        self,
        layers: Iterable[str] | str | None = None,
        metric: str = "loss",
        *,
        alpha: float = 0.5,
        level: float | int = 0.95,
    ) -> tuple[float, float]:
        """Confidence interval of a curve at the measured position nearest to α; see `averages.interval`.

        Args:
            layers: A measured set of layers; None for the whole network.
            metric: The metric.
            alpha: The position.
            level: How often such intervals hold what all data would give, from the spread between batches.

        Raises:
            OptionError: The set was not measured.
        """
        number, members = 0, (layers,) if isinstance(layers, str) else layers
        if members is not None:
            found = [n for n, each in enumerate(self.sets, 1) if set(each) == set(members)]
            if not found:
                raise OptionError(f"The set {sorted(members)} was not measured: pass sets=[…] to measure_barrier.")
            number = found[0]
        position = int(np.abs(self.alphas - alpha).argmin())
        return interval(self._batch_curves(metric)[:, number, position], self.weights(metric), level)

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
        names = ("sets", "points", "metrics", "batch_norm", "notes", "loss", "interruption")
        metadata = {name: getattr(self, name) for name in names}
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
