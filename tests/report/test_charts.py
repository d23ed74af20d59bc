"""Claim: charts show the numbers of the results."""

import dataclasses

import numpy as np
import pytest
import torch

from lmc_curvature import spectral_density
from lmc_curvature.barrier.cube import Anchor
from lmc_curvature.report.charts import compact, pair_charts, plain, spectrum_chart
from lmc_curvature.report.contents import gather
from lmc_curvature.report.experiments import experiment_charts, experiment_record
from lmc_curvature.report.tables import pair_tables


@pytest.fixture(scope="module")
def shown(pair):
    (both,) = gather(list(pair)).pairs
    return both


def _trace(chart, name):
    (found,) = [trace for trace in chart["data"] if trace["name"] == name]
    return found


def test_curves_have_both_errors(shown, pair):
    prediction, measurement = pair
    chart = pair_charts(shown)["curves"]
    line = _trace(chart, "predicted")
    np.testing.assert_allclose(line["y"], prediction.curve(line["x"]), rtol=1e-5, atol=1e-12)
    band, count = _trace(chart, "± expansion"), len(line["x"])
    width = (np.array(band["y"][:count]) - np.array(band["y"][count:])[::-1]) / 2
    np.testing.assert_allclose(width, prediction.set_expansion_errors([None], line["x"])[0], rtol=1e-3, atol=1e-5)
    sampling = _trace(chart, "± sampling")["y"]
    middle = line["x"].index(0.5)
    assert sampling[middle] - line["y"][middle] == pytest.approx(prediction.standard_error(alpha=0.5), rel=1e-3)
    points = _trace(chart, "measured")
    np.testing.assert_allclose(points["y"], measurement.curve(), rtol=1e-5, atol=1e-12)
    peak = int(np.argmax(points["y"]))
    assert points["error_y"]["array"][peak] == pytest.approx(measurement.standard_error(), rel=1e-5)
    errors = _trace(pair_charts(shown)["errors"], "measured")
    np.testing.assert_allclose(errors["y"], 100 * measurement.values("error"), rtol=1e-5)


def test_a_curve_of_two_ends_is_called_a_prediction_whose_band_is_sampling_alone(pair, of_two_ends):
    names = [trace["name"] for trace in pair_charts(gather(of_two_ends[3]).pairs[0])["curves"]["data"]]
    assert names == ["± sampling alone", "predicted to second order", "anchors"]


def test_a_single_batch_has_no_band_of_sampling(pair):
    prediction = pair[0]
    anchors = []
    for alpha, projection in prediction.anchors:
        fields = {name: value[:1] for name, value in vars(projection).items() if isinstance(value, np.ndarray)}
        fields = {name: value for name, value in fields.items() if name.startswith("batch_")}
        anchors.append(Anchor(alpha, dataclasses.replace(projection, **fields)))
    one = dataclasses.replace(prediction, anchors=tuple(anchors))
    names = [trace["name"] for trace in pair_charts(gather(one).pairs[0])["curves"]["data"]]
    assert "± expansion" in names
    assert not any("sampling" in name for name in names)


def test_layers_alone_and_left_out(shown, pair):
    prediction, measurement = pair
    chart = pair_charts(shown)["layers"]
    alone = _trace(chart, "predicted, moved alone")
    np.testing.assert_allclose(alone["x"], prediction.set_barriers(np.eye(3, dtype=bool)), rtol=1e-5)
    fall = _trace(chart, "fall of the whole barrier if it is left out")
    expected = prediction.set_barriers([None])[0] - prediction.set_barriers(~np.eye(3, dtype=bool))
    np.testing.assert_allclose(fall["x"], expected, rtol=1e-4, atol=1e-8)
    measured = _trace(chart, "measured, moved alone")
    (middle,) = np.flatnonzero(measurement.alphas == 0.5)
    np.testing.assert_allclose(measured["x"], measurement.layer_curves()[:, middle], rtol=1e-5)


