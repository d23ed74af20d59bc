"""What a report says in words of a pair of networks: the answer, what is in the way, and how far to trust it."""

from dataclasses import dataclass

import numpy as np

from lmc_curvature.averages import rank_correlation, with_error
from lmc_curvature.barrier import BarrierMeasurement, BarrierPrediction
from lmc_curvature.barrier.midpoint import Midpoint, answer, free_rise, percent, question
from lmc_curvature.barrier.verdict import trust
from lmc_curvature.errors import counted
from lmc_curvature.merging import Selection, Verification
from lmc_curvature.merging.budgets import budget_in_words
from lmc_curvature.merging.conclusion import conclusion
from lmc_curvature.merging.summaries import alone_beside
from lmc_curvature.report.contents import Pair, compare, shown_curves

# So many layers are named where the worst are.
_NAMED = 3
# And so many where all are.
_LISTED = 8
_UNKNOWN = "The averaged network was not evaluated, so there is no answer: predict with three anchors, or measure."


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A number that answers, what it is of, and what belongs beside it."""

    name: str
    value: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a report says of a pair of networks.

    Attributes:
        title: The pair's.
        headline: Whether to average all layers.
        facts: The numbers of the first screen.
        obstacles: Sentences: which layers are in the way.
        trust: Sentences: how sure all this is.
        selection: Sentences: the largest set of layers within the budget.
        row: The pair's row in a table of pairs, by heading.
    """

    title: str
    headline: str
    facts: tuple[Fact, ...]
    obstacles: tuple[str, ...]
    trust: tuple[str, ...]
    selection: tuple[str, ...]
    row: dict[str, str]


def answer_of(pair: Pair) -> Answer:
    """What is said of a pair."""
    facts, prediction, selection = _facts(pair), pair.prediction, pair.selection
    headline = _headline(pair)
    return Answer(
        title=pair.title,
        headline=headline,
        facts=facts,
        obstacles=() if prediction is None or selection is None else tuple(_obstacles(prediction, selection)),
        trust=tuple(_trust(pair)),
        selection=() if selection is None else tuple(_selection(selection, pair.verification)),
        row={"answer": headline, **{fact.name: fact.value for fact in facts if not fact.name.startswith("Loss, ")}},
    )


def _headline(pair: Pair) -> str:
    midpoint = pair.midpoint
    if midpoint is None:
        return _UNKNOWN
    doubt = question(midpoint.ends, None if midpoint.errors is None else midpoint.errors[:2])
    return doubt or answer(midpoint)[0]


def _facts(pair: Pair) -> tuple[Fact, ...]:
    found, midpoint = [], pair.midpoint
    if midpoint is not None:
        found.append(_loss_fact(midpoint, "Loss"))
        if midpoint.errors is not None:
            found.append(_error_fact(midpoint))
    found += _barrier_facts(pair)
    if pair.selection is not None:
        found.append(_selection_fact(pair.selection, pair.verification))
    return tuple(found)


def _loss_fact(midpoint: Midpoint, name: str) -> Fact:
    rise = with_error(midpoint.rise, midpoint.standard_error, 3, of="standard error")
    return Fact(
        name=name,
        value=f"{midpoint.mean:.3g} → {midpoint.loss:.3g}",
        detail=f"mean of the two → their average, evaluated at α = ½; it rises by {rise}; up to "
        f"{free_rise(midpoint.mean):.2g} counts as none",
    )


def _error_fact(midpoint: Midpoint) -> Fact:
    assert midpoint.errors is not None
    first, second, own = map(percent, midpoint.errors)
    mean = percent((midpoint.errors[0] + midpoint.errors[1]) / 2)
    return Fact(name="Error", value=f"{mean} → {own}", detail=f"of the examples; the two err on {first} and {second}")


def _barrier_facts(pair: Pair) -> list[Fact]:
    """The barrier, as it was measured or else predicted, with all others beside it."""
    prediction, found = pair.prediction, []
    for name, each in pair.loss_measurements.items():
        if name in shown_curves(pair):
            place = each.alphas[each.curve().argmax()]
            where = f"{name}, " + (f"at α = {place:.2g}" if each.barrier() > 0 else "nowhere above the chord")
            found.append((with_error(each.barrier(), each.standard_error(), 3), where))
    if prediction is not None:
        rises = prediction.barrier() > 0
        where = "predicted, " + (f"at α = {prediction.position():.2g}" if rises else "nowhere above the chord")
        if prediction.expansion == "anchored":
            where += f", expansion error about {prediction.expansion_error():.2g}"
        else:
            where += ", to second order from the two networks alone, and may be far off"
        found.append((with_error(prediction.barrier(), prediction.standard_error(), 3), where))
    if not found:
        return []
    (value, where), *others = found
    if (said := where.removeprefix("predicted, ")) != where:
        value, where = f"{value}, predicted", said
    detail = "; ".join([f"{where} (± standard error)", *(f"{other}: {number}" for number, other in others)])
    return [Fact(name="Barrier", value=value, detail=detail)]


def _selection(selection: Selection, verification: Verification | None) -> list[str]:
    found = conclusion(
        selection, verification, unmeasured="It was not measured: `lmc-curvature select`, or its `verify`, does."
    )
    if verification is None and _is_uncertain(selection):
        found.insert(-1, "By its expansion error it may as well be above the budget: measure before you merge.")
    return found


