"""A selection of layers, measured and repaired until the measured rise stays within the budget."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool
from torch import nn

from lmc_curvature.averages import standard_error, weighted_mean
from lmc_curvature.merging.budgets import check_not_negative
from lmc_curvature.merging.residuals import Correction
from lmc_curvature.merging.rises import Base, point_rises, points_of
from lmc_curvature.merging.search import Score
from lmc_curvature.merging.select import Choice, Selection
from lmc_curvature.merging.summaries import verification_summary, verification_text
from lmc_curvature.merging.trials import Bench, SetTrial, check_trials
from lmc_curvature.plotting.summary import Display, Summary

# Trials end where the next promises less than this part of the weight; searches look at 2^10 sets at a time.
_LEAST_GAIN, _WIDTH = 1e-7, 10


@dataclass(frozen=True, eq=False, repr=False)
class Verification(Display):
    """A selection that was measured, and repaired by what was learned.

    Attributes:
        selection: The selection in the end: the heaviest measured set within the budget or, where there is none, the
            one least above it.
        trials: The sets that were tried, in order, each with the base that it was tried with.
        chosen: What was measured of the selection.
        caution: How many standard errors a measured rise had to stay below the budget.
        held_out: What was measured of it on the held-out data; None without such data.
        measured: Every measured set, `chosen` among them: those of `trials`, the same with the other base, and no layer
            and all layers, which are measured beside the first at no cost. Empty where it was read from a file.
    """

    selection: Selection
    trials: tuple[SetTrial, ...]
    chosen: SetTrial
    caution: float
    held_out: SetTrial | None = None
    measured: tuple[SetTrial, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether the measured rise is within the budget: the one on held-out data if there is one."""
        return (self.held_out or self.chosen).rise <= self.selection.budget

    def is_safe(self, trial: SetTrial) -> bool:
        """Whether a measured rise stays below the budget by as many standard errors as caution asks for."""
        return trial.rise + self.caution * trial.known_error <= self.selection.budget

    def against_budget(self, trial: SetTrial) -> str:
        """Where a measured rise is: `"within"` the budget, `"just within"` (see `legend`), or `"above"`."""
        if trial.rise > self.selection.budget:
            return "above"
        return "within" if self.is_safe(trial) else "just within"

    @property
    def legend(self) -> str | None:
        """What "just within" means; None where no measurement is."""
        found = [self.against_budget(trial) for trial in (*self.trials, self.chosen, self.held_out) if trial]
        return f"just within: by less than {self.caution:g} standard errors" if "just within" in found else None

    @property
    def doubt(self) -> str | None:
        """Why nothing is averaged although a measured set is within the budget; None where that is not so."""
        near = {each.members for each in self.measured or self.trials if each.rise <= self.selection.budget} - {()}
        if self.selection.members or not near:
            return None
        sets = "One measured set is" if len(near) == 1 else f"{len(near)} measured sets are"
        return (
            f"{sets} within the budget, but too uncertain, by less than {self.caution:g} standard errors: use more "
            "data, or a lower caution."
        )

    def _summary(self) -> Summary:
        return verification_summary(self)

    def __str__(self) -> str:
        return verification_text(self)


def verify_selection(
    selection: Selection,
    model_a: nn.Module,
    model_b: nn.Module,
    loader: Iterable[Any],
    *,
    measurements: int,
    held_out: Iterable[Any] | None,
    caution: float | int,
    options: Mapping[str, Any],
) -> Verification:
    """Measure sets of layers, and choose the heaviest that stays within the budget.

    The selected set is measured first. Each further trial measures the set that promises the largest gain: how much
    heavier it is than the best so far, times the square of the probability that it stays within the budget; trials are
    few, and one that fails is spent. That probability follows from the prediction corrected by all trials so far, see
    `Correction`. Trials end when the gain is negligible. No layer at all and all layers are measured beside the first
    set, at no cost.

    Args:
        selection: The selection.
        model_a: The network at α = 0.
        model_b: The network at α = 1.
        loader: Yields batches; every trial visits it once.
        measurements: The largest number of trials.
        held_out: Other data, on which the selection is measured in the end.
        caution: How many standard errors a measured rise has to stay below the budget.
        options: Options of `measure_barrier`, the same as those of the prediction, which itself
            tells its loss, the layers and what is frozen.

    Raises:
        LMCCurvatureError: The networks, a loader or an option are not what they should be; the subclasses of
            `lmc_curvature.errors` tell which.
    """
    check_trials(measurements, loader, options)
    check_not_negative("caution", caution)
    choice, bench = selection.choice, Bench(selection.choice.prediction, model_a, model_b, loader, options)
    correction, trials, found = Correction.of(choice.prediction), [], []
    first = choice.members(selection.members), selection.base
    incumbent, margin, proposal = None, 0.0, first
    while len(trials) < measurements and proposal is not None:
        sets = [proposal[0], *(() if trials else _at_no_cost(choice))]
        measured, correction = _measured(choice, bench, sets, correction)
        trials.append(next(trial for trial in measured if trial.base == proposal[1]))
        found += measured
        margin = caution * trials[-1].known_error
        within = [each for each in found if each.rise + caution * each.known_error <= choice.budget]
        incumbent = max(within, key=lambda each: (each.weight, -each.rise), default=None)
        proposal = _proposal(choice, correction, incumbent, margin, found)
    chosen = incumbent or min(found, key=lambda each: each.rise)
    members = choice.members(chosen.members)
    final = Selection.of(choice, members, chosen.base)
    if held_out is None:
        return Verification(final, tuple(trials), chosen, caution, measured=tuple(found))
    again, _ = _measured(dataclasses.replace(choice, bases=(chosen.base,)), bench, [members], correction, held_out)
    return Verification(final, tuple(trials), chosen, caution, again[0], tuple(found))