def test_a_table_has_what_the_chart_of_layers_shows(shown, pair):
    layers, interactions, sets = pair_tables(shown)
    assert [row[0] for row in layers.rows] == list(pair[0].layers)
    assert layers.rows[0][3].startswith(f"{pair[0].set_barriers([[pair[0].layers[0]]])[0]:.3g} ±")
    assert len(interactions.rows) == 3
    strongest = np.abs(pair[0].interactions[np.triu_indices(3, 1)]).max()
    assert abs(float(interactions.rows[0][1])) == pytest.approx(2 * strongest, rel=1e-2)
    assert [row[0] for row in sets.rows] == list(pair[1].layers)
    assert all(len(row) == len(table.headings) for table in (layers, interactions, sets) for row in table.rows)


def test_two_anchors_have_no_expansion_error(of_two_ends, measurements):
    (ends,) = gather([of_two_ends[0], measurements[0]]).pairs
    charts = pair_charts(ends)
    assert "± expansion" not in [trace["name"] for trace in charts["curves"]["data"]]
    assert "error_y" not in charts["agreement"]["data"][1]


def test_a_measurement_alone_has_curves_alone(pair):
    (alone,) = gather(pair[1]).pairs
    assert set(pair_charts(alone)) == {"curves", "errors"}
    assert len(pair_tables(alone)) == 1


def test_ridges_and_maps_are_the_tables(anchored):
    record = experiment_record(anchored)
    titles = [each["title"] for each in record["ridges"]]
    assert titles[:2] == ["barrier of the loss, train data", "loss, train data"]
    assert len(titles) == 8
    fork = record["ridges"][0]["forks"][1]
    assert (fork["fork"], fork["epochs"]) == (2, [4.0, 8.0])
    curves = anchored.curves.query("fork == 2 and split == 'train' and metric == 'loss'")
    for epoch, heights in zip(fork["epochs"], fork["heights"], strict=True):
        rows = curves[
            (curves.fork == 2) & (curves.epoch == epoch) & (curves.split == "train") & (curves.metric == "loss")
        ]
        np.testing.assert_allclose(heights, rows.sort_values("alpha")["barrier"], rtol=1e-5)
    assert record["maps"][0]["title"] == "predicted barrier (anchored)"
    shown = next(each for each in record["maps"] if each["title"] == "measured barrier")["forks"][0]
    assert shown["layers"] == ["conv", "block.0.conv1", "block.0.conv2", "linear"]
    rows = anchored.layers[(anchored.layers.fork == 0) & (anchored.layers.layer == "linear")].sort_values("epoch")
    np.testing.assert_allclose(shown["values"][3], rows["measured"], rtol=1e-5)


def test_growth_and_geometry_have_a_line_a_fork(traces, anchored):
    for tables, expansion in ((traces, "second-order"), (anchored, "anchored")):
        charts = experiment_charts(tables)
        names = [trace["name"] for trace in charts["growth"]["data"]]
        assert names[:3] == [f"fork {fork}, measured" for fork in (0, 2, 5)]
        assert names[3:] == [f"fork {fork}, predicted ({expansion})" for fork in (0, 2, 5)]
        assert len(charts["geometry"]["data"]) == 12
    assert "error_y" in charts["growth"]["data"][3]


def test_a_spectrum_is_its_density():
    density = spectral_density(torch.diag(torch.tensor([1.0, 2.0, 5.0])), progress=False)
    chart = spectrum_chart("H", density)
    (line,) = chart["data"]
    known = [(x, y) for x, y in zip(line["x"], line["y"], strict=True) if y is not None]
    points, heights = np.array(known).T
    np.testing.assert_allclose(heights, density.curve(points), rtol=1e-2)
    assert "3 eigenvalues" in chart["label"]


def test_numbers_are_short_and_text_is_plain():
    assert compact([[1 / 3, np.nan], [np.inf, 2.0]]) == [[0.333333, None], [None, 2.0]]
    assert plain("<b>&") == "&lt;b&gt;&amp;"
