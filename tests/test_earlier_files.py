"""Claim: files of every kind that release 0.1.0 wrote, which lie in `tests/files`, are read as they were meant."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from lmc_curvature import BarrierMeasurement, BarrierPrediction
from lmc_curvature.checkpoints import load_checkpoint
from lmc_curvature.errors import OptionError
from lmc_curvature.forking import TraceConfig, open_directory
from lmc_curvature.forking.configuration import stored_trace
from lmc_curvature.forking.training import EpochMetrics, TrainingState
from lmc_curvature.geometry import SiblingGeometry
from lmc_curvature.storage import read_json
from lmc_curvature.tracing import read_traces

FILES = Path(__file__).parent / "files"


def test_predictions():
    prediction = BarrierPrediction.load(FILES / "prediction.safetensors")
    assert (prediction.layers, prediction.examples, prediction.batch_norm) == (("0", "2"), 18, "interpolate")
    assert prediction.barrier() == pytest.approx(0.008607374872971899)
    assert prediction.barrier(None, "with-slopes") == pytest.approx(0.01056920084003924)
    assert prediction.standard_error() == pytest.approx(0.0052860236701111635)


def test_measurements():
    measurement = BarrierMeasurement.load(FILES / "measurement.safetensors")
    assert (measurement.sets, measurement.examples) == ((("0",), ("2",)), 18)
    assert measurement.barrier() == pytest.approx(0.005067865053812663)
    assert measurement.barrier("error") == pytest.approx(0.09722222222222222)
    np.testing.assert_allclose(measurement.layer_barriers(), [0.015739917755126953, 0.013615449269612629])
    assert (measurement.points, measurement.rises().shape) == ((), (0,))
    with pytest.raises(OptionError, match="earlier version, without its sides: measure again"):
        measurement.sides()


def test_geometries():
    geometry = SiblingGeometry.load(FILES / "geometry.safetensors")
    assert geometry.distance == pytest.approx(2.0948629246035173)
    assert geometry.cosine_fork == pytest.approx(0.2216699239003403)


def test_training_states_and_the_networks_in_them():
    state = TrainingState.load(FILES / "training-state.safetensors")
    assert state.history == (EpochMetrics(1, 0.1, 0.7, 0.5), EpochMetrics(2, 0.05, 0.6, 0.75))
    assert torch.equal(state.optimizer["0.weight"], torch.ones(3, 4))
    network = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    load_checkpoint(network, FILES / "training-state.safetensors")
    assert network[2].bias.tolist() == pytest.approx([-0.3486972451210022, -0.0967729389667511])


def test_directories_of_forks_and_their_traces():
    config = open_directory(FILES / "forks").config
    assert (config.fork_epochs, config.training.epochs, config.model_options) == ((0,), 2, {"width": 2})
    traced = stored_trace(read_json(FILES / "forks" / "traces" / "config.json", "1"))
    assert TraceConfig.model_validate(traced) == config.trace
    # Of the two ends alone: there were no others.
    assert (config.trace.anchors, TraceConfig().anchors) == (2, 3)


def test_tables_of_stored_results_are_read(tmp_path):
    stored = FILES.parents[1] / "docs" / "results" / "cifar10-small"
    shutil.copytree(FILES / "forks", tmp_path / "forks")
    for path in stored.glob("*.csv"):
        shutil.copy(path, tmp_path / "forks" / "traces")
    for name, table in vars(read_traces(tmp_path / "forks")).items():
        written = pd.read_csv(stored / f"{name}.csv")
        pd.testing.assert_frame_equal(table[written.columns], written)
        later = table.columns.difference(written.columns)
        assert set(later) <= {"predicted_anchored", "expansion_error", "measured_se"}
        assert table[later].isna().all(axis=None)
