"""Predictions and measurements as files have them: their fields, and whether these belong together."""

from os import PathLike
from typing import Any, get_args

import numpy as np

from lmc_curvature.barrier.cube import Anchor
from lmc_curvature.barrier.expansions import check_anchors
from lmc_curvature.barrier.metrics import METRICS
from lmc_curvature.curvature.projection import Projection
from lmc_curvature.objective import BatchNormPolicy
from lmc_curvature.storage import check_arrays, load_arrays, refuse_damage

PREDICTION, MEASUREMENT = "barrier-prediction", "barrier-measurement"
"""What files of either say that they hold."""

# The dimensions of each array, by their names.
PROJECTION = {
    "batch_sizes": "batches",
    "batch_losses": "batches",
    "batch_slopes": "batches layers",
    "batch_curvatures": "batches layers layers",
}
WEIGHTS = "batch_weights"
OPTIONAL = {"parameters": "layers", "errors": "anchors", "norms": "2 layers"}


def prediction_fields(path: str | PathLike[str]) -> dict[str, Any]:
    """The fields of a `BarrierPrediction` in a file.

    Raises:
        FileNotFoundError: There is no such file.
        FileFormatError: The file is damaged or holds something else.
    """
    arrays, metadata = load_arrays(path, PREDICTION)
    with refuse_damage(path):
        return fields_of_prediction(arrays, metadata)


def fields_of_prediction(arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `BarrierPrediction` of which a file has some arrays and other values.

    Raises:
        ValueError: They do not belong together; TypeError or KeyError likewise.
    """
    # Files of earlier versions have the two ends alone, and no notes.
    word, positions = ("anchor", metadata["anchors"]) if "anchors" in metadata else ("endpoint", [0.0, 1.0])
    layers, numbered = _names(metadata["layers"]), [f"{word}_{number}." for number in range(len(positions))]
    shapes = {"distances": "layers"} | {name: shape for name, shape in OPTIONAL.items() if name in arrays}
    for head in numbered:
        shapes |= {head + name: shape for name, shape in PROJECTION.items()}
        # Weights are there where they are not the sizes.
        shapes |= {head + WEIGHTS: "batches"} if head + WEIGHTS in arrays else {}
        _check_weights(arrays, head)
    check_arrays(arrays, shapes, layers=len(layers), anchors=len(positions))

    def projection(head: str) -> Projection:
        fields: dict[str, Any] = {n: arrays[head + n] for n in (*PROJECTION, WEIGHTS) if head + n in arrays}
        return Projection(**fields)

    groups, cosine = metadata.get("groups"), metadata.get("cosine")
    return {
        "layers": layers,
        "anchors": tuple(map(Anchor, check_anchors(positions).tolist(), map(projection, numbered))),
        "distances": arrays["distances"],
        **{name: arrays[name] for name in OPTIONAL if name in arrays},
        "cosine": None if cosine is None else float(cosine),
        "groups": None if groups is None else {layer: _names(groups[layer]) for layer in groups},
        "base": _choice(metadata.get("base", "a"), ("a", "b", "other")),
        **_common_fields(metadata),
    }


def measurement_fields(path: str | PathLike[str]) -> dict[str, Any]:
    """The fields of a `BarrierMeasurement` in a file.

    Raises:
        FileNotFoundError: There is no such file.
        FileFormatError: The file is damaged or holds something else.
    """
    arrays, metadata = load_arrays(path, MEASUREMENT)
    with refuse_damage(path):
        # JSON has lists only.
        sets, metrics = tuple(map(_names, metadata["sets"])), _names(metadata["metrics"])
        points = tuple({str(layer): float(x) for layer, x in point.items()} for point in metadata.get("points", ()))
        shapes = {"alphas": "n", "batch_sizes": "batches"}
        shapes |= {"batch_ends": "batches metrics 2", "batch_values": "batches metrics curves n"}
        optional = {"batch_sides": "batches metrics sets n 2", "batch_points": "batches metrics points"}
        optional[WEIGHTS] = "batches metrics"
        shapes |= {name: shape for name, shape in optional.items() if name in arrays}
        counts = {"metrics": len(metrics), "curves": 1 + len(sets), "sets": len(sets), "points": len(points)}
        check_arrays(arrays, shapes, **counts)
        _check_weights(arrays, "")
        if not metrics or len({*metrics} & {*METRICS}) != len(metrics) or () in sets:
            raise ValueError(f"metrics {metrics} of sets {sets}")
        positions = arrays["alphas"]
        if not len(positions) or positions.min() < 0 or positions.max() > 1 or (np.diff(positions) < 0).any():
            raise ValueError(f"positions {positions}")
        fields = {name: arrays[name] for name in shapes}
        return fields | {"sets": sets, "points": points, "metrics": metrics, **_common_fields(metadata)}


def _common_fields(metadata: dict[str, Any]) -> dict[str, Any]:
    """What predictions and measurements both say of the loss; files of earlier versions do not name it."""
    loss, interruption = metadata.get("loss"), metadata.get("interruption")
    return {
        "batch_norm": _choice(metadata["batch_norm"], get_args(BatchNormPolicy)),
        "notes": _names(metadata.get("notes", [])),
        "loss": None if loss is None else str(loss),
        "interruption": None if interruption is None else str(interruption),
    }


def _names(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"{values!r} is no list of names")
    return tuple(values)


def _choice(value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{value!r} is none of {choices}")
    return value


def _check_weights(arrays: dict[str, np.ndarray], head: str) -> None:
    """Refuse batches that have no examples, or that together count for nothing."""
    sizes = arrays[f"{head}batch_sizes"]
    weights = arrays.get(head + WEIGHTS, sizes)
    if sizes.dtype.kind not in "iu" or not (sizes > 0).all() or (weights < 0).any() or not weights.sum(axis=0).all():
        raise ValueError(f"batches of {sizes} examples, which count for {weights}")
