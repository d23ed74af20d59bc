"""Measurements of the barriers among several networks: of their pairs, of their mean, and of the means of subsets."""

from dataclasses import dataclass
from itertools import combinations
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int, Real

from lmc_curvature.averages import standard_error, weighted_mean
from lmc_curvature.barrier.evaluation import chord
from lmc_curvature.barrier.many.ranking import pair_matrix
from lmc_curvature.barrier.many.subsets import shares
from lmc_curvature.barrier.many.summaries import measurement_summary, measurement_text
from lmc_curvature.barrier.measurement import BarrierMeasurement
from lmc_curvature.barrier.metrics import Metric
from lmc_curvature.errors import check_choice
from lmc_curvature.objective import BatchNormPolicy
from lmc_curvature.plotting.summary import Display, Summary
from lmc_curvature.segment.hull import network_indices
from lmc_curvature.storage import load_arrays, refuse_damage, save_arrays

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from lmc_curvature.barrier.many.tables import MeasuredTable

_KIND = "barriers-measurement"


@dataclass(frozen=True, eq=False, repr=False)
class BarriersMeasurement(Display):
    """Measured barriers among N networks, with the values of every batch.

    The barrier of a pair is the highest point of its curve over the measured positions. The mean of all networks is
    θ̄ = Σ_k w_k θ_k; its barrier is the metric there minus Σ_k w_k times that of the networks, and keeps its sign, as do
    those of sets of layers and the rises of subsets.

    Attributes:
        names: Names of the networks.
        weights: What each counts for in the mean, (N,).
        alphas: Positions on the segment of each pair, (n,).
        sets: The sets of layers that were moved to the mean, each a tuple of names.
        subsets: The sets of networks whose means were measured, each a tuple of names.
        metrics: Measured metrics: `"loss"` (in units of the loss), `"error"` (a share of the examples or positions).
        batch_norm: The batch-normalisation policy.
        batch_sizes: Examples in each batch, (batches,).
        batch_networks: Metrics of each batch at the networks, (batches, metrics, N).
        batch_pairs: Metrics of each batch along the segment of each pair, (batches, metrics, pairs, n).
        batch_means: Metrics of each batch at the mean of all, (batches, metrics).
        batch_sides: Metrics of each batch at each network with each set at the mean, (batches, metrics, sets, N).
        batch_subsets: Metrics of each batch at the mean of each subset, (batches, metrics, subsets).
        notes: Sentences that belong beside the numbers.
        batch_weights: What each batch counts for in the mean of each metric, (batches, metrics); None where that is its
            number of examples.
        loss: Name of the loss.
    """

    names: tuple[str, ...]
    weights: Float[np.ndarray, " N"]
    alphas: Float[np.ndarray, " n"]
    sets: tuple[tuple[str, ...], ...]
    subsets: tuple[tuple[str, ...], ...]
    metrics: tuple[Metric, ...]
    batch_norm: BatchNormPolicy
    batch_sizes: Int[np.ndarray, " batches"]
    batch_networks: Float[np.ndarray, "batches metrics N"]
    batch_pairs: Float[np.ndarray, "batches metrics pairs n"]
    batch_means: Float[np.ndarray, "batches metrics"]
    batch_sides: Float[np.ndarray, "batches metrics sets N"]
    batch_subsets: Float[np.ndarray, "batches metrics subsets"]
    notes: tuple[str, ...] = ()
    batch_weights: Float[np.ndarray, "batches metrics"] | None = None
    loss: str | None = None

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The names of each pair, in their order."""
        return tuple(combinations(self.names, 2))

    @property
    def examples(self) -> int:
        """Number of examples visited."""
        return int(self.batch_sizes.sum())

    def counts(self, metric: str = "loss") -> Real[np.ndarray, " batches"]:
        """What each batch counts for in the mean of a metric."""
        index = self._metric(metric)
        return self.batch_sizes if self.batch_weights is None else self.batch_weights[:, index]

    def pair(self, first: str, second: str) -> BarrierMeasurement:
        """The measurement of two networks, from the one that comes first in `names` to the other.

        Raises:
            OptionError: There is no such network, or the two are one.
        """
        i, j = network_indices((first, second), self.names)
        ends = self.batch_networks[:, :, [i, j]]
        values = self.batch_pairs[:, :, self.pairs.index((self.names[i], self.names[j]))][:, :, None]
        batches, metrics = self.batch_means.shape
        return BarrierMeasurement(
            self.alphas,
            (),
            self.metrics,
            self.batch_norm,
            self.batch_sizes,
            ends,
            chord(self.alphas, values, values),
            self.notes,
            self.batch_weights,
            np.zeros((batches, metrics, 0, len(self.alphas), 2)),
            batch_points=np.zeros((batches, metrics, 0)),
            loss=self.loss,
        )

    def network_values(self, metric: str = "loss") -> Float[np.ndarray, " N"]:
        """The metric at each network."""
        return self._over_data(self.batch_networks, metric)

    def barriers(self, metric: str = "loss") -> Float[np.ndarray, "N N"]:
        """The barrier of every pair; symmetric, with zeros on the diagonal."""
        found = [self.pair(*names).barrier(metric) for names in self.pairs]
        return pair_matrix(np.array(found), len(self.names))

    def heights(self, metric: str = "loss") -> Float[np.ndarray, "N N"]:
        """The same; where a curve nowhere rises above the chord, its value nearest to the middle, with its sign."""
        middle = int(np.abs(self.alphas - 0.5).argmin())
        curves = [self.pair(*names).curve(metric) for names in self.pairs]
        found = [curve.max() if curve.max() > 0 else curve[middle] for curve in curves]
        return pair_matrix(np.array(found), len(self.names))

    def standard_errors(self, metric: str = "loss") -> Float[np.ndarray, "N N"]:
        """Standard errors of `barriers`, from the spread between batches; NaN for a single batch."""
        found = [self.pair(*names).standard_error(metric) for names in self.pairs]
        return pair_matrix(np.array(found), len(self.names))

    def mean_value(self, metric: str = "loss") -> float:
        """The metric at the mean of all networks."""
        return float(self._over_data(self.batch_means, metric))

    def mean_barrier(self, metric: str = "loss") -> float:
        """The metric at the mean of all networks, above the mean of theirs."""
        return float(weighted_mean(self._mean_rises(metric), self.counts(metric)))

    def mean_standard_error(self, metric: str = "loss") -> float:
        """Standard error of `mean_barrier`, from the spread between batches; NaN for a single batch."""
        return float(standard_error(self._mean_rises(metric), self.counts(metric)))

    def set_barriers(self, metric: str = "loss") -> Float[np.ndarray, " sets"]:
        """The barrier between the networks and their mean of each of `sets`."""
        return weighted_mean(self._set_rises(metric), self.counts(metric))

    def set_standard_errors(self, metric: str = "loss") -> Float[np.ndarray, " sets"]:
        """Standard errors of `set_barriers`, from the spread between batches; NaN for a single batch."""
        return standard_error(self._set_rises(metric), self.counts(metric))

    def subset_values(self, metric: str = "loss") -> Float[np.ndarray, " subsets"]:
        """The metric at the mean of each of `subsets`."""
        return self._over_data(self.batch_subsets, metric)

    def subset_rises(self, metric: str = "loss") -> Float[np.ndarray, " subsets"]:
        """The same above the mean of its networks' own."""
        return weighted_mean(self._subset_rises(metric), self.counts(metric))

    def subset_standard_errors(self, metric: str = "loss") -> Float[np.ndarray, " subsets"]:
        """Standard errors of `subset_rises`, from the spread between batches; NaN for a single batch."""
        return standard_error(self._subset_rises(metric), self.counts(metric))

    def _metric(self, metric: str) -> int:
        check_choice("metric", metric, self.metrics)
        return self.metrics.index(metric)

    def _over_data(self, values: Float[np.ndarray, "batches metrics *shape"], metric: str) -> np.ndarray:
        return weighted_mean(values[:, self._metric(metric)], self.counts(metric))

    def _chords(self, metric: str) -> Float[np.ndarray, " batches"]:
        return self.batch_networks[:, self._metric(metric)] @ self.weights

    def _mean_rises(self, metric: str) -> Float[np.ndarray, " batches"]:
        return self.batch_means[:, self._metric(metric)] - self._chords(metric)

    def _set_rises(self, metric: str) -> Float[np.ndarray, "batches sets"]:
        return self.batch_sides[:, self._metric(metric)] @ self.weights - self._chords(metric)[:, None]

    def _subset_rises(self, metric: str) -> Float[np.ndarray, "batches subsets"]:
        index = self._metric(metric)
        members = np.array([[name in some for name in self.names] for some in self.subsets], dtype=bool)
        y = shares(self.weights, members.reshape(-1, len(self.names)))
        return self.batch_subsets[:, index] - self.batch_networks[:, index] @ y.T

    def to_dataframe(self, rows: "MeasuredTable" = "pairs") -> "pd.DataFrame":
        """A table with a row a pair of networks, a row a set of layers, or a row a subset of the networks.

        Raises:
            OptionError: `rows` is not a choice.
        """
        from lmc_curvature.barrier.many.tables import measurement_table

        return measurement_table(self, rows)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the measurement to one safetensors file, without loss."""
        arrays = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        names = ("names", "sets", "subsets", "metrics", "batch_norm", "notes", "loss")
        save_arrays(path, _KIND, arrays, **{name: getattr(self, name) for name in names})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "BarriersMeasurement":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            FileFormatError: The file is damaged or holds something else.
        """
        arrays, metadata = load_arrays(path, _KIND)
        with refuse_damage(path):
            # JSON has lists only.
            nested = {name: tuple(map(tuple, metadata.pop(name))) for name in ("sets", "subsets")}
            flat = {name: tuple(metadata.pop(name)) for name in ("names", "metrics", "notes")}
            return cls(**arrays, **nested, **flat, **metadata)

    def plot(self) -> "Figure":
        """Draw the barriers of all pairs, and those of sets of layers towards the mean of all networks."""
        from lmc_curvature.barrier.many.drawing import draw_measured_barriers

        return draw_measured_barriers(self)

    def _summary(self) -> Summary:
        return measurement_summary(self)

    def __str__(self) -> str:
        return measurement_text(self)
