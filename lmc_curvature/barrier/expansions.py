"""Barrier curves from the loss, its slopes and its curvature at anchors on a segment.

Every expansion is linear in what is known at the anchors, so a value's standard error follows from the values of the
batches.
"""

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float

from lmc_curvature.barrier.blending import Positions, Weights, quintic_weights, set_weights
from lmc_curvature.errors import OptionError

Expansion = Literal["anchored", "second-order", "with-slopes", "shared-hessian", "hermite"]
"""A formula for barrier curves; see `barrier_weights`."""
EXPANSIONS: tuple[Expansion, ...] = get_args(Expansion)

# Positions of the first search for a maximum, and how often it is made finer by a factor of a hundred.
_GRID, _REFINEMENTS = 101, 4


def barrier_weights(
    expansion: Expansion,
    positions: Positions,
    alpha: Float[np.ndarray, "*#points"],
    size: Float[np.ndarray, "*#points"],
) -> Weights:
    """Weights of the `Features` of sets of layers in their barriers B(α).

    With the loss ℓ, the slope g and the curvature c along a set's displacement at the two ends, 0 and 1:

    - `"anchored"`: blended from Taylor expansions at all anchors, see `blending`;
    - `"second-order"`: α(1−α)/2 · (α c₀ + (1−α) c₁), Propositions 1 and 2 of Singh et al. 2024;
    - `"with-slopes"`: second order + α(1−α)(g₀ − g₁), for ends that are not stationary;
    - `"shared-hessian"`: α(1−α)/2 · c₀, their eq. 19–21;
    - `"hermite"`: the quintic through ℓ, g and c at the anchors on either side of α, minus the chord; for the whole
      network only, where `"anchored"` is the same.

    Args:
        expansion: The formula.
        positions: The anchors, rising from 0 to 1.
        alpha: α of each point.
        size: What the set has of the layers' energy, Σ_{ℓ∈S} e_ℓ; `"anchored"` alone looks at it.
    """
    if expansion == "anchored":
        return set_weights(positions, alpha, size)
    weights = np.zeros((6, len(positions), *np.broadcast_shapes(np.shape(alpha), np.shape(size))))
    parabola = alpha * (1 - alpha)
    if expansion == "hermite":
        weights[:3] = quintic_weights(positions, np.broadcast_to(alpha, weights.shape[2:]))
        weights[0, 0] -= 1 - alpha
        weights[0, -1] -= alpha
    elif expansion == "shared-hessian":
        weights[5, 0] = parabola / 2
    else:
        weights[5, 0], weights[5, -1] = parabola * alpha / 2, parabola * (1 - alpha) / 2
        if expansion == "with-slopes":
            weights[3, 0], weights[3, -1] = parabola, -parabola
    return weights


def highest(
    curves: Callable[[Float[np.ndarray, "n sets"]], Float[np.ndarray, "n sets"]], count: int
) -> Float[np.ndarray, " sets"]:
    """Positions of the maxima over [0, 1] of several barrier curves; 0 for those that nowhere rise above the chord.

    Args:
        curves: The curves' values at n positions each.
        count: How many curves there are.
    """
    # Dense towards the ends, where a curve that is below the chord otherwise may rise for a little.
    grid = np.repeat((1 - np.cos(np.linspace(0, np.pi, _GRID)[:, None])) / 2, count, axis=1)
    found, width = grid[curves(grid).argmax(axis=0), np.arange(count)], np.pi / 2 / (_GRID - 1)
    for _ in range(_REFINEMENTS):
        grid = np.clip(found + np.linspace(-width, width, 201)[:, None], 0.0, 1.0)
        found = grid[curves(grid).argmax(axis=0), np.arange(count)]
        width /= 100
    # Curves vanish at both ends.
    return np.where(curves(found[None])[0] > 0, found, 0.0)


def check_alphas(alphas: object) -> Float[np.ndarray, " n"]:
    """Positions on the segment, checked, as an array.

    Raises:
        OptionError: They are not numbers in [0, 1], or there is none; names the offending one.
    """
    try:
        positions = np.atleast_1d(np.asarray(alphas, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise OptionError(f"alphas={alphas!r}: expected a sequence of numbers in [0, 1].") from error
    if positions.ndim != 1 or positions.size == 0:
        raise OptionError(f"alphas has shape {positions.shape}; expected a sequence of numbers in [0, 1].")
    outside = positions[~((positions >= 0) & (positions <= 1))]
    if outside.size:
        raise OptionError(f"alpha={outside[0]} lies outside the segment; expected numbers in [0, 1].")
    return positions


def check_anchors(anchors: object) -> Positions:
    """The anchors of a prediction: that many, evenly spaced, or the positions themselves, which include both ends.

    Raises:
        OptionError: They are not a number of at least 2, or positions that rise from 0 to 1.
    """
    if isinstance(anchors, (int, np.integer)) and not isinstance(anchors, bool):
        if anchors < 2:
            raise OptionError(f"anchors={anchors}: at least the two networks are needed, 2.")
        return np.linspace(0.0, 1.0, int(anchors))
    try:
        positions = np.asarray(anchors, dtype=np.float64)
        fit = positions.ndim == 1 and len(positions) > 1 and positions[0] == 0 and positions[-1] == 1
        fit = bool(fit and (np.diff(positions) > 0).all())
    except (TypeError, ValueError):
        positions, fit = np.empty(0), False
    if not fit:
        raise OptionError(
            f"anchors={anchors!r}: expected a number of anchors, or positions that rise from 0 to 1, as in [0, 0.3, 1]."
        )
    return positions
