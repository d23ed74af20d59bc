"""What a selection of layers comes to, in sentences."""

from typing import TYPE_CHECKING

from lmc_curvature.averages import with_error
from lmc_curvature.barrier.midpoint import free_rise, predicted_midpoint
from lmc_curvature.errors import counted
from lmc_curvature.merging.budgets import budget_in_words
from lmc_curvature.merging.rises import rise_in_words
from lmc_curvature.merging.summaries import alone_beside, nothing

if TYPE_CHECKING:
    from lmc_curvature.merging.select import Selection
    from lmc_curvature.merging.trials import SetTrial
    from lmc_curvature.merging.verify import Verification


def conclusion(
    selection: "Selection",
    verification: "Verification | None",
    *,
    unmeasured: str = "It was not measured: its `verify` does.",
    hold_out: str = "`verify(…, held_out=…)` measures that",
) -> list[str]:
    """Sentences: the set, its predicted and measured rises of the loss, and whether these are within the budget.

    Args:
        selection: The set in the end.
        verification: Its measurements; None if nothing was measured.
        unmeasured: The sentence where nothing was measured.
        hold_out: What measures it on other data, where there were none.
    """
    prediction = selection.choice.prediction
    budget = budget_in_words(prediction, selection.budget, 3)
    if not selection.members:
        doubt = unmeasured if verification is None else verification.doubt
        return [f"{selected(selection)}.", f"The budget is {budget}.", *([doubt] if doubt else []), *_both(selection)]
    predicted = rise_in_words(prediction, selection.rise, selection.standard_error, selection.expansion_error, 3)
    found = [
        f"{selected(selection)}.",
        f"The rise of the merged network's loss above the mean of the two is predicted to be {predicted}; the budget "
        f"is {budget}.",
        *_both(selection),
    ]
    alone = alone_beside(selection, selection.rise if verification is None else verification.chosen.rise)
    found += [alone] if alone else []
    if verification is None:
        return [*found, unmeasured]
    chosen, held_out = verification.chosen, verification.held_out

    def measured(trial: "SetTrial") -> str:
        return f"{with_error(trial.rise, trial.standard_error, 3)}, {verification.against_budget(trial)} the budget"

    decides = (
        ", which decides: the prediction alone has it above" if chosen.rise <= selection.budget < selection.rise else ""
    )
    found.append(f"Measured on the data that it was chosen on, it is {measured(chosen)}{decides}.")
    if not selection.is_whole and chosen.base != (before := verification.trials[0].base):
        found.append(f"The base was switched from {before.upper()} to {chosen.base.upper()} by what was measured.")
    if not verification.is_safe(chosen):
        found.append("No measured set is surely within it.")
    if held_out is None:
        found.append(f"On other data it may be higher: {hold_out}.")
    else:
        found.append(f"Measured on held-out data, it is {measured(held_out)}.")
        if chosen.rise <= selection.budget < held_out.rise:
            found.append("Choose by more data, or give a smaller budget, to leave room for the difference.")
    return found


def _both(selection: "Selection") -> list[str]:
    """Why the verdict on all layers and the budget say different things, where they do."""
    midpoint = predicted_midpoint(selection.choice.prediction)
    if midpoint is None or selection.choice.excluded.any():
        return []
    free, rise = free_rise(midpoint.mean), f"{midpoint.rise:.3g}"
    if selection.is_whole and free < midpoint.rise:
        return [f"The budget allows the rise of all layers, {rise}, of which {free:.2g} would count as none."]
    if not selection.is_whole and selection.budget < midpoint.rise <= free:
        return [
            f"The average of all layers has a rise of {rise}: above this budget, but up to {free:.2g} counts as none."
        ]
    return []


def selected(selection: "Selection") -> str:
    """What is averaged, and whose the other layers are."""
    others = {"a": "those of A", "b": "those of B", "mean": "those of either, of which the rises are the mean"}
    whose = others[selection.base]
    choice = selection.choice
    if not selection.members:
        return f"{nothing(selection)}: all layers are {whose}"
    if selection.is_whole:
        return "All layers are averaged"
    inside, parameters = choice.members(selection.members), choice.prediction.parameters
    counts = f"{len(selection.members)} of {counted(len(choice.weights), 'layer')}"
    # Files of earlier versions do not tell the parameters.
    share = ""
    if parameters is not None and parameters.sum() > 0:
        share = f" ({parameters[inside].sum() / parameters.sum():.1%} of the parameters)"
    return f"Average {counts}{share}: {', '.join(selection.members)}; the others are {whose}"
