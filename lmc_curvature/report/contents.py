"""What a report shows: pairs of networks with what is known of each, the tables of an experiment, and spectra."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from lmc_curvature.barrier import BarrierMeasurement, BarrierPrediction
from lmc_curvature.barrier.midpoint import Midpoint, free_rise, measured_midpoint, predicted_midpoint
from lmc_curvature.curvature.spectra import SpectralDensity
from lmc_curvature.errors import OptionError
from lmc_curvature.merging import Selection, Verification, select_layers
from lmc_curvature.merging.rises import mean_loss
from lmc_curvature.tracing import Traces

TITLE = "Can these networks be averaged?"

Result = BarrierPrediction | BarrierMeasurement | Selection | Verification | Traces | SpectralDensity
"""What a report can be made of."""
Results = Result | Sequence[Result]
"""One result, or several of the same two networks."""

# Measurements at so many positions are of sets of layers, and draw no curve.
_COARSE = 3


@dataclass(frozen=True, eq=False, kw_only=True)
class Pair:
    """What is known of two networks.

    Attributes:
        title: What tells the pair from others; empty where there is one.
        prediction: The predicted barriers.
        measurements: Measured barriers, each with what to call it.
        selection: The layers that may be averaged within a budget.
        verification: What was measured of the selection.
        merge: The words of the command that merges the two, without layers; None where their files are not known.
    """

    title: str = ""
    prediction: BarrierPrediction | None = None
    measurements: Mapping[str, BarrierMeasurement] = field(default_factory=dict)
    selection: Selection | None = None
    verification: Verification | None = None
    merge: tuple[str, ...] | None = None

    @property
    def midpoint(self) -> Midpoint | None:
        """The network halfway between the two, as the prediction or else a measurement evaluated it."""
        found = [] if self.prediction is None else [predicted_midpoint(self.prediction)]
        found += [measured_midpoint(measurement) for measurement in self.measurements.values()]
        return next((each for each in found if each is not None), None)

    @property
    def loss_measurements(self) -> dict[str, BarrierMeasurement]:
        """The measurements of the loss."""
        return {name: each for name, each in self.measurements.items() if "loss" in each.metrics}


def is_of_layers(prediction: BarrierPrediction, measurement: BarrierMeasurement) -> bool:
    """Whether the measured sets are of the prediction's layers."""
    return set(prediction.layers).issuperset(name for members in measurement.sets for name in members)


def shown_curves(pair: Pair, metric: str = "loss") -> dict[str, BarrierMeasurement]:
    """The measurements of the whole network between its ends: of a few positions only if there are no finer ones."""
    found = {name: each for name, each in pair.measurements.items() if metric in each.metrics and len(each.alphas) > 1}
    fine = {name: each for name, each in found.items() if len(each.alphas) > _COARSE}
    return fine or found


class Comparison(NamedTuple):
    """Barriers of measured sets, each at the position between the ends where it was measured to be highest.

    Attributes:
        measured: By measurement, (sets,).
        sampling: Their standard errors.
        predicted: By the prediction.
        expansion: Its expansion errors.
    """

    measured: np.ndarray
    sampling: np.ndarray
    predicted: np.ndarray
    expansion: np.ndarray


