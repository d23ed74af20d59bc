"""The loss anywhere in the cube of layers, from Taylor expansions at anchors on its diagonal.

At each anchor a the loss ℓ_a, the slopes s_a (L,) and the curvature M_a (L, L) along the layers' coordinates are known.
Two ways from the diagonal to a point x of the cube are mixed. With e a share of each layer, Σ_ℓ e_ℓ = 1, with the
point's place on the diagonal t = Σ_ℓ e_ℓ x_ℓ, and with its squared distance from an anchor d_a² = Σ_ℓ e_ℓ (x_ℓ − a)²:

    blended     ℓ_S(x) = Σ_a ω_a T_a(x),  ω_a ∝ d_a⁻³,  T_a(x) = ℓ_a + s_aᵀ(x − a1) + ½ (x − a1)ᵀ M_a (x − a1)
    expanded    ℓ_D(x) = q(t) + s(t)ᵀ(x − t1) + ½ (x − t1)ᵀ M(t) (x − t1)
    loss        ℓ̂(x) = λ ℓ_S(x) + (1 − λ) ℓ_D(x)

The first is modified Shepard interpolation (Ischtwan and Collins 1994, who build molecular potential surfaces so). In
the second, q is the piecewise quintic through losses, slopes and curvatures on the diagonal, s the piecewise cubic
through the slopes with derivatives M_a 1, and M is linear in t. Both have the right value, slope and curvature at every
anchor. Rectifiers make the pointwise curvature of ℓ_D miss the kinks that lie off the diagonal; ℓ_S sees too much of
far anchors near the ends of the segment and on the diagonal, so its share λ goes to zero there. `docs/results.md` shows
what the choice of λ and of the exponent rests on.

All of this is linear in what is known at the anchors, with weights that depend on x through t and Σ_ℓ e_ℓ x_ℓ² alone.
So a set of layers, whose points are x = α 1_S and x = 1 − (1−α) 1_S, needs five sums an anchor whatever α is, and the
values of batches give standard errors, with the weights held fixed.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

_EXPONENT = 3.0
# The largest share of ℓ_S; how near the ends of the segment it sets in, in distances to the next anchor; and how near
# the diagonal, as a part of the largest variance that a point's coordinates can have.
_SHARE, _RAMP, _DIAGONAL = 0.7, 0.4, 0.03

Positions = Float[np.ndarray, " anchors"]
Weights = Float[np.ndarray, "features anchors *points"]


class Features(NamedTuple):
    """What ℓ̂ is linear in: an array each, anchors first; points, sets or batches may follow.

    Attributes:
        loss: ℓ_a; of barriers, less the first anchor's, so that equal losses make none, to the last bit.
        slope: 1ᵀs_a, along the diagonal.
        curvature: 1ᵀM_a1, along the diagonal.
        own_slope: xᵀs_a, of a point or of a set's indicator.
        cross_curvature: xᵀM_a1.
        own_curvature: xᵀM_ax.
    """

    loss: np.ndarray
    slope: np.ndarray
    curvature: np.ndarray
    own_slope: np.ndarray
    cross_curvature: np.ndarray
    own_curvature: np.ndarray


def layer_shares(curvatures: Float[np.ndarray, "anchors L L"]) -> Float[np.ndarray, " L"]:
    """The metric e: each layer's mean |M[ℓ,ℓ]| at the two ends, as a share; equal shares if all are zero."""
    energy = np.abs(np.einsum("all->al", curvatures[[0, -1]])).mean(axis=0)
    energy = np.maximum(energy, 1e-6 * energy.mean())
    return energy / energy.sum() if energy.any() else np.full(len(energy), 1 / len(energy))


def point_weights(
    positions: Positions,
    place: Float[np.ndarray, "*points"],
    square: Float[np.ndarray, "*points"],
    share: float | None = None,
) -> Weights:
    """Weights of the `Features` of points in their ℓ̂.

    Args:
        positions: The anchors a, rising from 0 to 1.
        place: t = Σ_ℓ e_ℓ x_ℓ of each point.
        square: Σ_ℓ e_ℓ x_ℓ² of each point.
        share: λ, the same for all points instead of each point's own.
    """
    anchors = positions.reshape(-1, *[1] * place.ndim)
    mix = _share(positions, place, square) if share is None else np.full(place.shape, share)
    blended = mix * _nearness(square - 2 * anchors * place + anchors**2)
    quintic = (1 - mix) * quintic_weights(positions, place)
    slope, turn = (1 - mix) * _cubic_weights(positions, place)
    bend = (1 - mix) * _linear_weights(positions, place)
    return np.stack(
        [
            blended + quintic[0],
            -anchors * blended + quintic[1] - place * slope,
            anchors**2 / 2 * blended + quintic[2] - place * turn + place**2 / 2 * bend,
            blended + slope,
            -anchors * blended + turn - place * bend,
            (blended + bend) / 2,
        ]
    )


def set_weights(
    positions: Positions,
    alpha: Float[np.ndarray, "*#points"],
    size: Float[np.ndarray, "*#points"],
    share: float | None = None,
) -> Weights:
    """Weights of the `Features` of sets of layers in the barrier (1−α) ℓ̂(α 1_S) + α ℓ̂(1 − (1−α) 1_S) − chord.

    Args:
        positions: The anchors a, rising from 0 to 1.
        alpha: α of each point.
        size: Σ_{ℓ∈S} e_ℓ of each point's set, or an array that broadcasts against `alpha`.
        share: λ, the same for all points instead of each point's own.
    """
    alpha, size = np.broadcast_arrays(alpha, size)
    rest = 1 - alpha
    near = rest * point_weights(positions, alpha * size, alpha**2 * size, share)
    far = alpha * point_weights(positions, 1 - rest * size, 1 - (1 - alpha**2) * size, share)
    weights = np.stack(
        [
            near[0] + far[0],
            near[1] + far[1] + far[3],
            near[2] + far[2] + far[4] + far[5],
            alpha * near[3] - rest * far[3],
            alpha * near[4] - rest * (far[4] + 2 * far[5]),
            alpha**2 * near[5] + rest**2 * far[5],
        ]
    )
    weights[0, [0, -1]] -= np.stack([rest, alpha])
    return weights


