"""Claim: whatever the library returns says in ten lines what it is, and in a notebook in a small table and picture."""

import base64
import dataclasses
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lmc_curvature
from lmc_curvature import (
    BatchLoss,
    GGNOperator,
    HessianOperator,
    Objective,
    Segment,
    best_point,
    lanczos,
    measure_barrier,
    measure_barriers,
    predict_barrier,
    predict_barriers,
    project_hessian,
    select_layers,
    spectral_density,
    top_eigenpairs,
    trace,
)
from lmc_curvature.averages import with_error
from lmc_curvature.geometry import SiblingGeometry
from lmc_curvature.merging.point import PointVerification
from lmc_curvature.merging.verify import Verification
from lmc_curvature.plotting.summary import Summary, some

# Names of layers are of the user's making.
HOSTILE = "<script>alert('x')</script>&amp;"


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(3, 3) for _ in range(6)), nn.Linear(3, 2))


def partition(entry):
    return f"{HOSTILE}.{entry.split('.')[0]}.a-name-that-is-long-enough-to-fill-the-line-by-itself"


@pytest.fixture(scope="module")
def results():
    """One of everything that is public, by the name of its class: of 7 layers, and of several batches."""
    first, second, third = network(0), network(1), network(2)
    torch.manual_seed(2)
    loader = [(torch.randn(8, 3), torch.randint(2, (8,))) for _ in range(3)]
    options = {"layers": partition, "progress": False}
    prediction = predict_barrier(first, second, loader, **options)
    objective, segment = Objective(first, loader), Segment(first, second, layers=partition)
    operator = HessianOperator(objective, partition=partition)
    directions = list(segment.directions().values())
    selection, point = select_layers(prediction, 10.0, excluded=prediction.layers[0]), best_point(prediction)
    made = [
        prediction,
        measure_barrier(first, second, loader, sets="each", **options),
        predict_barriers([first, second, third], loader, **options),
        measure_barriers([first, second, third], loader, sets="each", subsets=[["model_a", "model_c"]], **options),
        project_hessian(objective, segment.start, directions, progress=False),
        objective,
        segment,
        segment.partition,
        operator,
        GGNOperator(objective, partition=partition),
        spectral_density(operator, probes=2, steps=5, progress=False),
        top_eigenpairs(operator, 3, tolerance=0.5, progress=False),
        lanczos(operator, 4, progress=False),
        trace(operator, probes=12),
        selection,
        selection.verify(first, second, loader, measurements=2, held_out=loader[:2], progress=False),
        point,
        point.verify(first, second, loader, measurements=1, progress=False),
        BatchLoss(F.cross_entropy),
        SiblingGeometry(1.25, 0.5, -0.25, 1.0),
    ]
    return {type(each).__name__: each for each in made}


def public_classes():
    found = {name: getattr(lmc_curvature, name) for name in lmc_curvature.__all__}
    return [name for name, each in found.items() if isinstance(each, type) and not issubclass(each, Exception)]


EVERYTHING = sorted({*public_classes(), Verification.__name__, PointVerification.__name__, SiblingGeometry.__name__})
# What has no numbers to draw, or a single one.
WITHOUT_PICTURE = {
    *("Objective", "Segment", "LayerPartition", "HessianOperator", "GGNOperator", "Estimate", "SiblingGeometry"),
    "BatchLoss",
}


class Page(HTMLParser):
    """Reads a page, and fails where a tag is not closed in its place."""

    def __init__(self, text):
        super().__init__()
        self.open, self.cells, self.images, self.tags = [], [], [], set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag != "img":
            self.open.append(tag)
            self.cells.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        assert tag == "img"
        self.images.append(dict(attrs))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.cells[-1] += data


@pytest.mark.check
@pytest.mark.parametrize("name", EVERYTHING)
def test_everything_says_what_it_is_in_ten_lines_of_a_hundred_columns(name, results):
    lines = repr(results[name]).splitlines()
    assert 1 <= len(lines) <= 10
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith(name)
    # No array, and no address in memory but that of a function.
    assert not re.search(r"array\(|tensor\(|object at 0x", repr(results[name]))


@pytest.mark.check(after=2)
@pytest.mark.parametrize("name", sorted({*EVERYTHING} - {"BatchLoss"}))
def test_everything_is_a_small_table_in_a_notebook(name, results):
    text = results[name]._repr_html_()
    assert len(text) < 100_000
    page = Page(text)
    assert page.tags <= {"div", "table", "tr", "th", "td", "img"}
    # The same facts as in the text, whatever names look like.
    title, *facts = repr(results[name]).splitlines()
    for line in (title, *facts):
        assert any(part and part in line for part in page.cells), line
    assert len(page.images) == (name not in WITHOUT_PICTURE)
    for image in page.images:
        kind, data = image["src"].split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
        assert image["alt"]


