import pandas as pd
import pytest

from lmc_curvature.errors import CheckpointError
from lmc_curvature.forking.directory import create_directory
from lmc_curvature.tracing import read_traces


def test_every_fork_and_epoch_is_in_every_table(traced):
    expected = {(0, 1), (0, 2), (1, 2)}
    for name in ("curves", "barriers", "predictions", "layers", "geometry"):
        table = getattr(traced[1], name)
        assert set(zip(table["fork"], table["epoch"], strict=True)) == expected, name
    assert set(traced[1].cumulative["epoch"]) == {2}
    assert set(traced[1].curves["split"]) == {"train", "test"}


def test_tables_are_read_back(traced):
    path, traces = traced
    read = read_traces(path)
    for name in vars(traces):
        pd.testing.assert_frame_equal(getattr(read, name), getattr(traces, name))


def test_tables_that_are_not_there_are_explained(config, tmp_path):
    create_directory(tmp_path, config)
    with pytest.raises(CheckpointError, match=r"curves\.csv is missing; trace_forks\(.*lmc-curvature trace"):
        read_traces(tmp_path)


def test_tables_of_other_columns_are_explained(copy):
    (copy / "traces" / "layers.csv").write_text("fork,epoch\n")
    with pytest.raises(CheckpointError, match=r"layers\.csv has columns .*lmc-curvature trace .* makes it"):
        read_traces(copy)
    (copy / "traces" / "layers.csv").write_text("")
    with pytest.raises(CheckpointError, match=r"layers\.csv is damaged"):
        read_traces(copy)
