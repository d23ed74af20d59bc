"""Predictions of the barriers among several networks: of their pairs, of their mean, and of the means of subsets."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float

from lmc_curvature.averages import standard_error
from lmc_curvature.barrier.cube import Sets
from lmc_curvature.barrier.expansions import Expansion
from lmc_curvature.barrier.fields import fields_of_prediction
from lmc_curvature.barrier.many.mean import Mean
from lmc_curvature.barrier.many.ranking import pair_matrix, rank_subsets
from lmc_curvature.barrier.many.subsets import Subset
from lmc_curvature.barrier.many.summaries import prediction_summary, prediction_text
from lmc_curvature.barrier.prediction import BarrierPrediction
from lmc_curvature.objective import BatchNormPolicy
from lmc_curvature.plotting.summary import Display, Summary
from lmc_curvature.segment.hull import network_indices
from lmc_curvature.storage import load_arrays, refuse_damage, save_arrays

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from lmc_curvature.barrier.many.tables import Table

_KIND = "barriers-prediction"


@dataclass(frozen=True, eq=False, repr=False)
class BarriersPrediction(Display):
    """A prediction of the barriers among N networks: of every pair, of the mean of all, and of the mean of any subset.

    Barriers are in units of the loss. That of a pair is the highest point of its curve, as `predict_barrier` has it.
    The mean of all is θ̄ = Σ_k w_k θ_k; its barrier is its loss above Σ_k w_k L(θ_k), and keeps its sign. Of a set of
    layers it is the mean loss of the networks with that set at θ̄, above the same; see `barrier/many/mean.py`.

    Attributes:
        names: Names of the networks.
        weights: What each counts for in the mean, (N,).
        pairs: Two names, in their order, to the prediction for these two.
        spokes: Name to the prediction on the line from that network, through the mean of all, to the mean of the
            others.
    """

    names: tuple[str, ...]
    weights: Float[np.ndarray, " N"]
    pairs: Mapping[tuple[str, str], BarrierPrediction]
    spokes: Mapping[str, BarrierPrediction]

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the L layers."""
        return self._any.layers

    @property
    def examples(self) -> int:
        """Number of examples the prediction was made from."""
        return self._any.examples

    @property
    def batch_norm(self) -> BatchNormPolicy:
        """The batch-normalisation policy."""
        return self._any.batch_norm

    @property
    def loss(self) -> str | None:
        """Name of the loss."""
        return self._any.loss

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences that belong beside the numbers."""
        return tuple(dict.fromkeys(note for spoke in self.spokes.values() for note in spoke.notes))

    @property
    def losses(self) -> Float[np.ndarray, " N"]:
        """Loss of each network."""
        return np.array([spoke.endpoints[0].loss for spoke in self.spokes.values()])

    @property
    def mean_loss(self) -> float:
        """Loss of the mean of all networks, as it was evaluated."""
        return self._any.anchors[1].projection.loss

    @property
    def mean_errors(self) -> tuple[Float[np.ndarray, " N"], float] | None:
        """Share of the examples on which each network errs, and on which their mean does; None for other losses."""
        if self._any.errors is None:
            return None
        found = np.array([spoke.errors[:2] for spoke in self.spokes.values() if spoke.errors is not None])
        return found[:, 0], float(found[0, 1])

    def pair(self, first: str, second: str) -> BarrierPrediction:
        """The prediction for two networks, from the one that comes first in `names` to the other.

        Raises:
            OptionError: There is no such network, or the two are one.
        """
        i, j = network_indices((first, second), self.names)
        return self.pairs[self.names[i], self.names[j]]

    def barriers(self, expansion: Expansion | None = None) -> Float[np.ndarray, "N N"]:
        """The barrier of every pair; symmetric, with zeros on the diagonal."""
        return self._matrix([pair.barrier(None, expansion) for pair in self.pairs.values()])

    def heights(self) -> Float[np.ndarray, "N N"]:
        """The same; where a curve nowhere rises above the chord, its value in the middle, with its sign."""
        return self._matrix([pair.barrier() or float(pair.curve([0.5])[0]) for pair in self.pairs.values()])

    def standard_errors(self, expansion: Expansion | None = None) -> Float[np.ndarray, "N N"]:
        """Standard errors of `barriers`, from the spread between batches; NaN for a single batch."""
        return self._matrix([pair.standard_error(None, expansion) for pair in self.pairs.values()])

    def expansion_errors(self) -> Float[np.ndarray, "N N"]:
        """Expansion errors of the anchored `barriers`; no bounds."""
        return self._matrix([pair.expansion_error() for pair in self.pairs.values()])

    def mean_barrier(self, layers: Iterable[str] | str | None = None) -> float:
        """The barrier between the networks and their mean, for a set of layers; for all of them it was evaluated.

        Raises:
            PartitionError: The set names an unknown layer.
        """
        return float(self.mean_barriers([layers])[0])

    def mean_barriers(self, sets: Sets) -> Float[np.ndarray, " sets"]:
        """The same for many sets of layers: their names, or an array (sets, L) that is true where a set has a layer."""
        return self._mean.barriers(self._sets(sets))

    def layer_barriers(self) -> Float[np.ndarray, " L"]:
        """The barrier between the networks and their mean of each layer alone."""
        return self.mean_barriers(np.eye(len(self.layers), dtype=bool))

    def mean_standard_error(self, layers: Iterable[str] | str | None = None) -> float:
        """Standard error of `mean_barrier`, from the spread between batches; NaN for a single batch."""
        batches = self._mean.batch_barriers(self._sets([layers])[0])
        return float(standard_error(batches, self._any.endpoints[0].weights))

    def mean_expansion_errors(self, sets: Sets) -> Float[np.ndarray, " sets"]:
        """Expansion errors of `mean_barriers`, estimated as those of two networks are; no bounds."""
        return self._mean.expansion_errors(self._sets(sets))

    @cached_property
    def subsets(self) -> tuple[Subset, ...]:
        """The means of subsets of the networks, each with the weights of its own, that with the least loss first.

        Single networks are among them. Of up to ten networks, all subsets are looked at; of more, those of a greedy
        search, see `search_subsets`.
        """
        return rank_subsets(self.weights, self.pairs, self.spokes)

    @property
    def _any(self) -> BarrierPrediction:
        return self.spokes[self.names[0]]

    @cached_property
    def _mean(self) -> Mean:
        return Mean(self.weights, list(self.spokes.values()))

    def _sets(self, sets: Sets) -> Bool[np.ndarray, "sets L"]:
        return self._mean.cubes[0].sets(sets)

    def _matrix(self, values: Sequence[float]) -> Float[np.ndarray, "N N"]:
        return pair_matrix(np.array(values), len(self.names))

    def to_dataframe(self, rows: "Table" = "pairs") -> "pd.DataFrame":
        """A table with a row a pair of networks, a row a layer of the mean, or a row a subset, the best first.

        Raises:
            OptionError: `rows` is not a choice.
        """
        from lmc_curvature.barrier.many.tables import prediction_table

        return prediction_table(self, rows)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the prediction to one safetensors file, without loss."""
        parts = {"pair": list(self.pairs.values()), "spoke": list(self.spokes.values())}
        arrays, metadata = {"weights": self.weights}, {}
        for kind, predictions in parts.items():
            found = [prediction.contents() for prediction in predictions]
            arrays |= {f"{kind}_{n}.{name}": a for n, (own, _) in enumerate(found) for name, a in own.items()}
            metadata[kind] = [own for _, own in found]
        save_arrays(path, _KIND, arrays, names=self.names, **metadata)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "BarriersPrediction":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            FileFormatError: The file is damaged or holds something else.
        """
        arrays, metadata = load_arrays(path, _KIND)

        def parts(kind: str) -> Iterator[BarrierPrediction]:
            for number, own in enumerate(metadata[kind]):
                prefix = f"{kind}_{number}."
                held = {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}
                yield BarrierPrediction(**fields_of_prediction(held, own))

        with refuse_damage(path):
            names = tuple(metadata["names"])
            pairs = dict(zip(combinations(names, 2), parts("pair"), strict=True))
            return cls(names, arrays["weights"], pairs, dict(zip(names, parts("spoke"), strict=True)))

    def plot(self) -> "Figure":
        """Draw the barriers of all pairs, and those of layers towards the mean of all networks."""
        from lmc_curvature.barrier.many.drawing import draw_predicted_barriers

        return draw_predicted_barriers(self)

    def _summary(self) -> Summary:
        return prediction_summary(self)

    def __str__(self) -> str:
        return prediction_text(self)
