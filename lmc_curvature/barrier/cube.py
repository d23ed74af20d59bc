"""Predicted losses and barriers anywhere in the cube of layers, as arrays, from what is known at its anchors."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from lmc_curvature.averages import standard_error, weighted_mean
from lmc_curvature.barrier.blending import (
    Features,
    combine,
    disagreement_weights,
    layer_shares,
    point_disagreement_weights,
    point_weights,
)
from lmc_curvature.barrier.expansions import Expansion, barrier_weights, highest
from lmc_curvature.curvature.projection import Projection
from lmc_curvature.errors import OptionError
from lmc_curvature.objective.memo import Memo
from lmc_curvature.segment import layer_indices

Sets = Sequence[Iterable[str] | str | None] | np.ndarray
"""Sets of layers: names of each set's members, or an array (sets, L) that is true where a set has a layer."""

# So many at once, or the weights of a million sets would take gigabytes.
_SETS_AT_ONCE = 50_000

# What the expansion error is made of, fitted in docs/results.md.
_BETWEEN, _LEFT_OUT, _SIZE = 0.8, 0.2, 0.2
# The squared distance from an anchor, in shares of the energy, at which half of the error of a loss sets in.
_NEAR = 0.003


class Anchor(NamedTuple):
    """A position α on the segment, and the projection onto the layers' directions Δ_ℓ there."""

    alpha: float
    projection: Projection