@pytest.mark.check(after=1)
@pytest.mark.parametrize("name", ["BarrierPrediction", "BarrierMeasurement", "Selection", "Segment", "LayerPartition"])
def test_names_of_layers_are_text(name, results):
    assert "<script>" in repr(results[name])
    text = results[name]._repr_html_()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert any("<script>" in cell for cell in Page(text).cells)


def test_barriers_have_both_their_errors(results):
    prediction, measurement = results["BarrierPrediction"], results["BarrierMeasurement"]
    text = repr(prediction)
    # Where nothing rises, the curve in the middle, with its sign.
    barrier = prediction.barrier() or float(prediction.curve([0.5])[0])
    assert with_error(barrier, prediction.standard_error()) in text
    assert (f"expansion error about {prediction.expansion_error():.2g}" in text) == (barrier > 0)
    for metric in ("loss", "error"):
        assert with_error(measurement.barrier(metric), measurement.standard_error(metric)) in repr(measurement)
    for each in (results["Selection"], results["BestPoint"]):
        assert with_error(each.rise, each.standard_error) in repr(each)
        assert f"expansion error about {each.expansion_error:.2g}" in repr(each)
    for many in (results["BarriersPrediction"], results["BarriersMeasurement"]):
        assert with_error(many.mean_barrier(), many.mean_standard_error()) in repr(many)
    verification = results["Verification"]
    for trial in (verification.chosen, verification.held_out):
        assert with_error(trial.rise, trial.standard_error) in repr(verification)


def test_objectives_and_operators_say_what_they_hold(results):
    for name in ("Objective", "HessianOperator", "GGNOperator"):
        text = repr(results[name])
        # 6 layers of 12 numbers, and one of 8.
        assert "80 numbers" in text
        assert "3 batches" in text
        assert "cpu, torch.float32" in text
        assert "cross_entropy of a Sequential" in text
    assert "80 × 80" in repr(results["HessianOperator"])
    operator = results["HessianOperator"]
    names = operator.partition.names
    assert "12 × 8" in repr(operator.block(names[0], names[-1]))
    assert "7 layers with 80 numbers" in repr(results["Segment"])
    assert f"{np.linalg.norm(results['Segment'].distances()):.4g}" in repr(results["Segment"])


def test_the_size_of_the_data_is_told_where_it_is_known():
    data = torch.utils.data.TensorDataset(torch.randn(20, 3), torch.randint(2, (20,)))
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    assert "3 batches of a data set of 20 examples" in repr(Objective(network(0), loader))
    assert "2 batches" in repr(Objective(network(0), loader, max_batches=2))
    visited = []

    class Stream:
        def __iter__(self):
            visited.append(self)
            return iter(loader)

    assert "does not say how many" in repr(Objective(network(0), Stream()))
    assert not visited
    half = network(0).to(torch.bfloat16)
    assert "torch.float32" in repr(Objective(half, loader))


def test_results_within_others_are_short_too(results):
    assert len(repr(results["Verification"].trials)) < 100 * len(results["Verification"].trials)
    assert repr([results["Estimate"]]).startswith("[Estimate: ")


def test_a_projection_along_nothing_and_a_single_batch_have_a_text(results):
    one = dataclasses.replace(
        results["Projection"],
        batch_sizes=np.array([4]),
        batch_losses=np.array([1.5]),
        batch_slopes=np.zeros((1, 0)),
        batch_curvatures=np.zeros((1, 0, 0)),
        batch_weights=None,
    )
    assert repr(one).startswith("Projection along 0 directions, of 4 examples in 1 batch")
    assert "img" not in one._repr_html_()


def test_long_texts_are_cut_and_long_lists_counted():
    summary = Summary("t" * 200, {f"fact {number}": "v\nw" * 90 for number in range(30)}, "see more")
    lines = summary.text().splitlines()
    assert len(lines) == 10
    assert all(len(line) == 100 and line.endswith("…") for line in lines[:-1])
    assert lines[-1].split() == ["more", "see", "more"]
    assert some(["aa", "bb", "cc"], columns=8) == "aa, bb and 1 more"
    assert some(["a" * 99, "b"]) == "a" * 99 + " and 1 more"
    assert some([]) == "none"
