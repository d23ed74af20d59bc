"""Predicted rises of the loss where a set of layers is averaged, for each base of the merge.

A merge makes one network: the layers of a set S halfway between the two, and all others those of its base. In the cube
of layers that is x = ½ 1_S for base a and x = 1 − ½ 1_S for base b. The rise is the loss there minus the mean loss of
the two networks; for the mean of both bases it is the barrier B_S(½).
"""

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from lmc_curvature.averages import standard_error, with_error
from lmc_curvature.barrier import BarrierPrediction
from lmc_curvature.barrier.verdict import look_unrelated

Base = Literal["a", "b", "mean"]
"""Whose the other layers are: `model_a`'s, `model_b`'s, or the mean of both merges."""
BASES: tuple[Base, ...] = ("a", "b", "mean")

# Relative to a rise, what the expansion errors of evaluated points may be by rounding.
_EVALUATED = 1e-12


def points_of(members: Bool[np.ndarray, "sets L"], base: Base) -> list[Float[np.ndarray, "sets L"]]:
    """The points of the cube whose mean rise is that of each set: one, or two for the mean."""
    near = members / 2
    return {"a": [near], "b": [1 - near], "mean": [near, 1 - near]}[base]


def set_rises(prediction: BarrierPrediction, members: Bool[np.ndarray, "sets L"], base: Base) -> np.ndarray:
    """Predicted rise of each set, (sets,)."""
    if base == "mean":
        return prediction.set_barriers(members, expansion="anchored")
    (points,) = points_of(members, base)
    return point_rises(prediction, points)


def set_errors(prediction: BarrierPrediction, members: Bool[np.ndarray, "sets L"], base: Base) -> np.ndarray:
    """Expansion errors of `set_rises`, (sets,): nine sets in ten on related networks are off by less."""
    if base == "mean":
        return prediction.set_expansion_errors(members)
    (points,) = points_of(members, base)
    return prediction.loss_errors(points)


def point_rises(prediction: BarrierPrediction, points: Float[np.ndarray, "n L"]) -> Float[np.ndarray, " n"]:
    """Predicted loss at points of the cube, minus the mean loss of the two networks."""
    return prediction.loss_at(points) - mean_loss(prediction)


def sampling_error(prediction: BarrierPrediction, points: list[Float[np.ndarray, " L"]]) -> float:
    """Standard error of the mean rise at a few points; NaN for a single batch."""
    first, second = prediction.endpoints
    batches = np.mean([prediction.batch_losses(point) for point in points], axis=0)
    return float(standard_error(batches - (first.batch_losses + second.batch_losses) / 2, first.weights))


def rise_in_words(
    prediction: BarrierPrediction, rise: float, standard_error: float, expansion_error: float, digits: int = 4
) -> str:
    """A predicted rise with both of its errors, and whether to rely on it."""
    found = with_error(rise, standard_error, digits, of="sampling")
    # At an anchor the loss was evaluated.
    if expansion_error <= _EVALUATED * (1 + abs(rise)):
        return found
    found += f", expansion error about {expansion_error:.2g}"
    return found + (", unreliable between different initialisations: measure" if look_unrelated(prediction) else "")


def mean_loss(prediction: BarrierPrediction) -> float:
    """Mean loss of the two networks."""
    first, second = prediction.endpoints
    return (first.loss + second.loss) / 2
