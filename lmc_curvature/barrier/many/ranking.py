"""The means of subsets of several networks, ranked by their predicted losses."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Bool, Float, Real, Shaped

from lmc_curvature.averages import standard_error, weighted_mean
from lmc_curvature.barrier.cube import Cube
from lmc_curvature.barrier.many.subsets import (
    EXHAUSTIVE,
    Members,
    Subset,
    every_subset,
    pair_rises,
    search_subsets,
    shares,
    triples,
)
from lmc_curvature.barrier.prediction import BarrierPrediction

# What may be wrong with a rise in any case, as a part of it.
_SIZE = 0.05


def rank_subsets(
    weights: Float[np.ndarray, " N"],
    pairs: Mapping[tuple[str, str], BarrierPrediction],
    spokes: Mapping[str, BarrierPrediction],
) -> tuple[Subset, ...]:
    """The means of all subsets, or of those of a greedy search, that with the least loss first.

    Args:
        weights: What each network counts for.
        pairs: The prediction for each two networks.
        spokes: The prediction on the line from each network through the mean of all to the mean of the others.
    """
    known = Knowledge.of(weights, pairs, spokes)
    count = len(weights)
    members = every_subset(count) if count <= EXHAUSTIVE else search_subsets(count, known.losses_of)
    rises, evaluated = known.rises(members), known.are_evaluated(members)
    losses, errors = known.losses_of(members), np.where(evaluated, 0.0, known.errors_of(members))
    means, sampling = weighted_mean(rises, known.batch_weights), standard_error(rises, known.batch_weights)
    names, y = np.array(list(spokes)), shares(weights, members)
    return tuple(
        Subset(
            tuple(names[members[row]].tolist()),
            tuple(y[row, members[row]].tolist()),
            float(losses[row]),
            float(means[row]),
            float(sampling[row]),
            float(errors[row]),
            bool(evaluated[row]),
        )
        for row in np.argsort(losses, kind="stable")
    )


def pair_matrix(values: Shaped[np.ndarray, " pairs *batches"], count: int) -> Shaped[np.ndarray, "*batches N N"]:
    """What is known of every pair of networks, in their order, as symmetric matrices with zeros on the diagonal."""
    found = np.zeros((*values.shape[1:], count, count), dtype=values.dtype)
    for value, (i, j) in zip(values, combinations(range(count), 2), strict=True):
        found[..., i, j] = found[..., j, i] = value
    return found


@dataclass(frozen=True, eq=False)
class Knowledge:
    """What is known of the losses of several networks and of means of some of them.

    Attributes:
        weights: What each network counts for.
        batch_weights: What each batch counts for.
        networks: Loss of each network, by every batch.
        pairs: Barrier of the mean of each pair, by every batch.
        pair_errors: Expansion error of that; zero where it was evaluated.
        whole: Barrier of the mean of all, by every batch.
        others: Loss of the mean of all but each network, by every batch.
    """

    weights: Float[np.ndarray, " N"]
    batch_weights: Real[np.ndarray, " batches"]
    networks: Float[np.ndarray, "batches N"]
    pairs: Float[np.ndarray, "batches N N"]
    pair_errors: Float[np.ndarray, "N N"]
    whole: Float[np.ndarray, " batches"]
    others: Float[np.ndarray, "batches N"]

    @classmethod
    def of(
        cls,
        weights: Float[np.ndarray, " N"],
        pairs: Mapping[tuple[str, str], BarrierPrediction],
        spokes: Mapping[str, BarrierPrediction],
    ) -> "Knowledge":
        """What predictions tell; see `rank_subsets`."""
        places = [second / (first + second) for first, second in combinations(weights.tolist(), 2)]
        barriers, errors = [], []
        for prediction, place in zip(pairs.values(), places, strict=True):
            cube = Cube(prediction.layers, prediction.anchors)
            whole = np.ones(len(prediction.layers), dtype=bool)
            # Slopes, too, where there are no anchors between the two.
            barriers.append(cube.batch_barriers(whole, place, "anchored"))
            is_anchor = np.isclose(cube.positions, place).any()
            errors.append(0.0 if is_anchor else prediction.expansion_error(alpha=place))
        networks, means, others = (
            np.stack([spoke.anchors[index].projection.batch_losses for spoke in spokes.values()], axis=1)
            for index in range(3)
        )
        return cls(
            weights,
            next(iter(spokes.values())).endpoints[0].weights,
            networks,
            pair_matrix(np.stack(barriers), len(weights)),
            pair_matrix(np.array(errors), len(weights)),
            means[:, 0] - networks @ weights,
            others,
        )

    def rises(self, members: Members) -> Float[np.ndarray, "batches subsets"]:
        """The loss of each subset's mean above the mean of its networks' losses, by every batch."""
        found = pair_rises(self.weights, self.pairs, members) + self._triples(members)
        # Of all networks but one it was evaluated.
        rows, left_out = np.nonzero(~members & (members.sum(axis=1) == len(self.weights) - 1)[:, None])
        found[:, rows] = self.others[:, left_out] - self._chords(members)[:, rows]
        return found

    def losses_of(self, members: Members) -> Float[np.ndarray, " subsets"]:
        """The loss of each subset's mean."""
        return weighted_mean(self.rises(members) + self._chords(members), self.batch_weights)

    def errors_of(self, members: Members) -> Float[np.ndarray, " subsets"]:
        """How far `rises` may be off where they were not evaluated: what leaving out the mean of all changes, mainly.

        A part of the rise, and errors of pairs whose mean was not evaluated, come on top.
        """
        rest, rise = (
            np.abs(weighted_mean(each, self.batch_weights)) for each in (self._triples(members), self.rises(members))
        )
        return rest + _SIZE * rise + pair_rises(self.weights, self.pair_errors, members)

    def are_evaluated(self, members: Members) -> Bool[np.ndarray, " subsets"]:
        """Whether the mean of each subset was evaluated: single networks, all of them, and all but one, and pairs."""
        sizes, exact = members.sum(axis=1), pair_rises(self.weights, self.pair_errors, members) == 0
        return (sizes == 1) | (sizes >= len(self.weights) - 1) | ((sizes == 2) & exact)

    def _triples(self, members: Members) -> Float[np.ndarray, "batches subsets"]:
        return triples(self.weights, self.pairs, self.whole, members)

    def _chords(self, members: Members) -> Float[np.ndarray, "batches subsets"]:
        return self.networks @ shares(self.weights, members).T
