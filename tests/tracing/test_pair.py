import numpy as np
import pytest

from lmc_curvature import measure_barrier, predict_barrier
from lmc_curvature.forking import load_child, load_parent
from lmc_curvature.geometry import sibling_cosine, solution_plane_cosine
from lmc_curvature.sources import load_data
from lmc_curvature.tracing import pair, trace_forks
from lmc_curvature.tracing.pair import cumulative_sets


def siblings(path, fork, epoch):
    return [load_child(path, fork, child, epoch) for child in (0, 1)]


def pick(table, **values):
    for column, value in values.items():
        table = table[table[column] == value]
    return table


@pytest.mark.check
@pytest.mark.parametrize("split", ["train", "test"])
def test_barriers_are_those_of_measure_barrier(traced, split):
    path, traces = traced
    data = load_data("digits", split, 100 if split == "train" else None).subset(80)
    measured = measure_barrier(*siblings(path, 0, 1), data.batches(50), alphas=5, progress=False)
    for metric in ("loss", "error"):
        row = pick(traces.barriers, fork=0, epoch=1, split=split, metric=metric).iloc[0]
        assert row["barrier"] == pytest.approx(measured.barrier(metric), abs=1e-6)
        assert row["standard_error"] == pytest.approx(measured.standard_error(metric), abs=1e-6)
        assert (row["end_a"], row["end_b"]) == pytest.approx(measured.ends(metric), abs=1e-6)
        curve = pick(traces.curves, fork=0, epoch=1, split=split, metric=metric)
        assert curve["value"].to_numpy() == pytest.approx(measured.values(metric), abs=1e-6)
        assert curve["barrier"].to_numpy() == pytest.approx(measured.curve(metric), abs=1e-6)


@pytest.mark.check
def test_predictions_and_layers_are_those_of_the_library(traced):
    path, traces = traced
    loader = load_data("digits", limit=100).subset(80).batches(50)
    prediction = predict_barrier(*siblings(path, 0, 2), loader, progress=False)
    for expansion in ("anchored", "second-order", "with-slopes", "shared-hessian", "hermite"):
        row = pick(traces.predictions, fork=0, epoch=2, expansion=expansion).iloc[0]
        assert row["barrier"] == pytest.approx(prediction.barrier(None, expansion), rel=1e-4)
        assert row["standard_error"] == pytest.approx(prediction.standard_error(None, expansion), rel=1e-3)
        expected = prediction.expansion_error() if expansion == "anchored" else np.nan
        assert row["expansion_error"] == pytest.approx(expected, rel=1e-3, nan_ok=True)
    layers = pick(traces.layers, fork=0, epoch=2)
    assert tuple(layers["layer"]) == prediction.layers
    for column, expansion in (("predicted", "second-order"), ("predicted_anchored", "anchored")):
        assert layers[column].to_numpy() == pytest.approx(prediction.layer_barriers(expansion), rel=1e-4, abs=1e-7)
    errors = [prediction.expansion_error([layer]) for layer in prediction.layers]
    assert layers["expansion_error"].to_numpy() == pytest.approx(errors, rel=1e-3, abs=1e-7)
    assert layers["hessian_energy"].to_numpy() == pytest.approx(prediction.hessian_energy, rel=1e-3, abs=1e-7)
    assert layers["distance"].to_numpy() == pytest.approx(prediction.distances, rel=1e-6)
    measured = measure_barrier(*siblings(path, 0, 2), loader, sets="each", alphas=3, progress=False)
    assert layers["measured"].to_numpy() == pytest.approx(measured.layer_barriers(), abs=1e-6)
    assert layers["measured_lowest"].to_numpy() == pytest.approx(measured.layer_curves().min(axis=1), abs=1e-6)


@pytest.mark.check
def test_cumulative_barriers_are_of_the_first_and_last_layers(traced):
    path, traces = traced
    loader = load_data("digits", limit=100).subset(80).batches(50)
    prediction = predict_barrier(*siblings(path, 0, 2), loader, progress=False)
    names = prediction.layers
    sets = [names[:2], names[-2:]]
    measured = measure_barrier(*siblings(path, 0, 2), loader, sets=sets, alphas=3, progress=False).layer_barriers()
    for side, members, expected in zip(("first", "last"), sets, measured, strict=True):
        row = pick(traces.cumulative, fork=0, side=side, count=2).iloc[0]
        assert row["measured"] == pytest.approx(expected, abs=1e-6)
        for column, expansion in (("predicted", "second-order"), ("predicted_anchored", "anchored")):
            assert row[column] == pytest.approx(prediction.barrier(members, expansion), rel=1e-4, abs=1e-7)
        assert row["expansion_error"] == pytest.approx(prediction.expansion_error(members), rel=1e-3, abs=1e-7)
        # Equation 21: the sum of the interactions of the set.
        inside = np.isin(names, members)
        total = max(prediction.interactions[np.ix_(inside, inside)].sum(), 0.0)
        assert row["predicted_shared"] == pytest.approx(total, rel=1e-4, abs=1e-7)
    whole = pick(traces.cumulative, fork=0, count=len(names))
    assert whole["measured"].nunique() == 1
    assert list(cumulative_sets("abc"))[2:4] == [("first", 2, ("a", "b")), ("last", 2, ("b", "c"))]


@pytest.mark.check
def test_what_all_epochs_of_a_fork_are_compared_with_is_read_once(traced, untraced, monkeypatch):
    read = []
    monkeypatch.setattr(pair, "load_parent", lambda path, epoch: (read.append(epoch), load_parent(path, epoch))[1])
    found = trace_forks(untraced, progress=False).geometry
    assert read == [0, 1]
    assert found.equals(traced[1].geometry)


@pytest.mark.check
def test_geometry_is_that_of_parameters(traced):
    path, traces = traced
    (a, b), (final_a, final_b) = (
        [dict(model.named_parameters()) for model in siblings(path, 0, epoch)] for epoch in (1, 2)
    )
    row = pick(traces.geometry, fork=0, epoch=1).iloc[0]
    assert row["cosine_fork"] == pytest.approx(sibling_cosine(a, b, dict(load_parent(path, 0).named_parameters())))
    assert row["cosine_origin"] == pytest.approx(sibling_cosine(a, b))
    assert row["cosine_final"] == pytest.approx(solution_plane_cosine(a, b, final_a, final_b))
    assert pick(traces.geometry, epoch=2)["cosine_final"].to_numpy() == pytest.approx(1.0)
