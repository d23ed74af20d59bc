"""What predictions and measurements of several networks are, in a few lines and in full."""

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from lmc_curvature.averages import with_error
from lmc_curvature.barrier.losses import data_in_words
from lmc_curvature.errors import counted
from lmc_curvature.plotting.summary import Summary, some

if TYPE_CHECKING:
    from lmc_curvature.barrier.many.measurement import BarriersMeasurement
    from lmc_curvature.barrier.many.prediction import BarriersPrediction

# Layers and subsets that are shown; and what is rounding of a loss.
_SHOWN, _ROUNDING = 5, 1e-12
_PAIRS = "pairs (highest point of the curve ± sampling error; where nothing rises, the middle)"


def prediction_summary(prediction: "BarriersPrediction") -> Summary:
    """The mean of all, the lowest and the highest pair, the best subsets and the layers in the way."""
    pairs = _extremes(prediction.names, prediction.heights())
    return Summary(
        f"BarriersPrediction for {counted(len(prediction.names), 'network')}, "
        f"{counted(len(prediction.layers), 'layer')}, from {_data(prediction)}",
        {
            "mean of all": f"loss {prediction.mean_loss:.4g}, {_mean_barrier(prediction, of='sampling')}",
            "losses": some(_named(prediction.names, prediction.losses)),
            "pairs": pairs,
            "highest layers": some(_layers(prediction)),
            "expansion error": f"pairs: {_error_of_pairs(prediction)}; layers: {_error_of_layers(prediction)}",
            "best subset": str(prediction.subsets[0]),
            "batch_norm": prediction.batch_norm,
            **({"notes": some(prediction.notes)} if prediction.notes else {}),
        },
        "print(prediction), .plot(), .barriers(), .subsets, .pair(a, b), .to_dataframe()",
        prediction.plot,
    )


def prediction_text(prediction: "BarriersPrediction") -> str:
    """All pairs, the mean of all, the layers in its way and the best subsets."""
    errors = prediction.mean_errors
    said = (
        ""
        if errors is None
        else f", error {100 * errors[1]:.3g} % (the networks {100 * prediction.weights @ errors[0]:.3g} %)"
    )
    layers = ", ".join(_layers(prediction)[:_SHOWN])
    lines = [
        f"Barriers of {counted(len(prediction.names), 'network')} predicted from {_data(prediction)}, "
        f"{counted(len(prediction.layers), 'layer')}, batch_norm={prediction.batch_norm!r}",
        f"  losses          {', '.join(_named(prediction.names, prediction.losses))}",
        f"  mean of all     loss {prediction.mean_loss:.4g}{said}: {_mean_barrier(prediction)}, as evaluated",
        f"  highest layers  {layers}; expansion error {_error_of_layers(prediction)}",
        f"  {_PAIRS}; expansion error {_error_of_pairs(prediction)}",
        *_matrix(prediction.names, prediction.heights(), prediction.standard_errors()),
        f"  subsets with the least loss of their mean, of {len(prediction.subsets)}",
        *(f"    {subset}" for subset in prediction.subsets[:_SHOWN]),
        *(f"  {note}" for note in prediction.notes),
    ]
    return "\n".join(lines)


def measurement_summary(measurement: "BarriersMeasurement") -> Summary:
    """The mean of all in every metric, the lowest and the highest pair, and the best subset that was measured."""
    metric = measurement.metrics[0]
    facts = {
        f"{each} of mean": f"{measurement.mean_value(each):.4g}, {_measured_barrier(measurement, each, of='sampling')}"
        for each in measurement.metrics
    }
    facts[f"{metric} of each"] = some(_named(measurement.names, measurement.network_values(metric)))
    facts["pairs"] = _extremes(measurement.names, measurement.heights(metric))
    if measurement.sets:
        facts["highest sets"] = some(_sets(measurement, metric))
    if measurement.subsets:
        facts["best subset"] = _subsets(measurement, metric)[0]
    facts["batch_norm"] = measurement.batch_norm
    if measurement.notes:
        facts["notes"] = some(measurement.notes)
    return Summary(
        f"BarriersMeasurement of {counted(len(measurement.names), 'network')} on {_measured_data(measurement)}",
        facts,
        "print(measurement), .plot(), .barriers(metric), .pair(a, b), .to_dataframe()",
        measurement.plot,
    )


