"""What selections, best points and their verifications are, in a few lines."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

from lmc_curvature.averages import with_error
from lmc_curvature.barrier.midpoint import alone_in_words, better_alone
from lmc_curvature.errors import counted
from lmc_curvature.merging.budgets import budget_in_words
from lmc_curvature.merging.rises import mean_loss, rise_in_words
from lmc_curvature.plotting.summary import Summary, some

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lmc_curvature.merging.point import BestPoint, PointVerification
    from lmc_curvature.merging.select import Selection
    from lmc_curvature.merging.trials import Trial
    from lmc_curvature.merging.verify import Verification

_AnyTrial = TypeVar("_AnyTrial")

_OTHERS = {"a": "model_a", "b": "model_b", "mean": "either network (the mean of both merges)"}


def selection_summary(selection: "Selection") -> Summary:
    """The layers that are averaged, and the rise with both errors beside the budget."""
    return Summary(
        _selection_title("Selection", selection),
        _selection_facts(selection),
        "print(selection), .curve(), .verify(a, b, loader), .merge(a, b)",
        lambda: _selection_figure(selection, {}),
    )


def selection_text(selection: "Selection") -> str:
    """All layers that are averaged, and the rise with both errors beside the budget."""
    choice = selection.choice
    budget = budget_in_words(choice.prediction, selection.budget)
    search = "every set was looked at" if selection.exact else "the best set that a search found"
    if not selection.members:
        return (
            f"{nothing(selection)}: all layers from {_OTHERS[selection.base]}\n  budget          {budget}\n  {search}"
        )
    first = f"Average {len(selection.members)} of {counted(len(choice.weights), 'layer')}, "
    first += f"{selection.share:.1%} of the weight"
    others = "" if selection.is_whole else f"; the others from {_OTHERS[selection.base]}"
    rise = rise_in_words(choice.prediction, selection.rise, selection.standard_error, selection.expansion_error)
    alone = alone_beside(selection, selection.rise)
    lines = [
        f"{first}{others}",
        f"  layers          {', '.join(selection.members)}",
        f"  predicted rise  {rise}; budget {budget}",
        *([f"  {alone}"] if alone else []),
        f"  {search}",
    ]
    return "\n".join(lines)


def nothing(selection: "Selection") -> str:
    """That no layer is averaged, in words that say whether that was asked for."""
    return "No layer is averaged" if selection.choice.excluded.all() else "Nothing can be averaged within the budget"


def alone_beside(selection: "Selection", rise: float) -> str:
    """A sentence if one network alone has less loss than the merge with a rise; see `better_alone`."""
    prediction = selection.choice.prediction
    ends = [end.loss for end in prediction.endpoints]
    return alone_in_words(better_alone(ends, mean_loss(prediction) + rise)).strip() if selection.members else ""


def verification_summary(verification: "Verification") -> Summary:
    """The selection in the end, and what was measured of it."""
    selection = verification.selection
    return Summary(
        _selection_title("Verification", selection),
        {
            **_selection_facts(selection),
            **{
                name: f"{with_error(trial.rise, trial.standard_error, of='sampling')}, "
                f"{verification.against_budget(trial)} the budget"
                for name, trial in _measured(verification.chosen, verification.held_out).items()
                if selection.members
            },
            **({"but": verification.doubt} if verification.doubt else {}),
            "measured sets": str(len(verification.trials)),
        },
        "print(verification), .trials, .holds, .selection.merge(a, b)",
        lambda: _selection_figure(selection, _measured(verification.chosen, verification.held_out)),
    )


def verification_text(verification: "Verification") -> str:
    """The selection in the end, what was measured of it, and every set that was tried."""
    selection, chosen = verification.selection, verification.chosen
    lines = [str(selection)]
    if selection.members:
        for name, trial in {"measured rise": chosen, "on held-out": verification.held_out}.items():
            if trial is not None:
                rise = with_error(trial.rise, trial.standard_error)
                lines.append(f"  {name:<14}  {rise}, {verification.against_budget(trial)} the budget")
        if chosen.rise <= selection.budget < selection.rise:
            lines.append("  what was measured decides: the prediction alone has it above the budget")
        if not selection.is_whole and chosen.base != verification.trials[0].base:
            lines.append(
                f"  the base was switched from {verification.trials[0].base} to {chosen.base} by what was measured"
            )
    lines += [f"  {verification.doubt}"] if verification.doubt else []
    lines.append("  measured sets (expected: by the prediction, corrected by those before; +: measured beside them):")
    rows = [(f"{number}.", trial) for number, trial in enumerate(verification.trials, 1)]
    # The other base of a tried set, no layer and all layers are measured beside.
    rows += [] if chosen in verification.trials else [("+", chosen)]
    for name, trial in rows:
        share, mark = trial.weight / selection.choice.total, " (selected)" if trial == chosen else ""
        where = f"{verification.against_budget(trial):<11}  base {trial.base}, {share:6.1%} of the weight"
        lines.append(f"  {name:>4} {where}: {trial}{mark}")
    return "\n".join([*lines, *([f"  {verification.legend}"] if verification.legend else [])])


def point_summary(point: "BestPoint") -> Summary:
    """The predicted loss at the point with both errors, and where its layers are."""
    return Summary(
        f"BestPoint: a position for each of {counted(len(point.alphas), 'layer')} between the two networks",
        _point_facts(point),
        "print(point), .alphas, .verify(a, b, loader), .merge(a, b)",
        lambda: _point_figure(point, {}),
    )


def point_verification_summary(verification: "PointVerification") -> Summary:
    """The point in the end, and what was measured there."""
    measured = _measured(verification.chosen, verification.held_out)
    rises = {name: with_error(trial.rise, trial.standard_error, of="sampling") for name, trial in measured.items()}
    return Summary(
        "PointVerification: the measured point with the least rise of the loss",
        {**_point_facts(verification.point), **rises, "measured points": str(len(verification.trials))},
        "print(verification), .trials, .point.merge(a, b)",
        lambda: _point_figure(verification.point, measured),
    )


def _selection_title(kind: str, selection: "Selection") -> str:
    layers = counted(len(selection.choice.weights), "layer")
    return f"{kind}: average {len(selection.members)} of {layers}, {selection.share:.1%} of the weight"


def _selection_facts(selection: "Selection") -> dict[str, str]:
    prediction = selection.choice.prediction
    rise = rise_in_words(prediction, selection.rise, selection.standard_error, selection.expansion_error)
    return {
        "layers": some(selection.members),
        **({} if selection.is_whole else {"base of others": _OTHERS[selection.base]}),
        **({"predicted rise": rise} if selection.members else {}),
        **({"but": alone} if (alone := alone_beside(selection, selection.rise)) else {}),
        "budget": budget_in_words(prediction, selection.budget),
        "search": "every set was looked at" if selection.exact else "the best set that a search found",
    }


def _point_facts(point: "BestPoint") -> dict[str, str]:
    ends = ", ".join(f"{end.loss:.4g}" for end in point.prediction.endpoints)
    rise = rise_in_words(point.prediction, point.rise, point.standard_error, point.expansion_error)
    positions = [f"{layer} {alpha:.2f}" for layer, alpha in point.alphas.items()]
    return {
        "predicted loss": f"{point.loss:.4g}; the two networks have {ends}",
        "predicted rise": rise,
        "positions": some(positions),
    }


def _measured(chosen: _AnyTrial, held_out: _AnyTrial | None) -> dict[str, _AnyTrial]:
    return {"measured rise": chosen} | ({} if held_out is None else {"on held-out data": held_out})


def _selection_figure(selection: "Selection", measured: "Mapping[str, Trial]") -> "Figure":
    from lmc_curvature.merging.drawing import Rise, draw_merge

    still = 1.0 if selection.base == "b" else 0.0
    alphas = {name: 0.5 if name in selection.members else still for name in selection.choice.prediction.layers}
    rises = [Rise("predicted", selection.rise, selection.standard_error, selection.expansion_error)]
    rises += [Rise(name, trial.rise, trial.standard_error) for name, trial in measured.items()]
    return draw_merge(alphas, rises if selection.members else [], budget=selection.budget)


def _point_figure(point: "BestPoint", measured: "Mapping[str, Trial]") -> "Figure":
    from lmc_curvature.merging.drawing import Rise, draw_merge

    rises = [Rise("predicted", point.rise, point.standard_error, point.expansion_error)]
    rises += [Rise(name, trial.rise, trial.standard_error) for name, trial in measured.items()]
    return draw_merge(point.alphas, rises)
