"""What the page computes the barrier of any set of layers from: the anchors' arrays, without rounding."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmc_curvature.barrier import BarrierMeasurement, BarrierPrediction
from lmc_curvature.barrier.cube import Cube
from lmc_curvature.report.contents import Pair
from lmc_curvature.segment import LayerPartition


def cube_record(prediction: BarrierPrediction, *, raw: bool) -> dict[str, Any]:
    """The anchors' arrays, as JSON that keeps every bit; with those of every batch if they are wanted."""
    projections = [anchor.projection for anchor in prediction.anchors]
    record: dict[str, Any] = {
        "expansion": prediction.expansion,
        "positions": [anchor.alpha for anchor in prediction.anchors],
        "shares": Cube(prediction.layers, prediction.anchors).shares.tolist(),
        "losses": [each.loss for each in projections],
        "slopes": [each.slopes.tolist() for each in projections],
        "curvatures": [each.curvature.tolist() for each in projections],
        "batches": None,
    }
    if raw:
        # Of errors, seven digits are enough.
        record["batches"] = {
            "weights": projections[0].weights.tolist(),
            "losses": [_short(each.batch_losses) for each in projections],
            "slopes": [_short(each.batch_slopes) for each in projections],
            "curvatures": [_short(each.batch_curvatures) for each in projections],
        }
    return record


def picker_record(pair: Pair, *, raw: bool) -> dict[str, Any] | None:
    """What the layer picker of a pair needs; None without a prediction."""
    prediction = pair.prediction
    if prediction is None:
        return None
    selection, parameters = pair.selection, prediction.parameters
    return {
        "layers": list(prediction.layers),
        "parameters": None if parameters is None else parameters.tolist(),
        "cube": cube_record(prediction, raw=raw),
        "largest": None if selection is None else _indices(prediction, selection.members),
        "largestBase": None if selection is None or selection.base == "mean" else selection.base,
        "measured": [
            curve for name, each in pair.loss_measurements.items() for curve in _measured(prediction, name, each)
        ],
        "merges": _merges(pair, prediction),
        **_instructions(pair, prediction),
    }


_GENERIC = ("lmc-curvature", "merge", "A.safetensors", "B.safetensors", "--model", "MODEL")


def _instructions(pair: Pair, prediction: BarrierPrediction) -> dict[str, Any]:
    """The command and the Python that build what was predicted, as far as there are such.

    `words` begin the command, or are None; `partition` are those that come with layers, or None where the rule that
    cut them is not known; `generic` tells that files and network are to be filled in; `python` has further arguments
    of `merge_predicted`, or is None; `missing` says why there is no command.
    """
    groups, policy = prediction.groups or {}, prediction.batch_norm
    rule = _rule_of(groups)
    partition = [] if pair.merge is not None else None if rule is None else ["--partition", rule]
    frozen = any(note.startswith("frozen at ") for note in prediction.notes)
    entries = [entry for members in groups.values() for entry in members]
    # A rule of one's own may leave statistics out.
    normalizes = not groups or partition is None or any(entry.endswith("running_mean") for entry in entries)
    in_python = bool(groups) and not (policy == "batch" and normalizes)
    known = bool(groups) or pair.merge is not None
    by_command = known and not frozen and not (policy != "interpolate" and normalizes)
    missing = "The command merge cannot be told all that makes this network. In Python:"
    if not groups:
        missing = "This prediction is of an earlier version, which does not tell the entries of its layers."
    elif not in_python:
        missing = "The prediction is by statistics of batches: no network in evaluation mode keeps to it."
    return {
        "words": list(pair.merge or _GENERIC) if by_command else None,
        "partition": partition,
        "generic": pair.merge is None,
        "python": None if not in_python else ", loader=loader" if policy == "recalibrate" and normalizes else "",
        "missing": missing,
    }


def _rule_of(groups: Mapping[str, Sequence[str]]) -> str | None:
    """The rule that cuts these entries into these layers by their names alone; None where none does."""
    entries = [entry for members in groups.values() for entry in members]
    layers = {layer: set(members) for layer, members in groups.items()}
    for rule in ("module", "tensor", "block"):
        found = LayerPartition.of_names(entries, rule).groups
        if {layer: set(members) for layer, members in found.items()} == layers:
            return rule
    return None


def _measured(prediction: BarrierPrediction, name: str, measurement: BarrierMeasurement) -> list[dict[str, Any]]:
    """The measured curves: of the whole network, and of sets of layers."""
    sets = [prediction.layers, *measurement.sets]
    curves = np.concatenate([measurement.curve()[None], measurement.layer_curves()])
    return [
        {
            "name": name,
            "members": _indices(prediction, members),
            "alphas": measurement.alphas.tolist(),
            "curve": curve.tolist(),
            "errors": [value if np.isfinite(value) else None for value in errors.tolist()],
        }
        for members, curve, errors in zip(sets, curves, measurement.curve_errors(), strict=True)
        if set(prediction.layers).issuperset(members)
    ]


def _merges(pair: Pair, prediction: BarrierPrediction) -> list[dict[str, Any]]:
    """Merges at α = ½ that were measured to verify a selection."""
    if pair.verification is None:
        return []
    return [
        {
            "members": _indices(prediction, trial.members),
            "base": trial.base,
            "rise": trial.rise,
            "error": trial.standard_error if np.isfinite(trial.standard_error) else None,
        }
        for trial in pair.verification.measured or (*pair.verification.trials, pair.verification.chosen)
    ]


def _indices(prediction: BarrierPrediction, members: Any) -> list[int]:
    return sorted(prediction.layers.index(name) for name in members)


def _short(values: np.ndarray) -> Any:
    """The same numbers to seven digits, nested as they were."""
    if values.ndim > 1:
        return [_short(row) for row in values]
    return [float(f"{value:.7g}") for value in values]
