"""The network halfway between two, as it was evaluated, and what it says: whether to average them."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lmc_curvature.averages import standard_error, weighted_mean
from lmc_curvature.barrier.losses import unit_of

if TYPE_CHECKING:
    from lmc_curvature.barrier.measurement import BarrierMeasurement
    from lmc_curvature.barrier.prediction import BarrierPrediction

# A rise of the loss costs nothing up to this part of one more than the ends' mean loss, and a price up to this part of
# that loss. A rise of the error by so much costs something; below that, whatever the loss, no more than a price; and
# above so much, it is too high a price.
_FREE, _PRICE, _POINT, _HARM = 0.02, 0.5, 0.01, 0.1
# Networks that err on so much, or have such losses as classifiers, have not learned what they are shown.
_HOPELESS, _FAR_OFF = 0.8, 10.0
# Ratios of losses are told up to this, and where what counts as no rise is less than this part of the mean loss; else,
# and of losses below zero, the losses themselves are; changes by less than the last are none.
_RATIO, _TINY, _NOTHING = 10.0, 0.1, 5e-4
_SELECT = "`select_layers(prediction, relative_budget=0.1)` (on the command line `lmc-curvature select`)"
_DOUBT = "are data, labels and normalisation those they were trained with?"


class Midpoint(NamedTuple):
    """The network halfway between two, as it was evaluated.

    Attributes:
        ends: Losses of the two networks.
        loss: Its own.
        rise: Its loss above the mean of theirs.
        standard_error: Sampling error of the rise; NaN where a single batch does not tell it.
        errors: The share of the examples on which the two networks and itself err; None where that is not known.
        examples: Number of examples.
        unit: What the examples are counted in, see `unit_of`.
        gap_error: Sampling error of its loss above that of the better of the two networks; NaN likewise.
    """

    ends: tuple[float, float]
    loss: float
    rise: float
    standard_error: float
    errors: tuple[float, float, float] | None
    examples: float
    unit: str = "example"
    gap_error: float = math.nan

    @property
    def mean(self) -> float:
        """Mean loss of the two networks."""
        return sum(self.ends) / 2

    @property
    def mean_error(self) -> float | None:
        """Mean error of the two networks."""
        return None if self.errors is None else (self.errors[0] + self.errors[1]) / 2


def predicted_midpoint(prediction: "BarrierPrediction") -> Midpoint | None:
    """The midpoint where it is an anchor of a prediction, None where it is not."""
    for number, (alpha, projection) in enumerate(prediction.anchors):
        if math.isclose(alpha, 0.5):
            first, second = prediction.endpoints
            errors = None
            if prediction.errors is not None:
                errors = (float(prediction.errors[0]), float(prediction.errors[-1]), float(prediction.errors[number]))
            rise, error = float(prediction.curve([0.5])[0]), prediction.standard_error(alpha=0.5)
            ends = (first.loss, second.loss)
            gaps = projection.batch_losses - prediction.endpoints[_better(ends)].batch_losses
            gap_error = float(standard_error(gaps, first.weights))
            return Midpoint(
                ends, projection.loss, rise, error, errors, prediction.examples, unit_of(prediction.loss), gap_error
            )
    return None


def measured_midpoint(measurement: "BarrierMeasurement") -> Midpoint | None:
    """The midpoint where the loss was measured there, None where it was not."""
    (places,) = np.nonzero(np.isclose(measurement.alphas, 0.5))
    if "loss" not in measurement.metrics or not places.size:
        return None
    place, index = int(places[0]), measurement.metrics.index("loss")
    losses, batch_ends = measurement.batch_values[:, index, 0, place], measurement.batch_ends[:, index]
    rises, gaps = losses - batch_ends.mean(axis=1), losses - batch_ends[:, _better(measurement.ends())]
    weights, errors = measurement.weights(), None
    if "error" in measurement.metrics:
        errors = (*measurement.ends("error"), float(measurement.values("error")[place]))
    return Midpoint(
        measurement.ends(),
        float(measurement.values()[place]),
        float(weighted_mean(rises, weights)),
        float(standard_error(rises, weights)),
        errors,
        measurement.examples,
        unit_of(measurement.loss),
        float(standard_error(gaps, weights)),
    )


def free_rise(mean: float) -> float:
    """The largest rise of the loss that counts as none, where the mean loss of the two networks is `mean`."""
    return _FREE * (1 + abs(mean))


def better_alone(ends: Sequence[float], loss: float) -> tuple[str, str] | None:
    """Name and loss of the network that alone has less than a merge, and than the mean of the two; None for neither.

    Less is by more than counts as none.

    Args:
        ends: Losses of `model_a` and of `model_b`.
        loss: Of the merge.
    """
    least = min(ends)
    if min(loss, sum(ends) / 2) - least <= free_rise(least):
        return None
    return ("model_a", "model_b")[_better(ends)], f"{least:.3g}"


def _better(ends: Sequence[float]) -> int:
    return int(ends[1] < ends[0])


def question(losses: Sequence[float], errors: Sequence[float] | None) -> str | None:
    """What to ask first where both networks are useless on the data, as far as their errors tell.

    Args:
        losses: Of the two networks.
        errors: Likewise; None where they are not known.
    """
    if errors is None:
        return None
    if min(errors) >= _HOPELESS:
        return f"Both networks err on {_both([percent(error) for error in errors])}: {_DOUBT}"
    if min(losses) > _FAR_OFF:
        return f"Both networks have a loss of {_both([f'{loss:.3g}' for loss in losses])}: {_DOUBT}"
    return None


def answer(midpoint: Midpoint) -> tuple[str, str]:
    """Whether to average all layers, and what to do next."""
    mean, rise, noise = midpoint.mean, midpoint.rise, 2 * float(np.nan_to_num(midpoint.standard_error))
    before, after = (0.0, 0.0) if midpoint.errors is None else (midpoint.mean_error or 0.0, midpoint.errors[2])
    changes, alone = _changes(midpoint), better_alone(midpoint.ends, midpoint.loss)
    # Of few examples, errors differ by more by chance.
    chance = 2 * math.sqrt(after * (1 - after) / midpoint.examples)
    is_free, is_alike = rise <= free_rise(mean), after - before < max(_POINT, chance)
    if is_alike and rise <= noise and not is_free:
        # A large sampling error makes no average a good one.
        return (
            f"These data do not tell: {changes}, which is within twice its sampling error.",
            "Next: predict from more batches, or from smaller ones, whose spread tells more.",
        )
    if is_alike and is_free:
        gains = "better than the mean of the two" if rise < -noise else None
        if alone is not None and _is_worse(midpoint):
            return (
                f"Keep {alone[0]}: the average is {gains or 'no worse than the mean of the two'}, {changes}, but worse "
                f"than {alone[0]} alone ({alone[1]}).",
                "Next: keep it, or look by `best_point(prediction)` for a point between the two that is better.",
            )
        word = f"Yes, and the average is {gains}" if gains else "Yes"
        return (
            f"{word}: {changes}." + alone_in_words(alone),
            "Next: `merge`, and `measure_barrier` on data that neither network was trained on.",
        )
    is_small = midpoint.errors is not None and after - before < _POINT
    is_price = rise <= _PRICE * abs(mean) and after - before <= _HARM
    word = "At a cost" if is_small or is_price else "No"
    return f"{word}: {changes}." + alone_in_words(alone), f"Fewer layers may cost less: {_SELECT} finds which."


def _is_worse(midpoint: Midpoint) -> bool:
    """Whether the average is surely worse than the better of the two networks, by its loss and not better by errors."""
    better, errors = _better(midpoint.ends), midpoint.errors
    gap = midpoint.loss - midpoint.ends[better]
    return gap > 2 * float(np.nan_to_num(midpoint.gap_error)) and (errors is None or errors[2] >= errors[better])


def alone_in_words(alone: tuple[str, str] | None) -> str:
    """What `better_alone` found as a sentence after another; nothing for None."""
    return "" if alone is None else f" {alone[0]} alone has less loss ({alone[1]})."


def percent(share: float) -> str:
    """A share as a percentage, with three digits."""
    return f"{100 * share:.3g} %"


def _changes(midpoint: Midpoint) -> str:
    """Loss and error of the average, each beside the mean of the two."""
    mean, loss = midpoint.mean, midpoint.loss
    if mean > 0 and loss >= 0 and free_rise(mean) > _TINY * mean:
        # Of tiny losses a large part is little.
        rise = loss - mean if abs(loss - mean) > _NOTHING * mean else 0.0
        found = f"{rise:+.3g} loss ({mean:.3g} → {loss:.3g})"
    elif mean > 0 and 0 <= loss <= _RATIO * mean:
        # Adding zero takes the sign from -0.
        found = f"{round(100 * (loss / mean - 1), 1) + 0.0:+.3g} % loss"
    else:
        found = f"loss {mean:.3g} → {loss:.3g}"
    if midpoint.errors is None:
        return found
    texts = [percent(error) for error in (midpoint.mean_error or 0.0, midpoint.errors[2])]
    return f"{found}, error{' unchanged' if texts[0] == texts[1] else ''} ({' → '.join(texts)})"


def _both(texts: list[str]) -> str:
    return texts[0] if texts[0] == texts[1] else " and ".join(texts)
