import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from lmc_curvature.forking import ForkConfig, run_forks, trace_forks

SCRIPT = Path(__file__).parents[1] / "scripts" / "claims.py"


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
    assert whole[1]["second-order"] == predicted["barrier"]
    assert whole[-1]["fork"] == "Spearman over forks"
    assert math.isnan(whole[-1]["second-order"])  # two forks have no ranks
    geometry = traces.geometry.query("fork == 0 and epoch == 3").iloc[0]
    sibling = claims.siblings(traces)[0]
    assert sibling["distance"] == geometry["distance"]
    assert math.cos(math.radians(sibling["angle from the fork, degrees"])) == pytest.approx(geometry["cosine_fork"])
    layers = claims.layers(traces)
    assert layers[-1]["distance"] == pytest.approx((layers[0]["distance"] + layers[1]["distance"]) / 2)


def test_every_table_is_printed(claims, experiment, capsys):
    claims.main(experiment[0])
    printed = capsys.readouterr().out
    assert all(f"**{title}**\n\n| fork |" in printed for title in claims.CLAIMS)
