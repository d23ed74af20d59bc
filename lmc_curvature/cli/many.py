"""`predict` and `measure` of three networks or more.

As in `app`, the library is imported inside the functions.
"""

from typing import TYPE_CHECKING, Any

from lmc_curvature.cli.parsing import anchor_positions, metric_names, names_in, numbers_in
from lmc_curvature.errors import OptionError

if TYPE_CHECKING:
    from lmc_curvature import BarriersMeasurement, BarriersPrediction
    from lmc_curvature.cli.options import Comparison


def predict_many(
    comparison: "Comparison", names: str | None, weights: str | None, *, anchors: str, witness: bool
) -> "tuple[BarriersPrediction, dict[str, Any], Any]":
    """The prediction for all networks of a comparison, what JSON holds of it, and a table of layers.

    Args:
        comparison: The options that commands share.
        names: What `--names` gives.
        weights: What `--weights` gives.
        anchors: What `--anchors` gives.
        witness: Whether derivatives are compared with differences of the loss.
    """
    from lmc_curvature import predict_barriers

    options = _options(comparison, names, weights) | {"anchors": anchor_positions(anchors), "witness": witness}
    networks = comparison.networks()
    comparison.check_sets(networks[0])
    loader = comparison.batches()
    provenance = comparison.provenance(loader)
    prediction = predict_barriers(networks, loader, **options)
    sets = comparison.sets()
    return prediction, prediction_record(prediction, sets) | provenance, layer_table(prediction, sets)


def measure_many(
    comparison: "Comparison",
    names: str | None,
    weights: str | None,
    subset: list[str] | None,
    *,
    each: bool,
    alphas: int,
    metrics: str | None,
) -> "tuple[BarriersMeasurement, dict[str, Any]]":
    """The measurement of all networks of a comparison, and what JSON holds of it.

    Args:
        comparison: The options that commands share.
        names: What `--names` gives.
        weights: What `--weights` gives.
        subset: What every `--subset` gives.
        each: Whether each layer is moved to the mean alone.
        alphas: How many positions between two networks.
        metrics: What `--metrics` gives.
    """
    from lmc_curvature import measure_barriers

    options = _options(comparison, names, weights)
    options |= {"subsets": [names_in("--subset", some, of="network") for some in subset or ()]}
    options |= {"sets": "each" if each else comparison.sets(), "alphas": alphas}
    options |= {"metrics": metric_names(metrics, options["loss_fn"])}
    networks, loader = comparison.networks(), comparison.batches()
    provenance = comparison.provenance(loader)
    measurement = measure_barriers(networks, loader, **options)
    return measurement, measurement_record(measurement) | provenance


def refuse_for_two(**options: object) -> None:
    """Refuse options that are of three networks or more.

    Raises:
        OptionError: One of them is given.
    """
    for name, value in options.items():
        if value:
            raise OptionError(f"--{name} is for three networks or more, and there are two: leave it out.")


def network_weights_in(weights: str | None) -> tuple[float, ...] | None:
    """The numbers that `--weights` gives; None without.

    Raises:
        OptionError: They are no numbers.
    """
    return (
        None if weights is None else numbers_in("--weights", weights, float, "a number a network, such as 0.5,0.3,0.2")
    )


def prediction_record(prediction: "BarriersPrediction", sets: list[list[str]]) -> dict[str, Any]:
    """A prediction for several networks as what JSON can hold, with sets of layers at the mean."""
    from lmc_curvature.cli.tables import plain

    errors = prediction.mean_expansion_errors(sets).tolist() if sets else []
    return plain(
        _facts(prediction)
        | {
            "losses": prediction.losses.tolist(),
            "mean": {
                "loss": prediction.mean_loss,
                "barrier": prediction.mean_barrier(),
                "standard_error": prediction.mean_standard_error(),
            },
            "pairs": prediction.to_dataframe("pairs").to_dict("records"),
            "layers": prediction.to_dataframe("layers").to_dict("records"),
            "sets": [
                {
                    "layers": members,
                    "barrier": prediction.mean_barrier(members),
                    "standard_error": prediction.mean_standard_error(members),
                    "expansion_error": error,
                }
                for members, error in zip(sets, errors, strict=True)
            ],
            "subsets": prediction.to_dataframe("subsets").to_dict("records"),
        }
    )


def measurement_record(measurement: "BarriersMeasurement") -> dict[str, Any]:
    """A measurement of several networks as what JSON can hold."""
    from lmc_curvature.cli.tables import plain

    return plain(
        _facts(measurement)
        | {
            "alphas": measurement.alphas.tolist(),
            "metrics": {
                metric: {
                    "networks": measurement.network_values(metric).tolist(),
                    "mean": measurement.mean_value(metric),
                    "barrier": measurement.mean_barrier(metric),
                    "standard_error": measurement.mean_standard_error(metric),
                }
                for metric in measurement.metrics
            },
            **{rows: measurement.to_dataframe(rows).to_dict("records") for rows in ("pairs", "sets", "subsets")},
        }
    )


def layer_table(prediction: "BarriersPrediction", sets: list[list[str]]) -> Any:
    """A row a layer, then a row a set: the barrier between the networks and their mean, with its errors."""
    from rich.table import Table

    from lmc_curvature.cli.tables import cell, right_columns

    table = Table(
        "layers", *right_columns("barrier", "± sampling", "± expansion"), title="Barriers of layers at the mean of all"
    )
    rows = [*([name] for name in prediction.layers), *sets]
    values, errors = prediction.mean_barriers(rows).tolist(), prediction.mean_expansion_errors(rows).tolist()
    for members, value, error in zip(rows, values, errors, strict=True):
        numbers = (cell(value), cell(prediction.mean_standard_error(members), ".2g"), cell(error, ".2g"))
        table.add_row(" + ".join(members), *numbers, end_section=members == [prediction.layers[-1]])
    return table


def _facts(result: "BarriersPrediction | BarriersMeasurement") -> dict[str, Any]:
    names = ("examples", "batch_norm", "loss", "names")
    facts = {name: getattr(result, name) for name in names}
    return facts | {"weights": result.weights.tolist(), "notes": list(result.notes)}


def _options(comparison: "Comparison", names: str | None, weights: str | None) -> dict[str, Any]:
    """Options of `predict_barriers` and `measure_barriers`.

    Raises:
        OptionError: An option is for two networks alone, or names and weights are not one for each.
    """
    from lmc_curvature.segment.hull import network_names, network_weights

    options = comparison.computation()
    if options.pop("tolerance") is not None:
        raise OptionError("--tolerance is for two networks: leave it out, or bound the batches by --max-batches.")
    labels = network_names(len(comparison.paths), names_in("--names", names, of="network") or _labels(comparison))
    shares = network_weights(network_weights_in(weights), labels)
    return options | {"names": labels, "weights": shares, "base": labels["ab".index(comparison.base)]}


def _labels(comparison: "Comparison") -> list[str]:
    """What networks are called by their files: without folders and suffixes, unless these tell them apart."""
    short = [path.resolve().name if path.is_dir() else path.stem for path in comparison.paths]
    return short if len(set(short)) == len(short) else [str(path) for path in comparison.paths]
