"""What a prediction says in words: whether two networks can be averaged, and how far to trust that."""

import math
from typing import TYPE_CHECKING

import numpy as np

from lmc_curvature.averages import with_error
from lmc_curvature.barrier.expansions import Expansion
from lmc_curvature.errors import counted

if TYPE_CHECKING:
    from lmc_curvature.barrier.prediction import BarrierPrediction

# Unrelated networks have weights at right angles, up to what few parameters do by chance; siblings that were trained
# for long after an early fork come near.
_UNRELATED = 0.05
# Sets of layers are known to this part of their barrier, in the median, or are better measured.
_TRUSTED = 0.5
# A rise of the loss by this part of the ends' is one.
_RISE = 0.02
_SETS = 200


def summary(prediction: "BarrierPrediction") -> str:
    """The prediction's numbers, a line each, its notes, and its verdict."""
    first, second = prediction.endpoints
    barriers = prediction.layer_barriers()
    highest = np.argsort(barriers, kind="stable")[::-1][:3]
    positions = ", ".join(f"{anchor.alpha:.3g}" for anchor in prediction.anchors)
    lines = [
        f"Barrier predicted from {counted(prediction.examples, 'example')}, "
        f"{counted(len(prediction.layers), 'layer')}, anchors at {positions}, batch_norm={prediction.batch_norm!r}"
        + (" (differentiated through batch statistics)" if prediction.batch_norm == "recalibrate" else ""),
        f"  loss at the ends   {first.loss:.4g}, {second.loss:.4g}; distance {prediction.distance:.4g}",
        *(f"  {expansion:<18} {_barrier(prediction, expansion)}" for expansion in prediction.expansions),
        "  highest layers     " + ", ".join(f"{prediction.layers[index]} {barriers[index]:.4g}" for index in highest),
        *(f"  {note}" for note in prediction.notes),
        "Verdict: " + " ".join(verdict(prediction)),
    ]
    return "\n".join(lines)


def verdict(prediction: "BarrierPrediction") -> list[str]:
    """Sentences: the averaged network's loss and barrier, how far sets of layers can be trusted, what to do next."""
    middle = next((n for n, anchor in enumerate(prediction.anchors) if anchor.alpha == 0.5), None)
    if middle is None:
        found = [
            "The averaged network was not evaluated, only expanded from the two: predict with anchors=3, or measure."
        ]
    else:
        found = _average(prediction, middle)
    if prediction.expansion == "anchored":
        found += _trust(prediction)
    if prediction.cosine is not None and prediction.cosine < _UNRELATED:
        found.append(
            f"The two look as if they came from different initialisations (the cosine of their weights is "
            f"{prediction.cosine:.2g}; siblings share a beginning): align their units first."
        )
    return found


def _average(prediction: "BarrierPrediction", middle: int) -> list[str]:
    """What is known of the network in the middle, which is an anchor."""
    loss, (first, second) = prediction.anchors[middle].projection.loss, prediction.endpoints
    mean = (first.loss + second.loss) / 2
    barrier = float(prediction.curve([0.5])[0])
    error = prediction.standard_error(alpha=0.5)
    where = "evaluated at α = 1/2 on the data given"
    if prediction.batch_norm == "recalibrate":
        where += ", normalised by each batch"
    found = f"The averaged network has a loss of {loss:.4g} ({where}); the two have {first.loss:.4g} and "
    found += f"{second.loss:.4g}, so the barrier is {with_error(barrier, error, 3)}"
    if prediction.errors is not None:
        errors = [f"{100 * prediction.errors[number]:.3g} %" for number in (middle, 0, -1)]
        found += f", and it errs on {errors[0]} (the two on {errors[1]} and {errors[2]})"
    noise = 2 * error if math.isfinite(error) else 0.0
    low = barrier <= max(noise, _RISE * abs(mean))
    sign = "They can be averaged." if low else "Averaging all layers costs that much; fewer layers may cost less."
    if low and barrier < -noise:
        sign = "They can be averaged, and the average is better than the two are on the whole."
    return [f"{found}.", sign]


def _trust(prediction: "BarrierPrediction") -> list[str]:
    members = _some_sets(len(prediction.layers))
    barriers = prediction.set_barriers(members)
    errors = prediction.set_expansion_errors(members)
    relative = float(np.median(errors / np.maximum(np.abs(barriers), 1e-12)))
    if relative > _TRUSTED:
        found = ["What is predicted for sets of layers hardly says more than its sign (the anchors disagree): measure."]
    else:
        found = [f"Barriers of sets of layers are predicted to about {100 * relative:.0f} % (expansion error)."]
    points = np.concatenate([members / 2, 1 - members / 2])
    if min(anchor.projection.loss for anchor in prediction.anchors) >= 0 and (prediction.loss_at(points) < 0).any():
        found.append("Some sets are predicted to have a loss below zero, which is a sign of distrust.")
    return found


def _some_sets(layers: int) -> np.ndarray:
    """Each layer, all but each, and random sets of any size."""
    rng = np.random.default_rng(0)
    each = np.eye(layers, dtype=bool)
    random = rng.random((_SETS, layers)) < rng.random((_SETS, 1))
    found = np.concatenate([each, ~each, random])
    return found[found.any(axis=1)]


def _barrier(prediction: "BarrierPrediction", expansion: Expansion) -> str:
    """The highest point of a curve; where nothing rises, its value in the middle, with its sign."""
    barrier, error = prediction.barrier(None, expansion), prediction.standard_error(None, expansion)
    if barrier > 0:
        found = with_error(barrier, error)
        return f"{found}, expansion ± {prediction.expansion_error():.2g}" if expansion == "anchored" else found
    middle = float(prediction.curve([0.5], None, expansion)[0])
    return f"{with_error(middle, error)} (nowhere above the chord; at α = 1/2)"
