"""What a prediction says in words: whether two networks can be averaged, and how far to trust that."""

from typing import TYPE_CHECKING

import numpy as np

from lmc_curvature.averages import with_error
from lmc_curvature.barrier.expansions import Expansion
from lmc_curvature.barrier.losses import data_in_words
from lmc_curvature.barrier.midpoint import Midpoint, answer, percent, predicted_midpoint, question
from lmc_curvature.errors import counted

if TYPE_CHECKING:
    from lmc_curvature.barrier.prediction import BarrierPrediction

# Unrelated networks have weights at right angles, up to what few parameters do by chance; siblings that were trained
# for long after an early fork come near.
_UNRELATED = 0.05
# Sets of layers are known to this part of their barrier, in the median, or are better measured.
_TRUSTED = 0.5
_SETS = 200


def summary(prediction: "BarrierPrediction") -> str:
    """The prediction's numbers, a line each, its notes, and its verdict."""
    first, second = prediction.endpoints
    barriers = prediction.layer_barriers()
    highest = np.argsort(barriers, kind="stable")[::-1][:3]
    positions = ", ".join(f"{anchor.alpha:.3g}" for anchor in prediction.anchors)
    lines = [
        f"Barrier predicted from "
        f"{data_in_words(prediction.examples, prediction.endpoints[0].weights, prediction.loss)}, "
        f"{counted(len(prediction.layers), 'layer')}, anchors at {positions}, batch_norm={prediction.batch_norm!r}"
        + (" (differentiated through batch statistics)" if prediction.batch_norm == "recalibrate" else ""),
        f"  loss at the ends   {first.loss:.4g}, {second.loss:.4g}; distance {prediction.distance:.4g}",
        *(f"  {expansion:<18} {barrier_in_words(prediction, expansion)}" for expansion in prediction.expansions),
        "  highest layers     " + ", ".join(f"{prediction.layers[index]} {barriers[index]:.4g}" for index in highest),
        *(f"  {note}" for note in prediction.notes),
        "Verdict: " + " ".join(verdict(prediction)),
    ]
    return "\n".join(lines)


def verdict(prediction: "BarrierPrediction") -> list[str]:
    """Sentences: whether to average the two, what is known of the average, how far to trust sets, what to do next.

    The answer is that of the midpoint as it was evaluated. It is none, but a question, where both networks are useless
    on the data.
    """
    midpoint, errors = predicted_midpoint(prediction), prediction.errors
    doubt = question([end.loss for end in prediction.endpoints], None if errors is None else list(errors[[0, -1]]))
    found = [] if doubt is None else [doubt]
    if midpoint is None:
        found.append(
            "The averaged network was not evaluated, only expanded from the anchors: predict with anchors=3, or call "
            "`measure_barrier`."
        )
    else:
        facts = _average(midpoint, prediction.batch_norm)
        said, advice = answer(midpoint)
        found += [said, facts, advice] if doubt is None else [facts]
    return found + trust(prediction)


def trust(prediction: "BarrierPrediction") -> list[str]:
    """Sentences: how far to trust what is predicted for sets of layers."""
    found = _trust_in_sets(prediction) if prediction.expansion == "anchored" else []
    if look_unrelated(prediction):
        found.append(
            f"The two look as if they came from different initialisations (the cosine of their weights is "
            f"{prediction.cosine:.2g}; siblings share a beginning): align their units first (permutation matching, "
            "such as Git Re-Basin; not part of this library)."
        )
    return found


def look_unrelated(prediction: "BarrierPrediction") -> bool:
    """Whether two networks look as if they came from different initialisations: weights at right angles, nearly."""
    return prediction.cosine is not None and prediction.cosine < _UNRELATED


def _average(midpoint: Midpoint, batch_norm: str) -> str:
    """What is known of the network in the middle, which is an anchor."""
    first, second = midpoint.ends
    barrier = with_error(midpoint.rise, midpoint.standard_error, 3, of="standard error")
    where = "evaluated at α = 1/2 on the data given"
    if batch_norm == "recalibrate":
        where += ", normalised by each batch"
    found = f"The averaged network has a loss of {midpoint.loss:.4g} ({where}); the two have {first:.4g} and "
    found += f"{second:.4g}, so the barrier there is {barrier}"
    if midpoint.errors is not None:
        *ends, own = map(percent, midpoint.errors)
        found += f", and it errs on {own} (the two on {ends[0]} and {ends[1]})"
    return f"{found}."


def _trust_in_sets(prediction: "BarrierPrediction") -> list[str]:
    members = _some_sets(len(prediction.layers))
    barriers = prediction.set_barriers(members)
    errors = prediction.set_expansion_errors(members)
    relative = float(np.median(errors / np.maximum(np.abs(barriers), 1e-12)))
    if relative > _TRUSTED:
        found = [
            "What is predicted for sets of layers hardly says more than its sign (the anchors disagree): measure them, "
            "by `measure_barrier` or the selection's `verify`."
        ]
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


def barrier_in_words(prediction: "BarrierPrediction", expansion: Expansion) -> str:
    """The highest point of a curve; where nothing rises, its value in the middle, with its sign."""
    barrier, error = prediction.barrier(None, expansion), prediction.standard_error(None, expansion)
    if barrier > 0:
        found = f"{with_error(barrier, error)} at α = {prediction.position(None, expansion):.2g}"
        return (
            f"{found}, expansion error about {prediction.expansion_error():.2g}" if expansion == "anchored" else found
        )
    middle = float(prediction.curve([0.5], None, expansion)[0])
    return f"{with_error(middle, error)} (nowhere above the chord; at α = 1/2)"
