"""What a prediction and a measurement are, in a few lines."""

from typing import TYPE_CHECKING

import numpy as np

from lmc_curvature.averages import with_error
from lmc_curvature.barrier.expansions import Expansion
from lmc_curvature.barrier.losses import data_in_words
from lmc_curvature.barrier.verdict import barrier_in_words, verdict
from lmc_curvature.errors import counted
from lmc_curvature.plotting.summary import Summary, some

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lmc_curvature.barrier.measurement import BarrierMeasurement
    from lmc_curvature.barrier.prediction import BarrierPrediction

_SHOWN: tuple[Expansion, ...] = ("anchored", "second-order")


def prediction_summary(prediction: "BarrierPrediction") -> Summary:
    """Barriers with both errors, an answer, and the ends."""
    first, second = prediction.endpoints
    barriers = prediction.layer_barriers()
    highest = np.argsort(barriers, kind="stable")[::-1][:3]
    data = data_in_words(prediction.examples, first.weights, prediction.loss)
    found = {f"barrier, {each}": barrier_in_words(prediction, each) for each in _SHOWN if each in prediction.expansions}
    positions = ", ".join(f"{anchor.alpha:.3g}" for anchor in prediction.anchors)

    def draw() -> "Figure":
        from lmc_curvature.barrier.drawing import draw_predicted_curves

        return draw_predicted_curves(prediction)

    return Summary(
        f"BarrierPrediction for {counted(len(prediction.layers), 'layer')} from {data}, anchors at α = {positions}",
        {
            "verdict": verdict(prediction)[0],
            **found,
            "loss at the ends": f"{first.loss:.4g}, {second.loss:.4g}; distance {prediction.distance:.4g}",
            "highest layers": some([f"{prediction.layers[index]} {barriers[index]:.3g}" for index in highest]),
            "batch_norm": prediction.batch_norm,
            **({"notes": some(prediction.notes)} if prediction.notes else {}),
        },
        "print(prediction), .plot(), .to_dataframe(), .barrier(layers)",
        draw,
    )


def measurement_summary(measurement: "BarrierMeasurement") -> Summary:
    """Barriers in every metric with their sampling errors, the ends, and the highest sets."""
    sets = f" and {counted(len(measurement.sets), 'set')} of layers" if measurement.sets else ""
    data = data_in_words(measurement.examples, measurement.weights(measurement.metrics[0]), measurement.loss)
    facts = {}
    for metric in measurement.metrics:
        first, second = measurement.ends(metric)
        height, highest = measurement.barrier(metric), measurement.alphas[measurement.curve(metric).argmax()]
        barrier = with_error(height, measurement.standard_error(metric), of="sampling")
        where = f"at α = {highest:.2g}" if height > 0 else "nowhere above the chord"
        facts[f"{metric} barrier"] = f"{barrier} {where}; at the ends {first:.4g}, {second:.4g}"
    if "loss" in measurement.metrics:
        facts["kind of curve"] = measurement.kind
    if measurement.sets:
        barriers = measurement.layer_barriers(measurement.metrics[0])
        order = np.argsort(barriers, kind="stable")[::-1][:3]
        facts["highest sets"] = some([f"{measurement.layers[index]} {barriers[index]:.3g}" for index in order])
    facts["batch_norm"] = measurement.batch_norm
    if measurement.notes:
        facts["notes"] = some(measurement.notes)

    def draw() -> "Figure":
        from lmc_curvature.barrier.drawing import draw_measured_curves

        return draw_measured_curves(measurement)

    return Summary(
        f"BarrierMeasurement of the whole network{sets} on {data}",
        facts,
        "print(measurement), .plot(), .to_dataframe(), .curve(metric)",
        draw,
    )
