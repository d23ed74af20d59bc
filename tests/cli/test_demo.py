"""Claim: the demo trains real siblings, its predictions rank their layers, and it continues where it stopped."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lmc_curvature import BarrierMeasurement, BarrierPrediction
from lmc_curvature.cli.demo import BUDGET, CONFIG, layer_rank_correlations, layer_sets, median_errors, run_demo
from lmc_curvature.cli.tables import demo_tables
from lmc_curvature.forking import load_child, load_fork_data, run_forks
from lmc_curvature.report import read_contents, write_page
from tests.support.browser import browser, needs_browser


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def result(out):
    return run_demo(out, progress=False)


@pytest.mark.check
def test_barriers_fall_with_the_fork_and_predictions_with_them(result):
    assert list(result.predictions) == list(CONFIG.fork_epochs)
    assert len(CONFIG.fork_epochs) >= 4
    measured = [measurement.barrier() for measurement in result.measurements.values()]
    predicted = [prediction.barrier() for prediction in result.predictions.values()]
    assert measured[0] > 0.05 > measured[-1]
    assert predicted[0] > predicted[-1]


@pytest.mark.check
def test_predictions_rank_the_layers(result):
    ranks = [
        layer_rank_correlations(prediction, result.measurements[fork])
        for fork, prediction in result.predictions.items()
    ]
    for expansion in ("predicted_anchored", "predicted", "predicted_with_slopes"):
        assert np.mean([rank[expansion] for rank in ranks]) >= 0.8
        assert np.mean([rank[expansion] for rank in ranks]) > np.mean([rank["distance"] for rank in ranks])


@pytest.mark.check
def test_figures_and_tables_are_made(result):
    assert {path.suffix for path in result.figures} == {".png", ".pdf"}
    assert all(path.stat().st_size > 10_000 for path in result.figures)
    whole, layers, errors, ranks, selections = demo_tables(result)
    assert selections.row_count == len(CONFIG.fork_epochs)
    assert whole.row_count == len(CONFIG.fork_epochs)
    names = result.predictions[0].layers
    assert layers.row_count == len(names) + len(layer_sets(names))
    assert ranks.row_count == 4
    assert [str(cell) for cell in errors.columns[0].cells] == ["anchored", "second-order", "with-slopes"]


@pytest.mark.check
def test_anchors_predict_better_than_the_ends_alone(result):
    anchored, second_order = (median_errors(result, expansion) for expansion in ("anchored", "second-order"))
    assert anchored[0] < 0.8 * second_order[0]
    assert anchored[1] < 0.5 * second_order[1]
    for fork, prediction in result.predictions.items():
        measured = result.measurements[fork].curve()
        middle = len(measured) // 2
        assert prediction.curve([0.5])[0] == pytest.approx(measured[middle], rel=1e-2, abs=1e-5)


@pytest.mark.check
def test_what_is_selected_stays_within_the_budget(result, out):
    for fork, verified in result.selections.items():
        assert verified.chosen.rise <= BUDGET
        barrier = result.measurements[fork].barrier()
        # Sets are tried by their predictions, which may leave out the whole network where it is within the budget.
        assert verified.selection.share < 1 or barrier < BUDGET
        assert verified.selection.share == 1 or barrier > BUDGET / 2
        pair = [load_child(out / "forks", fork, child) for child in (0, 1)]
        merged = verified.selection.merge(*pair)
        losses = [_mean_loss(network, out) for network in (merged, *pair)]
        assert losses[0] - sum(losses[1:]) / 2 == pytest.approx(verified.chosen.rise, abs=1e-5)


@torch.no_grad()
def _mean_loss(network, out):
    batches = load_fork_data(out / "forks", progress=False).batches(500)
    sums = [(F.cross_entropy(network.eval()(x), y, reduction="sum").item(), len(y)) for x, y in batches]
    return sum(total for total, _ in sums) / sum(count for _, count in sums)


@pytest.mark.check
def test_results_are_kept(result, out):
    for fork in CONFIG.fork_epochs:
        folder = out / "barriers" / f"fork-{fork:04d}"
        measured = BarrierMeasurement.load(folder / "measured.safetensors")
        np.testing.assert_array_equal(measured.batch_values, result.measurements[fork].batch_values)
        predicted = BarrierPrediction.load(folder / "predicted.safetensors")
        np.testing.assert_array_equal(predicted.layer_barriers(), result.predictions[fork].layer_barriers())


@needs_browser
@pytest.mark.check
def test_its_report_opens(result, out, tmp_path):
    write_page(read_contents([out]), tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 7e6
    with browser() as open_page:
        page = open_page(tmp_path / "report.html")
        headlines = page.run("return [...document.querySelectorAll('.headline')].map((each) => each.textContent)")
        page.run("document.querySelector('[data-pick=all]').click()")
        predicted = page.run("return Number(document.getElementById('predicted').dataset.value)")
        assert (page.complaints(), page.requests()) == ([], [])
    first, last = CONFIG.fork_epochs[0], CONFIG.fork_epochs[-1]
    assert predicted == pytest.approx(result.predictions[first].curve([0.5])[0], rel=1e-9)
    assert headlines[0].startswith(f"fork at epoch {first} No: ")
    assert headlines[-1].startswith(f"fork at epoch {last} Yes")


@pytest.mark.check
def test_networks_are_not_trained_again(result, out):
    written = {path: path.stat().st_mtime_ns for path in (out / "forks").rglob("epoch-*.safetensors")}
    assert len(written) > 2 * len(CONFIG.fork_epochs)
    run_forks(CONFIG, out / "forks", progress=False)
    assert written == {path: path.stat().st_mtime_ns for path in (out / "forks").rglob("epoch-*.safetensors")}


def test_layer_sets_are_sets_of_layers():
    names = ("a", "b", "c", "d", "e")
    sets = layer_sets(names)
    assert sets["first 2 layers"] == ("a", "b")
    assert sets["last 3 layers"] == ("c", "d", "e")
    assert sets["first and last layer"] == ("a", "e")
