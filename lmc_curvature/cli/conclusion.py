"""What a selection of layers comes to, in sentences and as the command that merges them."""

import dataclasses
import shlex
from typing import TYPE_CHECKING

import numpy as np

from lmc_curvature.averages import with_error
from lmc_curvature.cli.options import Comparison
from lmc_curvature.errors import counted

if TYPE_CHECKING:
    from lmc_curvature.merging import Selection, Verification
    from lmc_curvature.merging.trials import SetTrial

# What `merge` has to be told of the networks and, where it evaluates them, of how to do that.
_NETWORKS = ("model", "model_option", "key", "strip_prefix")
_EVALUATION = ("loss", "data", "split", "limit", "mean", "std", "resize", "transform", "batch_size", "max_batches")
_EVALUATION += ("recalibration", "augmentation", "device", "threads")


def conclusion(selection: "Selection", verification: "Verification | None") -> list[str]:
    """Sentences: the set, its predicted and measured rises of the loss, and whether these are within the budget.

    Args:
        selection: The set in the end.
        verification: Its measurements; None if nothing was measured.
    """
    from lmc_curvature.merging.budgets import budget_in_words
    from lmc_curvature.merging.rises import rise_in_words

    prediction = selection.choice.prediction
    predicted = rise_in_words(prediction, selection.rise, selection.standard_error, selection.expansion_error, 3)
    found = [
        f"{_what(selection)}.",
        f"The rise of the merged network's loss above the mean of the two is predicted to be {predicted}; the budget "
        f"is {budget_in_words(prediction, selection.budget, 3)}.",
    ]
    if verification is None:
        return [*found, "Nothing was measured: --measurements 10 does."]
    chosen, held_out = verification.chosen, verification.held_out

    def measured(trial: "SetTrial") -> str:
        return f"{with_error(trial.rise, trial.standard_error, 3)}, {verification.against_budget(trial)} the budget"

    found.append(f"Measured on the data that it was chosen on, it is {measured(chosen)}.")
    if not verification.is_safe(chosen):
        found.append("No measured set is surely within it.")
    if held_out is None:
        found.append("On other data it may be higher: --held-out measures that.")
    else:
        found.append(f"Measured on held-out data, it is {measured(held_out)}.")
        if chosen.rise <= selection.budget < held_out.rise:
            found.append("Choose by more data, or give a smaller budget, to leave room for the difference.")
    return found


def merge_command(comparison: Comparison, selection: "Selection") -> str | None:
    """The command that writes the merged network of a selection; None where it is one of the two as it is.

    Of the mean of both merges it writes the one with base a.
    """
    if not selection.members:
        return None
    words = ["lmc-curvature", "merge", str(comparison.a), str(comparison.b)]
    recalibrate = comparison.batch_norm == "recalibrate"
    for name in (*_NETWORKS, *(_EVALUATION if recalibrate else ())):
        words += _option(comparison, name)
    words += ["--batch-norm", "recalibrate"] if recalibrate else []
    words += ["--partition", comparison.layers] if comparison.layers != "fused" else []
    if len(selection.members) < len(selection.choice.weights):
        words += ["--layers", ",".join(selection.members), "--base", "b" if selection.base == "b" else "a"]
    return shlex.join([*words, "--out", "merged.safetensors"])


def _what(selection: "Selection") -> str:
    others = {"a": "those of A", "b": "those of B", "mean": "those of either, of which the rises are the mean"}
    whose = others[selection.base]
    choice = selection.choice
    if not selection.members:
        reason = "No layer is averaged" if choice.excluded.all() else "Nothing can be averaged within the budget"
        return f"{reason}: all layers are {whose}"
    if len(selection.members) == len(choice.weights):
        return "All layers are averaged"
    inside, parameters = choice.members(selection.members), choice.prediction.parameters
    share = np.nan if parameters is None else parameters[inside].sum() / parameters.sum()
    counts = f"{len(selection.members)} of {counted(len(choice.weights), 'layer')}"
    return f"Average {counts} ({share:.1%} of the parameters): {', '.join(selection.members)}; the others are {whose}"


def _option(comparison: Comparison, name: str) -> list[str]:
    """An option as it is given; nothing where it has its default."""
    value, fields = getattr(comparison, name), {field.name: field.default for field in dataclasses.fields(Comparison)}
    if value == fields[name]:
        return []
    values = value if isinstance(value, list) else [value]
    return [word for each in values for word in (f"--{name.replace('_', '-')}", str(each))]
