import pandas as pd
import pytest

from lmc_curvature import BarrierMeasurement
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


def test_growing_sets_have_the_standard_errors_of_their_measurements(traced):
    path, traces = traced
    measurements = [BarrierMeasurement.load(file) for file in path.rglob("sets.safetensors")]
    known = {
        (round(barrier, 12), round(error, 12))
        for each in measurements
        for barrier, error in zip(each.layer_barriers(), each.layer_standard_errors(), strict=True)
    }
    found = traces.cumulative[["measured", "measured_se"]].to_numpy()
    assert len(found)
    assert {(round(barrier, 12), round(error, 12)) for barrier, error in found} <= known


def test_tables_that_lack_the_latest_columns_alone_are_read(traced, copy):
    (copy / "traces" / "checksums.json").unlink()
    path = copy / "traces" / "cumulative.csv"
    pd.read_csv(path).drop(columns="measured_se").to_csv(path, index=False)
    read = read_traces(copy).cumulative
    assert read.pop("measured_se").isna().all()
    pd.testing.assert_frame_equal(read, traced[1].cumulative.drop(columns="measured_se"))


def test_tables_that_are_not_there_are_explained(config, tmp_path):
    create_directory(tmp_path, config)
    with pytest.raises(CheckpointError, match=r"curves\.csv is missing; trace_forks\(.*lmc-curvature trace"):
        read_traces(tmp_path)


def test_tables_of_other_columns_are_explained(copy):
    # A release that has other columns has other checksums, too, or none.
    (copy / "traces" / "checksums.json").unlink()
    (copy / "traces" / "layers.csv").write_text("fork,epoch\n")
    with pytest.raises(CheckpointError, match=r"layers\.csv has columns .*lmc-curvature trace .* makes it"):
        read_traces(copy)
    (copy / "traces" / "layers.csv").write_text("")
    with pytest.raises(CheckpointError, match=r"layers\.csv is damaged"):
        read_traces(copy)


@pytest.mark.parametrize("name", ["curves", "barriers", "predictions", "layers", "cumulative", "geometry"])
def test_tables_that_are_cut_off_or_changed_are_damaged(copy, name):
    path = copy / "traces" / f"{name}.csv"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    changed = whole.replace(b"0", b"1", 1)
    for contents in (b"".join(lines[:-1]), b"".join(lines[:-2]), whole[:-1], whole[:-3], whole + lines[-1], changed):
        path.write_bytes(contents)
        with pytest.raises(
            CheckpointError, match=rf"{name}\.csv is damaged \(it is not as it was written\); .*lmc-curvature trace"
        ):
            read_traces(copy)
    path.write_bytes(whole)
    read_traces(copy)


def test_tables_of_earlier_versions_have_no_checksums(traced, copy):
    (copy / "traces" / "checksums.json").unlink()
    pd.testing.assert_frame_equal(read_traces(copy).layers, traced[1].layers)
    path = copy / "traces" / "layers.csv"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"layers\.csv is damaged"):
        read_traces(copy)


def test_checksums_that_are_damaged_are_explained(copy):
    (copy / "traces" / "checksums.json").write_text('{"sha256"')
    with pytest.raises(CheckpointError, match=r"checksums\.json is damaged .*lmc-curvature trace .* makes it"):
        read_traces(copy)


@pytest.mark.parametrize(
    ("name", "column", "value"),
    [
        # The split is a part of the names of figures.
        ("curves", "split", "../../outside"),
        ("barriers", "metric", "<b>loss</b>"),
        ("predictions", "expansion", ""),
        ("cumulative", "side", "both"),
        ("layers", "fork", "0.5"),
        ("layers", "distance", "far"),
        ("geometry", "distance", "inf"),
        ("geometry", "epoch", ""),
        ("curves", "epoch", "9" * 400),
    ],
)
def test_values_that_do_not_belong_there_are_damage_whoever_wrote_them(copy, name, column, value):
    path = copy / "traces" / f"{name}.csv"
    table = pd.read_csv(path, dtype=str)
    table.loc[1, column] = value
    table.to_csv(path, index=False)
    (copy / "traces" / "checksums.json").unlink()
    with pytest.raises(CheckpointError, match=rf"{name}\.csv is damaged \(.*\); .*lmc-curvature trace"):
        read_traces(copy)


def test_layers_may_have_any_name(copy):
    path = copy / "traces" / "layers.csv"
    table = pd.read_csv(path, dtype=str)
    names = ["nan", "NA", "0", "../../x", "1e3", '"', "<script>"]
    table["layer"] = [names[number % len(names)] for number in range(len(table))]
    table.to_csv(path, index=False)
    (copy / "traces" / "checksums.json").unlink()
    assert read_traces(copy).layers["layer"].tolist() == table["layer"].tolist()


@pytest.mark.parametrize("text", ['{"sha256": 3}', '{"sha256": ["a"]}', "[" * 100_000])
def test_checksums_that_are_none_are_damage(copy, text):
    (copy / "traces" / "checksums.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"checksums\.json is damaged"):
        read_traces(copy)