@dataclass(frozen=True, eq=False)
class Cube:
    """The cube θ₁ + Σ_ℓ x_ℓ Δ_ℓ of L layers, and what is known of the loss on its diagonal.

    Attributes:
        layers: Names of the layers.
        anchors: What is known, from x = 0 to x = 1.
    """

    layers: tuple[str, ...]
    anchors: tuple[Anchor, ...]

    @cached_property
    def positions(self) -> Float[np.ndarray, " anchors"]:
        """Positions of the anchors."""
        return np.array([anchor.alpha for anchor in self.anchors])

    @cached_property
    def shares(self) -> Float[np.ndarray, " L"]:
        """What each layer has of the energy; see `layer_shares`."""
        return layer_shares(np.stack([anchor.projection.curvature for anchor in self.anchors]))

    @cached_property
    def _maxima(self) -> Memo:
        return Memo()

    def sets(self, sets: Sets) -> Bool[np.ndarray, "sets L"]:
        """Sets of layers as rows that are true at their members; None is the set of all.

        Raises:
            OptionError: An array has another number of columns, or other values than True and False.
            PartitionError: A set names an unknown layer.
        """
        if isinstance(sets, np.ndarray):
            if sets.ndim != 2 or sets.shape[1] != len(self.layers):
                raise OptionError(
                    f"sets has shape {sets.shape}; expected an array (sets, {len(self.layers)}), a column a layer in "
                    "the order of prediction.layers."
                )
            found = sets.astype(bool)
            if sets.dtype != bool and not np.array_equal(found, sets):
                raise OptionError("sets has other values than True and False; points of the cube are for loss_at.")
            return found
        members = np.zeros((len(sets), len(self.layers)), dtype=bool)
        for row, names in zip(members, sets, strict=True):
            row[layer_indices(self.layers, names)] = True
        return members

    def pseudo_barriers(
        self, members: Bool[np.ndarray, "sets L"], position: float, expansion: Expansion
    ) -> Float[np.ndarray, "batches sets"]:
        """Values whose weighted mean varies as sets' barriers do, with the weights between anchors varying, too.

        With w_b what a batch counts for, W the sum, and B₋b the barrier by all other batches,

            W / w_b · B − (W / w_b − 1) · B₋b

        which are the values of batches for an expansion that is linear in them (the jackknife for groups of several
        sizes: Busing, Meijer and van der Leeden 1999).
        """
        weights, positions = self.anchors[0].projection.weights, np.array([[position]])
        of_all = self.barriers(members, positions, expansion)[0]
        found = np.tile(of_all, (len(weights), 1))
        for batch in np.flatnonzero(weights) if np.count_nonzero(weights) > 1 else ():
            others = Cube(self.layers, tuple(Anchor(a, p.without(int(batch))) for a, p in self.anchors))
            without = others.barriers(members, positions, expansion)[0]
            found[batch] += (weights.sum() / weights[batch] - 1) * (of_all - without)
        return found

    def losses(self, points: Float[np.ndarray, "n L"]) -> Float[np.ndarray, " n"]:
        """Predicted losses at points of the cube.

        Raises:
            OptionError: The points are no array (n, L) of numbers in [0, 1].
        """
        return self.anchors[0].projection.loss + self.rises(points)

    def rises(self, points: Float[np.ndarray, "n L"]) -> Float[np.ndarray, " n"]:
        """Predicted losses at points of the cube, above that of the first anchor; errors as of `losses`."""
        x = self._points(points)
        return combine(point_weights(self.positions, x @ self.shares, x**2 @ self.shares), self._features(x))

    def batch_losses(self, point: Float[np.ndarray, " L"]) -> Float[np.ndarray, " batches"]:
        """The loss at a point by every batch, with the weights of them all."""
        x = self._points(point[None])
        weights = point_weights(self.positions, x @ self.shares, x**2 @ self.shares)
        return self.anchors[0].projection.batch_losses + combine(weights, self._batch_features(x[0]))

    def loss_errors(self, points: Float[np.ndarray, "n L"]) -> Float[np.ndarray, " n"]:
        """How far `losses` may be off, apart from sampling; zero at anchors. The size is that above the chord."""
        first, last = self.anchors[0].projection.loss, self.anchors[-1].projection.loss
        far, ways = self.doubts(points)
        return far * blend_error(ways, self.rises(points) - (points @ self.shares) * (last - first))

    def doubts(self, points: Float[np.ndarray, "n L"]) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "ways n"]]:
        """What tells how far `losses` may be off: how far points are from anchors, from 0 to 1, and disagreements.

        See `blend_error`.
        """
        x = self._points(points)
        features, place, square = self._features(x), x @ self.shares, x**2 @ self.shares
        ways = point_disagreement_weights(self.positions, place, square)
        return self._far(place, square), np.stack([combine(each, features) for each in ways])

    def barriers(
        self, members: Bool[np.ndarray, "sets L"], alpha: Float[np.ndarray, " n #sets"], expansion: Expansion
    ) -> Float[np.ndarray, "n sets"]:
        """Barriers of sets at n positions, the same for all sets or each its own."""
        parts = []
        for rows in np.array_split(np.arange(len(members)), len(members) // _SETS_AT_ONCE + 1):
            along = alpha[:, rows] if alpha.shape[1] > 1 else alpha
            weights = barrier_weights(expansion, self.positions, along, members[rows] @ self.shares)
            parts.append(combine(weights, self._features(members[rows])))
        return np.concatenate(parts, axis=1)

    def highest(
        self, members: Bool[np.ndarray, "sets L"], expansion: Expansion
    ) -> tuple[Float[np.ndarray, " sets"], Float[np.ndarray, " sets"]]:
        """Positions and values of the maxima of sets' barriers, searched for once: tables and figures ask often."""

        def search() -> tuple[np.ndarray, np.ndarray]:
            positions = highest(lambda alpha: self.barriers(members, alpha, expansion), len(members))
            return positions, self.barriers(members, positions[None], expansion)[0]

        return self._maxima((members.shape, members.tobytes(), expansion), search)

    def batch_barriers(
        self, members: Bool[np.ndarray, " L"], alpha: float, expansion: Expansion
    ) -> Float[np.ndarray, " batches"]:
        """The barrier of a set at a position by every batch, with the weights of them all."""
        weights = barrier_weights(expansion, self.positions, np.array([alpha]), np.array([members @ self.shares]))
        return combine(weights, self._batch_features(members))

    def midpoint(self) -> tuple[float, float]:
        """The barrier of the whole network at α = 1/2, with its sign, and its standard error."""
        everything = np.ones(len(self.layers), dtype=bool)
        expansion: Expansion = "anchored" if len(self.anchors) > 2 else "second-order"
        values, weights = self.batch_barriers(everything, 0.5, expansion), next(iter(self.anchors)).projection.weights
        return float(weighted_mean(values, weights)), float(standard_error(values, weights))

    def expansion_errors(
        self, members: Bool[np.ndarray, "sets L"], alpha: Float[np.ndarray, " n #sets"]
    ) -> Float[np.ndarray, "n sets"]:
        """How far anchored barriers may be off, apart from sampling."""
        features = self._features(members)
        size, rest = members @ self.shares, 1 - alpha
        ways = disagreement_weights(self.positions, alpha, size)
        # Of the whole network at an anchor, the barrier is known.
        far = rest * self._far(alpha * size, alpha**2 * size)
        far = far + alpha * self._far(1 - rest * size, 1 - (1 - alpha**2) * size)
        found = np.stack([combine(each, features) for each in ways])
        return far * blend_error(found, self.barriers(members, alpha, "anchored"))

    def _far(self, place: np.ndarray, square: np.ndarray) -> np.ndarray:
        """How much of its error a loss has: none at an anchor, all far from them."""
        anchors = self.positions.reshape(-1, *[1] * place.ndim)
        distance = np.abs(square - 2 * anchors * place + anchors**2).min(axis=0)
        return distance / (distance + _NEAR)

    def _points(self, points: object) -> Float[np.ndarray, "n L"]:
        x = np.asarray(points, dtype=np.float64)
        if x.ndim != 2 or x.shape[1] != len(self.layers) or not ((x >= 0) & (x <= 1)).all():
            raise OptionError(
                f"points: expected an array (n, {len(self.layers)}) of numbers in [0, 1], a column a layer in the "
                f"order of prediction.layers; got one of shape {x.shape}."
            )
        return x

    def _features(self, x: Float[np.ndarray, "n L"] | Bool[np.ndarray, "n L"]) -> Features:
        first = self.anchors[0].projection.loss
        return _stacked(_features(each.loss - first, each.slopes, each.curvature, x) for _, each in self.anchors)

    def _batch_features(self, x: Float[np.ndarray, " L"] | Bool[np.ndarray, " L"]) -> Features:
        first = self.anchors[0].projection.batch_losses
        return _stacked(
            _features(each.batch_losses - first, each.batch_slopes, each.batch_curvatures, x)
            for _, each in self.anchors
        )


def blend_error(ways: Float[np.ndarray, " ways *points"], values: Float[np.ndarray, "*points"]) -> np.ndarray:
    """How far blended values may be off far from anchors.

    Args:
        ways: How far two ways to blend disagree, and then what each anchor between the ends changes.
        values: The values, which are zero at the ends.
    """
    between, *left_out = np.abs(ways)
    left_out = np.max([*left_out, np.zeros_like(between)], axis=0)
    return _BETWEEN * between + _LEFT_OUT * left_out + _SIZE * np.abs(values)


def _features(loss: float | np.ndarray, slopes: np.ndarray, curvature: np.ndarray, x: np.ndarray) -> Features:
    """Features at one anchor: of n points and the mean over the data, or of one point and every batch."""
    x = x.astype(np.float64)
    along, own = curvature.sum(axis=-1), slopes @ x.T

    def same(total: float | np.ndarray) -> np.ndarray:
        return np.broadcast_to(total, own.shape)

    totals = same(loss), same(slopes.sum(axis=-1)), same(along.sum(axis=-1))
    return Features(*totals, own, along @ x.T, ((x @ curvature) * x).sum(axis=-1))


def _stacked(anchors: Iterable[Features]) -> Features:
    return Features(*(np.stack(column) for column in zip(*anchors, strict=True)))
