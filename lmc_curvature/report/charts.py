"""The charts of a pair of networks, as data and layout of plotly; the page adds the look that all have."""

from collections.abc import Iterable
from html import escape
from typing import Any

import numpy as np

from lmc_curvature.barrier import BarrierMeasurement, BarrierPrediction
from lmc_curvature.curvature.spectra import SpectralDensity
from lmc_curvature.plotting.style import GREEN, GREY, PURPLE, VERMILION
from lmc_curvature.report.contents import Pair, compare, shown_curves

Chart = dict[str, Any]
"""`data` and `layout` of plotly, and `label`, what it shows in words."""

# Okabe and Ito's hues, as far as they are told apart from white and from black; their blue is too dark for that.
BLUE = "#1A86C7"
HUES = (VERMILION, GREEN, PURPLE, BLUE)
SYMBOLS = ("circle", "square", "triangle-up", "x")
_POINTS = 41
# Barriers that differ by more than this factor are compared on logarithmic axes.
_DECADES = 30.0


def compact(values: Any) -> list[Any]:
    """Numbers to six digits, nested as they were; None for what is not a number."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim > 1:
        return [compact(row) for row in array]
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in array]


def plain(text: str) -> str:
    """Text that plotly shows as it is, for plotly reads some HTML."""
    return escape(text, quote=False)


def pair_charts(pair: Pair) -> dict[str, Chart]:
    """The charts of a pair by their names, those that there are data for."""
    charts = {
        "curves": _curves(pair),
        "errors": _errors(pair),
        "layers": None if pair.prediction is None else _layers(pair, pair.prediction),
        "agreement": None if pair.prediction is None else _agreement(pair, pair.prediction),
    }
    return {name: chart for name, chart in charts.items() if chart is not None}


def _curves(pair: Pair) -> Chart | None:
    prediction, measurements = pair.prediction, shown_curves(pair)
    if prediction is None and not measurements:
        return None
    data = [] if prediction is None else _predicted_curves(prediction)
    for number, (name, measurement) in enumerate(measurements.items()):
        data.append(_measured_curve(name, measurement, "loss", number))
    label = "Barrier of the loss along the segment"
    if prediction is not None:
        label += f", predicted: {prediction.curve([0.5])[0]:.3g} at α = ½"
    for name, measurement in measurements.items():
        label += f"; {name}: at most {measurement.barrier():.3g}"
    return {"data": data, "layout": _axes("α, from A (0) to B (1)", "barrier of the loss"), "label": label}


def _predicted_curves(prediction: BarrierPrediction) -> list[Chart]:
    alphas = np.linspace(0, 1, _POINTS)
    curve = prediction.curve(alphas)
    sampling = np.nan_to_num([prediction.standard_error(alpha=alpha) for alpha in alphas])
    found, anchored = [], prediction.expansion == "anchored"
    if anchored:
        expansion = prediction.set_expansion_errors([None], alphas)[0]
        found.append(_band(alphas, curve, expansion, "rgba(0,114,178,0.18)", "± expansion"))
    # Of the two ends alone nothing is known of how far off that is.
    band, name = ("± sampling", "predicted") if anchored else ("± sampling alone", "predicted to second order")
    if np.isfinite(prediction.standard_error()):
        found.append(_band(alphas, curve, sampling, "rgba(0,114,178,0.40)", band))
    found.append(_line(alphas, curve, name, BLUE))
    if anchored:
        second = prediction.curve(alphas, expansion="second-order")
        found.append(_line(alphas, second, "second order", GREY, "dash"))
    positions = np.array([anchor.alpha for anchor in prediction.anchors])
    anchors = _points(positions, prediction.curve(positions), "anchors", BLUE, "diamond-open")
    anchors["marker"]["size"] = 11
    return [*found, anchors]


def _measured_curve(name: str, measurement: BarrierMeasurement, metric: str, number: int) -> Chart:
    hue = HUES[number % len(HUES)]
    points = _points(measurement.alphas, measurement.curve(metric), name, hue, SYMBOLS[number % len(SYMBOLS)])
    return points | {"error_y": _bar(measurement.curve_errors(metric)[0], hue)}


def _errors(pair: Pair) -> Chart | None:
    found = shown_curves(pair, "error")
    if not found:
        return None
    data = []
    for number, (name, measurement) in enumerate(found.items()):
        hue, symbol = HUES[number % len(HUES)], SYMBOLS[number % len(SYMBOLS)]
        bars = _bar(100 * measurement.curve_errors("error")[0], hue)
        points = _points(measurement.alphas, 100 * measurement.values("error"), name, hue, symbol)
        data.append(points | {"mode": "lines+markers", "error_y": bars})
    said = (f"{name}: at most {100 * each.values('error').max():.3g} %" for name, each in found.items())
    layout = _axes("α, from A (0) to B (1)", "error (% of the examples)")
    return {"data": data, "layout": layout, "label": f"Error along the segment; {'; '.join(said)}"}


def _layers(pair: Pair, prediction: BarrierPrediction) -> Chart:
    """Each layer moved alone, and how much the whole barrier falls when it is left out."""
    names, eye = [plain(name) for name in prediction.layers], np.eye(len(prediction.layers), dtype=bool)
    alone, error = prediction.set_barriers(eye), prediction.set_expansion_errors(eye)
    whole, without = prediction.set_barriers([None])[0], prediction.set_barriers(~eye)
    data: list[Chart] = [
        {"type": "bar", "orientation": "h", "y": names, "x": compact(alone), "name": "predicted, moved alone"}
        | {"marker": {"color": "rgba(0,114,178,0.55)", "line": {"color": BLUE, "width": 1}}},
        {"type": "scatter", "mode": "markers", "y": names, "x": compact(whole - without)}
        | {"name": "fall of the whole barrier if it is left out", "marker": _marker(VERMILION, "diamond")},
    ]
    if prediction.expansion == "anchored":
        data[0]["error_x"] = _bar(error, GREY)
    single = measured_alone(pair, prediction)
    if single:
        unknown = (np.nan, np.nan)
        values, errors = np.array([single.get(name, unknown) for name in prediction.layers]).T
        points = _points(values, errors, "measured, moved alone", GREEN) | {"error_x": _bar(errors, GREEN)}
        data.insert(1, points | {"y": names})
    layout = _axes("barrier of the loss at α = ½", "")
    layout["yaxis"] |= {"autorange": "reversed", "type": "category", "automargin": True, "dtick": 1}
    layout |= {"height": 150 + 24 * len(names), "bargap": 0.35, "hovermode": "closest"}
    highest = prediction.layers[int(alone.argmax())]
    return {"data": data, "layout": layout, "label": f"Barrier of each layer; the highest alone is {highest}'s"}


def measured_alone(pair: Pair, prediction: BarrierPrediction) -> dict[str, tuple[float, float]]:
    """Measured barriers at α = ½ of single layers, with their standard errors."""
    found = {}
    for measurement in pair.loss_measurements.values():
        (places,) = np.nonzero(np.isclose(measurement.alphas, 0.5))
        if not places.size:
            continue
        curves, errors = measurement.layer_curves()[:, places[0]], measurement.curve_errors()[1:, places[0]]
        for members, value, error in zip(measurement.sets, curves, errors, strict=True):
            if len(members) == 1 and members[0] in prediction.layers:
                found[members[0]] = (float(value), float(error))
    return found


def _agreement(pair: Pair, prediction: BarrierPrediction) -> Chart | None:
    data, everything = [], []
    for number, (name, measurement) in enumerate(pair.loss_measurements.items()):
        found = compare(prediction, measurement)
        if found is None:
            continue
        trace = _points(found.measured, found.predicted, name, HUES[number % len(HUES)], SYMBOLS[number % len(SYMBOLS)])
        trace |= {"text": [plain(title) for title in measurement.layers], "error_x": _bar(found.sampling, GREY)}
        if prediction.expansion == "anchored":
            trace["error_y"] = _bar(found.expansion, GREY)
        trace["hovertemplate"] = "%{text}<br>measured %{x:.3g}, predicted %{y:.3g}"
        data.append(trace)
        everything += [*found.measured, *found.predicted]
    if not data:
        return None
    values, log = np.array(everything), ""
    ends = [min(values.min(), 0.0), values.max()]
    if values.min() > 0 and values.max() > _DECADES * values.min():
        ends, log = [float(values.min()), float(values.max())], ", log scale"
    layout: Chart = _axes(f"measured barrier{log}", f"predicted barrier{log}") | {"hovermode": "closest"}
    if log:
        # Bars may reach below zero, which has no place on the axis.
        reach = [float(np.log10(ends[0] / 1.6)), float(np.log10(1.6 * ends[1]))]
        for axis in ("xaxis", "yaxis"):
            layout[axis] |= {"type": "log", "dtick": 1, "range": reach}
    label = f"Predicted against measured barriers of {len(values) // 2} sets of layers"
    return {"data": [_line(ends, ends, "predicted = measured", GREY, "dash"), *data], "layout": layout, "label": label}


def spectrum_chart(name: str, density: SpectralDensity) -> Chart:
    """The smoothed density of a spectrum, on a logarithmic scale."""
    grid = density.grid(601)
    heights = density.curve(grid)
    shown = np.where(heights > 1e-10 * heights.max(), heights, np.nan)
    layout = _axes("eigenvalue", "density, log scale")
    layout["yaxis"] |= {"type": "log", "exponentformat": "power"}
    low, high = density.support
    label = f"{name}: {density.dimension:,} eigenvalues, about from {low:.3g} to {high:.3g}"
    return {"data": [_line(grid, shown, plain(name), BLUE)], "layout": layout, "label": label}


def _axes(x: str, y: str) -> dict[str, Any]:
    return {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}


def _line(x: Iterable[float], y: Iterable[float], name: str, color: str, dash: str = "solid") -> Chart:
    style = {"color": color, "width": 2, "dash": dash}
    return {"type": "scatter", "mode": "lines", "x": compact(x), "y": compact(y), "name": name, "line": style}


def _points(x: Iterable[float], y: Iterable[float], name: str, color: str, symbol: str = "circle") -> Chart:
    found = {"type": "scatter", "mode": "markers", "x": compact(x), "y": compact(y), "name": plain(name)}
    return found | {"marker": _marker(color, symbol)}


def _band(x: np.ndarray, middle: np.ndarray, width: np.ndarray, color: str, name: str) -> Chart:
    around = np.concatenate([middle + width, (middle - width)[::-1]])
    found = {"type": "scatter", "mode": "lines", "x": compact([*x, *x[::-1]]), "y": compact(around), "name": name}
    return found | {"fill": "toself", "fillcolor": color, "line": {"width": 0}, "hoverinfo": "skip"}


def _marker(color: str, symbol: str) -> Chart:
    return {"color": color, "symbol": symbol, "size": 8}


def _bar(values: Iterable[float], color: str) -> Chart:
    return {"type": "data", "array": compact(np.nan_to_num(np.asarray(values))), "color": color, "thickness": 1.2}
