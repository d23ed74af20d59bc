import dataclasses
import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lmc_curvature.forking import ForkConfig, run_forks
from lmc_curvature.tracing import trace_forks

# An experiment is trained and traced first.
pytestmark = pytest.mark.check

SCRIPT = Path(__file__).parents[2] / "scripts" / "claims.py"


@pytest.fixture(scope="module")
def claims():
    spec = importlib.util.spec_from_file_location("claims", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("claims", None)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    path = tmp_path_factory.mktemp("claims")
    config = ForkConfig(
        training={"epochs": 3, "learning_rate": 0.1, "batch_size": 50},
        fork_epochs=[0, 1],
        snapshot_epochs=[1, 2],
        limit=200,
        model_options={"width": 2},
        threads=1,
        trace={"examples": 150, "batch_size": 150, "alphas": 5, "layer_alphas": 3},
    )
    run_forks(config, path, progress=False)
    return path, trace_forks(path, progress=False)


def test_width_of_a_triangle_and_of_a_plateau(claims):
    alphas = np.linspace(0, 1, 5)
    assert claims.half_width(alphas, np.array([0, 1, 2, 1, 0.0])) == pytest.approx(0.5, abs=1e-3)
    # Half the maximum is reached half-way between the first two, and the last two, positions.
    assert claims.half_width(alphas, np.array([0, 2, 2, 2, 0.0])) == pytest.approx(0.75, abs=1e-3)
    assert math.isnan(claims.half_width(alphas, np.array([0, -1, -2, -1, 0.0])))


def test_rows_are_those_of_the_tables(claims, experiment):
    traces = experiment[1]
    end = traces.barriers.query("fork == 1 and epoch == 3 and split == 'train' and metric == 'loss'").iloc[0]
    ridge = next(row for row in claims.ridges(traces) if row["fork"] == 1)
    assert ridge["at the end"] == end["barrier"]
    whole = claims.whole_networks(traces)
    predicted = traces.predictions.query("fork == 1 and epoch == 3 and expansion == 'second-order'").iloc[0]
    assert float(whole[1]["second-order"].split(" ± ")[0]) == pytest.approx(predicted["barrier"], rel=5e-3)
    test = traces.barriers.query("fork == 1 and epoch == 3 and split == 'test' and metric == 'loss'").iloc[0]
    assert float(whole[1]["measured, test"].split(" ± ")[0]) == pytest.approx(test["barrier"], rel=5e-3)
    assert whole[-1]["fork"] == "Spearman over forks"
    assert math.isnan(whole[-1]["second-order"])  # two forks have no ranks
    geometry = traces.geometry.query("fork == 0 and epoch == 3").iloc[0]
    sibling = claims.siblings(traces)[0]
    assert sibling["distance"] == geometry["distance"]
    assert math.cos(math.radians(sibling["angle from the fork, degrees"])) == pytest.approx(geometry["cosine_fork"])
    layers = claims.layers(traces)
    assert layers[0]["median of predicted_anchored / measured"] > 0
    assert {"ρ, first k, anchored", "ρ, last k, anchored"} <= claims.growing_sets(traces)[0].keys()
    assert layers[-1]["distance"] == pytest.approx((layers[0]["distance"] + layers[1]["distance"]) / 2)


def test_what_is_predicted_where_there_is_no_barrier(claims, experiment):
    traces = experiment[1]
    none = traces.barriers.query("fork == 0 and split == 'train' and metric == 'loss'").sort_values("epoch")
    barriers, predicted = (
        none.assign(barrier=[0.0, 0.5, 0.1])["barrier"],
        traces.predictions.query("fork == 0 and expansion == 'second-order'").sort_values("epoch"),
    )
    changed = dataclasses.replace(
        traces,
        barriers=traces.barriers.assign(barrier=barriers.reindex(traces.barriers.index).fillna(1.0)),
        predictions=traces.predictions.assign(
            barrier=pd.Series([2.0, 1.0, 0.3], index=predicted.index).reindex(traces.predictions.index).fillna(0.7)
        ),
    )
    row = claims.under_way(changed)[0]
    assert row["epochs without a barrier"] == "1 of 3"
    assert row["second-order there"] == "2 to 2"
    assert row["anchored there"] == "0.7 to 0.7"
    assert row["worst second-order / measured"] == "0.3 / 0.1 (epoch 3)"


def test_layers_without_a_barrier_are_counted_up_to_the_last_epoch_that_has_one(claims, experiment):
    traces = experiment[1]
    layers = traces.layers.assign(measured=1.0, measured_lowest=-0.25, predicted=1.0)
    layers.loc[(layers["epoch"] == 2) & (layers["position"] < 2), "measured"] = 0.0
    layers.loc[layers["position"] == 1, "predicted"] = 0.0
    row = claims.sunken_layers(dataclasses.replace(traces, layers=layers))[0]
    count = layers["position"].nunique()
    assert list(row.values()) == [0, 2, f"2 of {2 * count}", 1, -0.25]


def test_every_table_is_printed(claims, experiment, capsys):
    claims.main(experiment[0])
    printed = capsys.readouterr().out
    assert printed.startswith("Standard errors are estimated from the spread between 1 batches of 150 examples.")
    assert all(f"**{title}**\n\n| fork |" in printed for title in claims.CLAIMS)
