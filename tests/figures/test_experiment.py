"""A traced experiment becomes files, one a figure and format; what was not traced is left out by name."""

import shutil
import warnings

import pytest

from lmc_curvature.errors import CheckpointError
from lmc_curvature.figures.experiment import draw_all, draw_traces
from lmc_curvature.forking import ForkConfig, run_forks
from lmc_curvature.tracing import read_traces, trace_forks

SETTINGS = {
    "training": {"epochs": 3, "learning_rate": 0.1, "batch_size": 50},
    "fork_epochs": [0, 1],
    "limit": 200,
    "model_options": {"width": 2},
    "threads": 1,
    "trace": {"examples": 100, "batch_size": 100, "alphas": 3, "layer_alphas": 3},
}
RIDGES = {
    f"ridges-{metric}{of}-{split}"
    for metric in ("error", "loss")
    for of in ("", "-barrier")
    for split in ("train", "test")
}
NAMES = RIDGES | {
    "sibling-angles",
    "solution-planes",
    "mountainside",
    "barriers-by-fork",
    "barrier-growth",
    "sibling-distances",
    "layers-fork-0000",
    "layers-fork-0001",
    "layer-ranks",
    "cumulative-barriers",
    "toy-landscapes",
    "barrier-kinds",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained")
    run_forks(ForkConfig(**SETTINGS), path, progress=False)
    return path


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy")


@pytest.fixture(scope="module")
def traced(trained, tmp_path_factory):
    path = shutil.copytree(trained, tmp_path_factory.mktemp("traced") / "copy")
    trace_forks(path, progress=False)
    return path


@pytest.mark.check
def test_every_figure_is_drawn(traced, recwarn):
    figures = list(draw_traces(read_traces(traced), progress=False))
    assert sorted(name for name, _ in figures) == sorted(NAMES)
    assert not recwarn


@pytest.mark.check
def test_every_figure_is_written_in_both_formats(traced, tmp_path):
    with warnings.catch_warnings():
        # Neither is a figure left out, nor does the layout of one fail.
        warnings.simplefilter("error", UserWarning)
        paths = draw_all(traced, tmp_path / "new" / "figures", progress=False)
    assert sorted(paths) == sorted((tmp_path / "new" / "figures").iterdir())
    assert {path.name for path in paths} == {f"{name}.{kind}" for name in NAMES for kind in ("png", "pdf")}
    assert all(path.read_bytes().startswith({".png": b"\x89PNG", ".pdf": b"%PDF"}[path.suffix]) for path in paths)


@pytest.mark.check
def test_what_was_not_traced_is_left_out_with_a_warning(copy):
    never = {**SETTINGS["trace"], "layers": "never", "cumulative": "never", "test": False}
    run_forks(ForkConfig(**{**SETTINGS, "trace": never}), copy, progress=False)
    trace_forks(copy, progress=False)
    with pytest.warns(UserWarning) as caught:
        drawn = {name for name, _ in draw_traces(read_traces(copy), progress=False)}
    assert [str(warning.message) for warning in caught if "left out" in str(warning.message)] == [
        "layer-ranks is left out: The table of layers has no number in column 'measured', so there is nothing to draw.",
        "cumulative-barriers is left out: The table of cumulative barriers has no rows, so there is nothing to draw.",
    ]
    # Heat maps remain, for what is predicted of the layers.
    of_test = {name for name in RIDGES if name.endswith("test")}
    assert drawn == NAMES - of_test - {"layer-ranks", "cumulative-barriers"}


def test_missing_traces_are_named_with_what_makes_them(trained, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"curves\.csv is missing; trace_forks\(.*lmc-curvature trace .* makes it"
    ):
        draw_all(trained, tmp_path / "figures", progress=False)
    assert not (tmp_path / "figures").exists()