def highest_places(measurement: BarrierMeasurement) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of `layer_curves` where each is highest between the ends, at which every barrier is zero."""
    curves, inside = measurement.layer_curves(), (measurement.alphas > 0) & (measurement.alphas < 1)
    return np.arange(len(curves)), np.where(inside, curves, -np.inf).argmax(axis=1)


def compare(prediction: BarrierPrediction | None, measurement: BarrierMeasurement) -> Comparison | None:
    """The measured sets beside their predictions; None where there are none, or no prediction of these layers."""
    if prediction is None or not measurement.sets or not is_of_layers(prediction, measurement):
        return None
    curves, place = measurement.layer_curves(), highest_places(measurement)
    sets, alphas = list(measurement.sets), measurement.alphas
    return Comparison(
        curves[place],
        measurement.curve_errors()[1:][place],
        prediction.set_barriers(sets, alphas)[place],
        prediction.set_expansion_errors(sets, alphas)[place],
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Contents:
    """What a report shows.

    Attributes:
        title: The heading.
        pairs: The pairs of networks.
        traces: The tables of an experiment.
        densities: Spectra, each with what to call it.
        provenance: What all this was computed from, as what JSON can hold.
        raw: Whether the values of every batch are part of the page.
    """

    title: str
    pairs: tuple[Pair, ...] = ()
    traces: Traces | None = None
    densities: Mapping[str, SpectralDensity] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    raw: bool = False


def gather(
    results: Results | Mapping[Any, Results],
    *,
    title: str | None = None,
    budget: float | None = None,
    relative_budget: float | None = None,
    provenance: Mapping[str, Any] | None = None,
    raw: bool = False,
) -> Contents:
    """The contents of a report on results, as `write_report` takes them.

    Raises:
        OptionError: There is nothing to show, something that is no result, or several results of a kind where one fits.
    """
    named = {"": results} if not isinstance(results, Mapping) else {str(name): each for name, each in results.items()}
    everything = {name: _listed(each) for name, each in named.items()}
    flat = [result for each in everything.values() for result in each]
    if not flat:
        raise OptionError("There is no result to report: pass a prediction, a measurement, a selection or traces.")
    pairs = [
        pair_of(name, _without(each, Traces, SpectralDensity), budget=budget, relative_budget=relative_budget)
        for name, each in everything.items()
        if _without(each, Traces, SpectralDensity)
    ]
    densities = {
        name or "spectrum" if len(found) == 1 else f"{name or 'spectrum'} {number}": density
        for name, each in everything.items()
        for found in [_of(each, SpectralDensity)]
        for number, density in enumerate(found, 1)
    }
    return Contents(
        title=title or TITLE,
        pairs=tuple(pairs),
        traces=_only(_of(flat, Traces), "traces"),
        densities=densities,
        provenance=provenance or {},
        raw=raw,
    )


def pair_of(
    title: str,
    results: Iterable[Any] | Mapping[str, Any],
    *,
    budget: float | None = None,
    relative_budget: float | None = None,
    merge: Sequence[str] | None = None,
) -> Pair:
    """The pair of networks that some results are of; a mapping names its measurements.

    Without a selection among them, layers are selected within a budget, by default the rise that counts as none.
    """
    named: Mapping[Any, Any] = results if isinstance(results, Mapping) else dict(enumerate(results))
    of_all = list(named.values())
    verification = _only(_of(of_all, Verification), "verification")
    selection = _only(_of(of_all, Selection), "selection") or (verification and verification.selection)
    prediction = _only(_of(of_all, BarrierPrediction), "prediction") or (selection and selection.choice.prediction)
    if selection is None and prediction is not None:
        selection = _selection(prediction, budget, relative_budget)
    measurements = {str(name): each for name, each in named.items() if isinstance(each, BarrierMeasurement)}
    if not isinstance(results, Mapping):
        names = ["measured", *(f"measured ({number})" for number in range(2, len(measurements) + 1))]
        measurements = dict(zip(names, measurements.values(), strict=False))
    return Pair(
        title=title,
        prediction=prediction,
        measurements=measurements,
        selection=selection,
        verification=verification,
        merge=None if merge is None else tuple(merge),
    )


def _selection(prediction: BarrierPrediction, budget: float | None, relative_budget: float | None) -> Selection:
    if budget is None and relative_budget is None:
        budget = free_rise(mean_loss(prediction))
    weight = "distance" if prediction.parameters is None else "parameters"
    return select_layers(prediction, budget, relative_budget=relative_budget, weight=weight)


def _listed(results: Results) -> list[Any]:
    listed = [results] if isinstance(results, Result) or not isinstance(results, Iterable) else list(results)
    for result in listed:
        if not isinstance(result, Result):
            raise OptionError(
                f"{type(result).__name__} is no result that a report shows: pass predictions, measurements, "
                "selections, verifications, traces or spectral densities."
            )
    return listed


def _of(results: Iterable[Any], *kinds: type) -> list[Any]:
    return [result for result in results if isinstance(result, kinds)]


def _without(results: Iterable[Any], *kinds: type) -> list[Any]:
    return [result for result in results if not isinstance(result, kinds)]


def _only(found: Sequence[Any], what: str) -> Any:
    if len(found) > 1:
        raise OptionError(
            f"Several results of one kind ({what}) for the same two networks: pass a mapping from the name of each "
            "pair to its results."
        )
    return found[0] if found else None