def _proposal(
    choice: Choice, correction: Correction, incumbent: SetTrial | None, margin: float, found: Sequence[SetTrial]
) -> tuple[Bool[np.ndarray, " L"], Base] | None:
    """The set and the base that promise the largest gain; None where that is negligible."""
    best = []
    for base in choice.bases:
        known = [choice.members(each.members) for each in found if each.base == base]
        score = _gain(choice, correction, base, incumbent, margin, known)
        members = choice.search(score, starts=[known[0], *known[-2:]], width=_WIDTH)
        best.append((float(score(members[None])[0]), members, base))
    gain, members, base = max(best, key=lambda entry: entry[0])
    return (members, base) if gain > np.log(_LEAST_GAIN) else None


def _gain(
    choice: Choice,
    correction: Correction,
    base: Base,
    incumbent: SetTrial | None,
    margin: float,
    known: Sequence[Bool[np.ndarray, " L"]],
) -> Score:
    """Logarithm of the gain in weight that sets promise; far below for sets that are no heavier, or known."""
    from scipy.special import log_ndtr

    # Without a set within the budget the lightest one is a gain, too.
    reached = (choice.weights[choice.required].sum() if incumbent is None else incumbent.weight) / choice.total
    reached -= 0.01 if incumbent is None else 0.0

    def score(members: np.ndarray) -> np.ndarray:
        rises, deviations = np.mean([correction.at(points) for points in points_of(members, base)], axis=0)
        more = members @ choice.weights / choice.total - reached
        room = (choice.budget - margin - rises) / np.maximum(deviations, 1e-12 * (1 + np.abs(rises)))
        out = np.any([more <= 0, *((members == each).all(axis=1) for each in known)], axis=0)
        return np.where(out, -1e12 + more, np.log(np.maximum(more, 1e-300)) + 2 * log_ndtr(room))

    return score


def _at_no_cost(choice: Choice) -> list[Bool[np.ndarray, " L"]]:
    """No layer and all layers, where they may be chosen: every measurement visits these points."""
    return [members for members in choice.starts if members.all() or not members.any()]


def _measured(
    choice: Choice,
    bench: Bench,
    sets: Sequence[Bool[np.ndarray, " L"]],
    correction: Correction,
    held_out: Iterable[Any] | None = None,
) -> tuple[list[SetTrial], Correction]:
    """Measure sets with every base, all in one pass, and learn from it."""
    pairs: list[tuple[np.ndarray, Base]] = [(members, base) for members in sets for base in choice.bases]
    groups = [np.concatenate(points_of(members[None], base)) for members, base in pairs]
    points = np.concatenate(groups)
    measurement = bench.measure(points, held_out)
    rises = measurement.batch_rises()
    trials, start = [], 0
    for (members, base), group in zip(pairs, groups, strict=True):
        own = rises[:, start : (start := start + len(group))].mean(axis=1)
        trials.append(
            SetTrial(
                members=choice.names(members),
                base=base,
                weight=float(members @ choice.weights),
                predicted=float(point_rises(choice.prediction, group).mean()),
                expected=float(correction.at(group)[0].mean()),
                rise=float(weighted_mean(own, measurement.weights())),
                standard_error=float(standard_error(own, measurement.weights())),
            )
        )
    return trials, correction.extended(points, measurement.rises(), np.nan_to_num(measurement.rise_errors()))