def _selection_fact(selection: Selection, verification: Verification | None) -> Fact:
    prediction, choice = selection.choice.prediction, selection.choice
    budget = f"the budget is {budget_in_words(prediction, choice.budget, 3)}"
    parameters = prediction.parameters
    of_parameters = parameters is not None and np.array_equal(choice.weights, parameters)
    what = "parameters" if of_parameters else "weight"
    rise = f"{selection.rise:.3g}, expansion error about {selection.expansion_error:.2g}"
    detail = f"{selection.share:.1%} of the {what}; the loss is predicted to rise by {rise}; {budget}"
    if verification is not None:
        measured = with_error(verification.chosen.rise, verification.chosen.standard_error, 3)
        detail += f"; measured, it rises by {measured}"
    if not selection.members:
        detail = f"nothing can be averaged within it; {budget}"
        if verification is not None and verification.doubt:
            detail += f". {verification.doubt}"
    value = f"{len(selection.members)} of {counted(len(choice.weights), 'layer')}"
    if verification is None and _is_uncertain(selection):
        value += ", unsure"
    return Fact(name="Largest set within the budget", value=value, detail=detail)


def _is_uncertain(selection: Selection) -> bool:
    """Whether the rise of a selected set may be above the budget by its expansion error."""
    return bool(selection.members) and selection.rise + selection.expansion_error > selection.budget


def _obstacles(prediction: BarrierPrediction, selection: Selection) -> list[str]:
    """Which layers are in the way: those that are not averaged, and those that raise the loss most."""
    names, count = prediction.layers, len(prediction.layers)
    left = [name for name in names if name not in selection.members]
    if not left:
        alone = alone_beside(selection, selection.rise)
        return ["None: all layers can be averaged within the budget.", *([f"But {alone}"] if alone else [])]
    counts = f"{len(left)} of {counted(count, 'layer')}"
    found = [f"Left out of the largest set within the budget: {counts if len(left) > _LISTED else ', '.join(left)}."]
    eye = np.eye(count, dtype=bool)
    whole, without, alone = (prediction.set_barriers(sets) for sets in (~eye[:1] | True, ~eye, eye))
    lower = [index for index in np.argsort(without, kind="stable")[:_NAMED] if without[index] < whole[0]]
    if lower and count > 1:
        shown = ", ".join(f"{names[index]} (to {without[index]:.3g})" for index in lower)
        found.append(f"Leaving one layer out lowers the predicted barrier at α = ½, {whole[0]:.3g}, most for {shown}.")
    elif count > 1:
        found.append(f"No single layer is to blame: whichever stays, a barrier of {whole[0]:.3g} or more is predicted.")
    worst = np.argsort(alone, kind="stable")[::-1][:_NAMED]
    shown = ", ".join(f"{names[index]} ({alone[index]:.3g})" for index in worst)
    return [*found, f"Moved alone, the highest barriers have {shown}."]


def _trust(pair: Pair) -> list[str]:
    found, midpoint, prediction = [], pair.midpoint, pair.prediction
    if midpoint is not None:
        found.append(_sampling(midpoint))
    if prediction is not None:
        found += trust(prediction)
        found += [
            text
            for name, measurement in pair.loss_measurements.items()
            if (text := _agreement(prediction, name, measurement))
        ]
        if prediction.expansion != "anchored":
            found.append("Predicted from the two networks alone, to second order: three anchors say more.")
    notes = [note for each in (prediction, *pair.measurements.values()) if each is not None for note in each.notes]
    found += dict.fromkeys(notes)
    return found


def _sampling(midpoint: Midpoint) -> str:
    data = f"{midpoint.examples:,.0f} {midpoint.unit}s" if np.isfinite(midpoint.examples) else "the data"
    if not np.isfinite(midpoint.standard_error):
        return f"Sampling: the average was evaluated on {data} in a single batch, which does not tell how sure that is."
    free = free_rise(midpoint.mean)
    is_close = abs(midpoint.rise - free) < 2 * midpoint.standard_error
    flips = f" So on other data it may be on the other side of what counts as none, {free:.2g}." if is_close else ""
    rise = with_error(midpoint.rise, midpoint.standard_error, 3)
    return (
        f"Sampling: evaluated on {data}, the rise of the average's loss is {rise}. Each ± is a standard error, by the "
        f"spread between batches. Other data may differ by more.{flips}"
    )


def _agreement(prediction: BarrierPrediction, name: str, measurement: BarrierMeasurement) -> str | None:
    """How far predictions were off for the sets that were measured."""
    found = compare(prediction, measurement)
    if found is None or len(found.measured) < _NAMED:
        return None
    gaps = np.abs(found.predicted - found.measured)
    off = float(np.median(gaps / np.maximum(np.abs(found.measured), 1e-12)))
    ranks = rank_correlation(found.predicted, found.measured)
    text = f"Of {len(gaps)} sets of layers that were {name}, predictions were off by {off:.0%} in the median"
    if prediction.expansion == "anchored":
        text += f", {int((gaps <= found.expansion).sum())} by less than their expansion error"
    return text + (f"; they rank them with Spearman's ρ = {ranks:.2f}." if np.isfinite(ranks) else ".")
