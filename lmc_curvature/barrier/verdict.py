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
# A rise of the loss costs nothing up to this part of one more than the ends' mean loss, and a price up to this part of
# that loss. A rise of the error by so much costs something; below that, whatever the loss, no more than a price; and
# above so much, it is too high a price.
_FREE, _PRICE, _POINT, _HARM = 0.02, 0.5, 0.01, 0.1
# Networks that err on so much, or have such losses as classifiers, have not learned what they are shown.
_HOPELESS, _FAR_OFF = 0.8, 10.0
# Ratios of losses are told up to this; above, and of losses below zero, the losses themselves are.
_RATIO = 10.0
_SETS = 200
_SELECT = "`select_layers(prediction, relative_budget=0.1)` (on the command line `lmc-curvature select`)"
_DOUBT = "are data, labels and normalisation those they were trained with?"


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
    middle = next((n for n, anchor in enumerate(prediction.anchors) if math.isclose(anchor.alpha, 0.5)), None)
    question = _question(prediction)
    found = [] if question is None else [question]
    if middle is None:
        found.append(
            "The averaged network was not evaluated, only expanded from the anchors: predict with anchors=3, or call "
            "`measure_barrier`."
        )
    else:
        answer, advice = _answer(prediction, middle)
        facts = _average(prediction, middle)
        found += [answer, facts, advice] if question is None else [facts]
    if prediction.expansion == "anchored":
        found += _trust(prediction)
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


def _question(prediction: "BarrierPrediction") -> str | None:
    """What to ask first where both networks are useless on the data, as far as their errors tell."""
    if prediction.errors is None:
        return None
    errors, losses = prediction.errors[[0, -1]], [end.loss for end in prediction.endpoints]
    if min(errors) >= _HOPELESS:
        return f"Both networks err on {_both([_percent(error) for error in errors])}: {_DOUBT}"
    if min(losses) > _FAR_OFF:
        return f"Both networks have a loss of {_both([f'{loss:.3g}' for loss in losses])}: {_DOUBT}"
    return None


def _both(texts: list[str]) -> str:
    return texts[0] if texts[0] == texts[1] else " and ".join(texts)


def _answer(prediction: "BarrierPrediction", middle: int) -> tuple[str, str]:
    """Whether to average all layers, and what to do next."""
    mean, rise, noise = _mean_loss(prediction), float(prediction.curve([0.5])[0]), _noise(prediction)
    before, after = _errors(prediction, middle) or (0.0, 0.0)
    changes = _changes(prediction, middle)
    # Of few examples, errors differ by more by chance.
    chance = 2 * math.sqrt(after * (1 - after) / prediction.examples)
    is_free, is_alike = rise <= _FREE * (1 + abs(mean)), after - before < max(_POINT, chance)
    if is_alike and rise <= noise and not is_free:
        # A large sampling error makes no average a good one.
        return (
            f"These data do not tell: {changes}, which is within twice its sampling error.",
            "Next: predict from more batches, or from smaller ones, whose spread tells more.",
        )
    if is_alike and is_free:
        word = "Yes, and the average is better than the two are on the whole" if rise < -noise else "Yes"
        return (
            f"{word}: {changes}.",
            "Next: `merge`, and `measure_barrier` on data that neither network was trained on.",
        )
    is_small = prediction.errors is not None and after - before < _POINT
    is_price = rise <= _PRICE * abs(mean) and after - before <= _HARM
    word = "At a cost" if is_small or is_price else "No"
    return f"{word}: {changes}.", f"Fewer layers may cost less: {_SELECT} finds which."


def _changes(prediction: "BarrierPrediction", middle: int) -> str:
    """Loss and error of the average, each beside the mean of the two."""
    mean, loss = _mean_loss(prediction), prediction.anchors[middle].projection.loss
    if mean > 0 and 0 <= loss <= _RATIO * mean:
        # Adding zero takes the sign from -0.
        found = f"{round(100 * (loss / mean - 1), 1) + 0.0:+.3g} % loss"
    else:
        found = f"loss {mean:.3g} → {loss:.3g}"
    errors = _errors(prediction, middle)
    if errors is None:
        return found
    texts = [_percent(error) for error in errors]
    return f"{found}, error{' unchanged' if texts[0] == texts[1] else ''} ({' → '.join(texts)})"


def _errors(prediction: "BarrierPrediction", middle: int) -> tuple[float, float] | None:
    """The mean of both networks' errors, and that of the average."""
    errors = prediction.errors
    return None if errors is None else (float(errors[0] + errors[-1]) / 2, float(errors[middle]))


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _mean_loss(prediction: "BarrierPrediction") -> float:
    return sum(end.loss for end in prediction.endpoints) / 2


def _noise(prediction: "BarrierPrediction") -> float:
    """Twice the standard error of the rise in the middle; 0 where a single batch does not tell it."""
    error = prediction.standard_error(alpha=0.5)
    return 2 * error if math.isfinite(error) else 0.0


def _average(prediction: "BarrierPrediction", middle: int) -> str:
    """What is known of the network in the middle, which is an anchor."""
    loss, (first, second) = prediction.anchors[middle].projection.loss, prediction.endpoints
    barrier = with_error(float(prediction.curve([0.5])[0]), prediction.standard_error(alpha=0.5), 3)
    where = "evaluated at α = 1/2 on the data given"
    if prediction.batch_norm == "recalibrate":
        where += ", normalised by each batch"
    found = f"The averaged network has a loss of {loss:.4g} ({where}); the two have {first.loss:.4g} and "
    found += f"{second.loss:.4g}, so the barrier is {barrier}"
    if prediction.errors is not None:
        errors = [_percent(prediction.errors[number]) for number in (middle, 0, -1)]
        found += f", and it errs on {errors[0]} (the two on {errors[1]} and {errors[2]})"
    return f"{found}."


def _trust(prediction: "BarrierPrediction") -> list[str]:
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
        found = with_error(barrier, error)
        return (
            f"{found}, expansion error about {prediction.expansion_error():.2g}" if expansion == "anchored" else found
        )
    middle = float(prediction.curve([0.5], None, expansion)[0])
    return f"{with_error(middle, error)} (nowhere above the chord; at α = 1/2)"