def disagreement_weights(
    positions: Positions, alpha: Float[np.ndarray, "*#points"], size: Float[np.ndarray, "*#points"]
) -> list[Weights]:
    """Weights of the `Features` in differences of barriers that say how far to trust `set_weights`.

    The first is of the two ways from the diagonal, blended minus expanded; each other leaves one of the anchors between
    the ends out.
    """
    return _disagreements(positions, lambda some, share: set_weights(some, alpha, size, share))


def point_disagreement_weights(
    positions: Positions, place: Float[np.ndarray, "*points"], square: Float[np.ndarray, "*points"]
) -> list[Weights]:
    """Weights of the `Features` in differences of losses, as `disagreement_weights` has them for barriers of sets."""
    return _disagreements(positions, lambda some, share: point_weights(some, place, square, share))


def _disagreements(positions: Positions, weights: Callable[[Positions, float | None], Weights]) -> list[Weights]:
    found = [weights(positions, 1.0) - weights(positions, 0.0)]
    whole = weights(positions, None)
    for left_out in range(1, len(positions) - 1):
        others = np.delete(np.arange(len(positions)), left_out)
        fewer = np.zeros_like(whole)
        fewer[:, others] = weights(positions[others], None)
        found.append(whole - fewer)
    return found


def combine(weights: Float[np.ndarray, "features anchors *#points"], features: Features) -> np.ndarray:
    """Σ over features and anchors of weight times feature."""
    pairs = zip(weights, features, strict=True)
    return np.sum([np.einsum("a...,a...->...", weight, np.asarray(feature)) for weight, feature in pairs], axis=0)


def quintic_weights(positions: Positions, t: Float[np.ndarray, "*points"]) -> Float[np.ndarray, "3 anchors *points"]:
    """Weights of ℓ_a, 1ᵀs_a and 1ᵀM_a1 in q(t), the quintic through all three at the anchors on either side of t."""
    before, u, h = _interval(positions, t)
    first = [
        1 - 10 * u**3 + 15 * u**4 - 6 * u**5,
        h * (u - 6 * u**3 + 8 * u**4 - 3 * u**5),
        h**2 * (u**2 - 3 * u**3 + 3 * u**4 - u**5) / 2,
    ]
    second = [
        10 * u**3 - 15 * u**4 + 6 * u**5,
        h * (-4 * u**3 + 7 * u**4 - 3 * u**5),
        h**2 * (u**3 - 2 * u**4 + u**5) / 2,
    ]
    return np.stack([_placed(len(positions), before, *pair) for pair in zip(first, second, strict=True)])


def _cubic_weights(positions: Positions, t: Float[np.ndarray, "*points"]) -> Float[np.ndarray, "2 anchors *points"]:
    """Weights of values and derivatives at the anchors in the piecewise cubic through them."""
    before, u, h = _interval(positions, t)
    values = _placed(len(positions), before, (1 + 2 * u) * (1 - u) ** 2, u**2 * (3 - 2 * u))
    derivatives = _placed(len(positions), before, h * u * (1 - u) ** 2, h * u**2 * (u - 1))
    return np.stack([values, derivatives])


def _linear_weights(positions: Positions, t: Float[np.ndarray, "*points"]) -> Float[np.ndarray, " anchors *points"]:
    before, u, _ = _interval(positions, t)
    return _placed(len(positions), before, 1 - u, u)


def _interval(
    positions: Positions, t: Float[np.ndarray, "*points"]
) -> tuple[np.ndarray, Float[np.ndarray, "*points"], Float[np.ndarray, "*points"]]:
    """The anchor before each t, how far t lies behind it as a part of the way to the next, and the length of that."""
    before = np.clip(np.searchsorted(positions, t, side="right") - 1, 0, len(positions) - 2)
    length = np.diff(positions)[before]
    return before, (t - positions[before]) / length, length


def _placed(
    anchors: int, before: np.ndarray, first: Float[np.ndarray, "*points"], second: Float[np.ndarray, "*points"]
) -> Float[np.ndarray, " anchors *points"]:
    """Weights of the anchors before and after each point, among zeros for all others."""
    number = np.arange(anchors).reshape(-1, *[1] * before.ndim)
    return np.where(number == before, first, 0.0) + np.where(number == before + 1, second, 0.0)


def _nearness(squares: Float[np.ndarray, " anchors *points"]) -> Float[np.ndarray, " anchors *points"]:
    """ω_a: inverse powers of the distances, relative to the nearest anchor's; that alone where the distance is zero."""
    squares = np.maximum(squares, 1e-30)
    inverse = (squares.min(axis=0) / squares) ** (_EXPONENT / 2)
    return inverse / inverse.sum(axis=0)


def _share(
    positions: Positions, place: Float[np.ndarray, "*points"], square: Float[np.ndarray, "*points"]
) -> Float[np.ndarray, "*points"]:
    """λ: zero at the ends of the segment and on the diagonal."""
    gaps = np.diff(positions)
    ramp = np.minimum(place / gaps[0], (1 - place) / gaps[-1]) / _RAMP
    most = place * (1 - place)
    spread = np.maximum(square - place**2, 0.0) / np.maximum(most, 1e-30)
    return _SHARE * np.clip(ramp, 0.0, 1.0) * spread / (spread + _DIAGONAL)