def measurement_text(measurement: "BarriersMeasurement") -> str:
    """The mean of all and all pairs in every metric; sets of layers and subsets of networks in the first."""
    metric = measurement.metrics[0]
    lines = [
        f"Barriers of {counted(len(measurement.names), 'network')} measured on {_measured_data(measurement)}, "
        f"batch_norm={measurement.batch_norm!r}"
    ]
    for each in measurement.metrics:
        lines += [
            f"  {each} of networks: {', '.join(_named(measurement.names, measurement.network_values(each)))}",
            f"  {each} of their mean: {measurement.mean_value(each):.4g}, {_measured_barrier(measurement, each)}",
            f"  {each} of {_PAIRS}",
            *_matrix(measurement.names, measurement.heights(each), measurement.standard_errors(each)),
        ]
    if measurement.sets:
        lines += [f"  sets of layers at the mean, by {metric}", *(f"    {each}" for each in _sets(measurement, metric))]
    if measurement.subsets:
        lines += [f"  means of subsets, by {metric}", *(f"    {each}" for each in _subsets(measurement, metric))]
    return "\n".join([*lines, *(f"  {note}" for note in measurement.notes)])


def _data(prediction: "BarriersPrediction") -> str:
    first = next(iter(prediction.spokes.values()))
    return data_in_words(prediction.examples, first.endpoints[0].weights, prediction.loss)


def _measured_data(measurement: "BarriersMeasurement") -> str:
    return data_in_words(measurement.examples, measurement.counts(measurement.metrics[0]), measurement.loss)


def _mean_barrier(prediction: "BarriersPrediction", of: str = "") -> str:
    return f"barrier {with_error(prediction.mean_barrier(), prediction.mean_standard_error(), of=of)}"


def _measured_barrier(measurement: "BarriersMeasurement", metric: str, of: str = "") -> str:
    barrier, error = measurement.mean_barrier(metric), measurement.mean_standard_error(metric)
    return f"barrier {with_error(barrier, error, of=of)}"


def _named(names: Sequence[str], values: Float[np.ndarray, " N"]) -> list[str]:
    return [f"{name} {value:.4g}" for name, value in zip(names, values, strict=True)]


def _extremes(names: Sequence[str], barriers: Float[np.ndarray, "N N"]) -> str:
    """The lowest and the highest barrier of all pairs; the one of two networks."""
    pairs = sorted(combinations(range(len(names)), 2), key=lambda pair: barriers[pair])
    shown = dict.fromkeys((pairs[0], pairs[-1]))
    return " to ".join(f"{barriers[i, j]:.3g} ({names[i]}, {names[j]})" for i, j in shown)


def _error_of_pairs(prediction: "BarriersPrediction") -> str:
    """The largest expansion error of a pair."""
    error = float(prediction.expansion_errors().max())
    # At anchors rounding is left.
    return f"about {error:.2g}" if error > _ROUNDING * np.abs(prediction.losses).max() else "none, as evaluated"


def _error_of_layers(prediction: "BarriersPrediction") -> str:
    """The median expansion error of single layers."""
    errors = prediction.mean_expansion_errors(np.eye(len(prediction.layers), dtype=bool))
    return f"about {float(np.median(errors)):.2g}"


def _layers(prediction: "BarriersPrediction") -> list[str]:
    barriers = prediction.layer_barriers()
    order = np.argsort(barriers, kind="stable")[::-1]
    return [f"{prediction.layers[index]} {barriers[index]:.3g}" for index in order]


def _sets(measurement: "BarriersMeasurement", metric: str) -> list[str]:
    barriers, errors = measurement.set_barriers(metric), measurement.set_standard_errors(metric)
    rows = sorted(zip(barriers.tolist(), errors.tolist(), measurement.sets, strict=True), reverse=True)
    return [f"{', '.join(members)}: {with_error(barrier, error, 3)}" for barrier, error, members in rows]


def _subsets(measurement: "BarriersMeasurement", metric: str) -> list[str]:
    values, rises = measurement.subset_values(metric).tolist(), measurement.subset_rises(metric).tolist()
    errors = measurement.subset_standard_errors(metric).tolist()
    rows = sorted(zip(values, rises, errors, measurement.subsets, strict=True))
    return [f"{', '.join(some)}: {value:.4g}, rise {with_error(rise, error, 3)}" for value, rise, error, some in rows]


def _matrix(names: Sequence[str], values: Float[np.ndarray, "N N"], errors: Float[np.ndarray, "N N"]) -> list[str]:
    """Lines of a table: a row and a column a network, numbers above the diagonal."""
    cells = [
        [with_error(values[i, j], errors[i, j], 3) if i < j else "" for j in range(1, len(names))]
        for i in range(len(names) - 1)
    ]
    width = max(len(text) for text in (*names, *(cell for row in cells for cell in row)))
    rows = [("", *names[1:]), *((name, *row) for name, row in zip(names, cells, strict=False))]
    return ["    " + "  ".join(f"{cell:<{width}}" for cell in row).rstrip() for row in rows]
