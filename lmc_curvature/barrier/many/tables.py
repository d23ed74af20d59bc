"""Predictions and measurements of several networks as tables."""

from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import pandas as pd

from lmc_curvature.errors import check_choice

if TYPE_CHECKING:
    from lmc_curvature.barrier.many.measurement import BarriersMeasurement
    from lmc_curvature.barrier.many.prediction import BarriersPrediction

Table = Literal["pairs", "layers", "subsets"]
"""What a row of a prediction's table is of."""
MeasuredTable = Literal["pairs", "sets", "subsets"]
"""What a row of a measurement's table is of."""


def prediction_table(prediction: "BarriersPrediction", rows: Table) -> pd.DataFrame:
    """A prediction of several networks as a table.

    Raises:
        OptionError: `rows` is not a choice.
    """
    check_choice("rows", rows, get_args(Table))
    if rows == "subsets":
        return pd.DataFrame([vars(subset) for subset in prediction.subsets])
    if rows == "layers":
        alone = np.eye(len(prediction.layers), dtype=bool)
        return pd.DataFrame(
            {
                "layer": list(prediction.layers),
                "barrier": prediction.layer_barriers(),
                "barrier_se": [prediction.mean_standard_error(layer) for layer in prediction.layers],
                "expansion_error": prediction.mean_expansion_errors(alone),
            }
        )
    return pd.DataFrame(
        [
            {
                "first": first,
                "second": second,
                "first_loss": pair.endpoints[0].loss,
                "second_loss": pair.endpoints[1].loss,
                "distance": pair.distance,
                "barrier": pair.barrier(),
                "barrier_se": pair.standard_error(),
                "expansion_error": pair.expansion_error(),
                "position": pair.position(),
            }
            for (first, second), pair in prediction.pairs.items()
        ]
    )


def measurement_table(measurement: "BarriersMeasurement", rows: MeasuredTable) -> pd.DataFrame:
    """A measurement of several networks as a table, with columns for every metric.

    Raises:
        OptionError: `rows` is not a choice.
    """
    check_choice("rows", rows, get_args(MeasuredTable))
    metrics = measurement.metrics
    if rows == "pairs":
        pairs = {names: measurement.pair(*names) for names in measurement.pairs}
        return pd.DataFrame(
            [
                {"first": first, "second": second}
                | {f"{metric}_barrier": pair.barrier(metric) for metric in metrics}
                | {f"{metric}_barrier_se": pair.standard_error(metric) for metric in metrics}
                for (first, second), pair in pairs.items()
            ]
        )
    columns: dict[str, object] = {}
    for metric in metrics:
        if rows == "sets":
            values, errors = measurement.set_barriers(metric), measurement.set_standard_errors(metric)
            columns |= {f"{metric}_barrier": values, f"{metric}_barrier_se": errors}
        else:
            values, errors = measurement.subset_rises(metric), measurement.subset_standard_errors(metric)
            columns |= {
                metric: measurement.subset_values(metric),
                f"{metric}_rise": values,
                f"{metric}_rise_se": errors,
            }
    return pd.DataFrame({rows.removesuffix("s"): list(getattr(measurement, rows)), **columns})
