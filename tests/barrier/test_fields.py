"""Claim: a file of a result holds what belongs together, or is refused by name, whoever has sealed it."""

import numpy as np
import pytest
import torch
from torch import nn

from lmc_curvature import BarrierMeasurement, BarrierPrediction, measure_barrier, predict_barrier
from lmc_curvature.errors import FileFormatError
from lmc_curvature.geometry import SiblingGeometry
from lmc_curvature.storage import load_arrays, save_arrays


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A prediction and a measurement of two layers, from three batches."""
    folder, networks = tmp_path_factory.mktemp("results"), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        networks.append(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    loader = [(torch.randn(5, 3), torch.randint(2, (5,))) for _ in range(3)]
    paths = {"barrier-prediction": folder / "p.safetensors", "barrier-measurement": folder / "m.safetensors"}
    predict_barrier(*networks, loader, progress=False).save(paths["barrier-prediction"])
    measure_barrier(*networks, loader, sets="each", alphas=3, progress=False).save(paths["barrier-measurement"])
    return paths


LOADERS = {"barrier-prediction": BarrierPrediction.load, "barrier-measurement": BarrierMeasurement.load}


def changed(files, kind, tmp_path, change):
    """The path of a file of a kind with other arrays and metadata, sealed as its writer would."""
    arrays, metadata = load_arrays(files[kind], kind)
    change(arrays, metadata)
    save_arrays(tmp_path / "x.safetensors", kind, {n: a for n, a in arrays.items() if a is not None}, **metadata)
    return tmp_path / "x.safetensors"


METADATA = {
    "barrier-prediction": [
        *({"layers": value} for value in (None, "ab", ["0"], ["0", 2], ["0", "2", "4"], [])),
        *(
            {"anchors": value}
            for value in (None, 3, [0.0, 1.0, 0.5], [0.0, 0.5], ["a", "b", "c"], [0.0, 0.5, 0.7, 1.0])
        ),
        *({"groups": value} for value in (["0"], {"0": "weight"}, {"0": [1]}, 3)),
        *(
            {"base": "c"},
            {"base": None},
            {"cosine": "x"},
            {"notes": "text"},
            {"batch_norm": "none"},
            {"batch_norm": []},
        ),
    ],
    "barrier-measurement": [
        *({"sets": value} for value in (None, [["0"]], [["0"], []], [["0"], [1]], ["0", "2"], 3)),
        *({"metrics": value} for value in (None, [], ["loss"], ["loss", "loss"], ["loss", "speed"], "loss")),
        *({"points": [{"0": "x"}]}, {"points": [3]}, {"points": [{"0": 1.0}]}, {"notes": [1]}, {"batch_norm": None}),
    ],
}


@pytest.mark.parametrize(("kind", "change"), [(kind, change) for kind, every in METADATA.items() for change in every])
def test_metadata_that_are_none(files, tmp_path, kind, change):
    path = changed(files, kind, tmp_path, lambda arrays, metadata: metadata.update(change))
    with pytest.raises(FileFormatError, match=r"x\.safetensors is damaged: its contents are not what they should be"):
        LOADERS[kind](path)


def _array_changes():
    for kind, names in {
        "barrier-prediction": ("distances", "anchor_1.batch_curvatures", "anchor_2.batch_sizes", "parameters", "norms"),
        "barrier-measurement": ("alphas", "batch_sizes", "batch_ends", "batch_values", "batch_sides"),
    }.items():
        for name in names:
            yield kind, name, "shorter", lambda array: array[..., :-1]
            yield kind, name, "of text", lambda array: np.frombuffer(array.tobytes(), dtype=np.bool_)
            yield kind, name, "of negative infinity", lambda array: np.full(array.shape, -np.inf)
    yield "barrier-prediction", "anchor_0.batch_losses", "away", lambda array: None
    yield "barrier-prediction", "anchor_0.batch_sizes", "of zeros", np.zeros_like
    yield "barrier-measurement", "batch_values", "away", lambda array: None
    yield "barrier-measurement", "batch_sizes", "of fractions", lambda array: array / 2
    yield "barrier-measurement", "alphas", "outside", lambda array: array + 1


ARRAYS = list(_array_changes())


@pytest.mark.parametrize(
    ("kind", "name", "change"), [(k, n, c) for k, n, _, c in ARRAYS], ids=[f"{n} {w}" for _, n, w, _ in ARRAYS]
)
def test_arrays_that_are_none(files, tmp_path, kind, name, change):
    path = changed(files, kind, tmp_path, lambda arrays, metadata: arrays.update({name: change(arrays[name])}))
    with pytest.raises(FileFormatError, match=r"x\.safetensors is damaged: its contents are not what they should be"):
        LOADERS[kind](path)


@pytest.mark.parametrize("arrays", [{}, {"distance": np.ones(2)}, {"distance": np.array(np.nan)}])
def test_geometries_that_are_none(tmp_path, arrays):
    every = {name: np.array(0.5) for name in ("distance", "cosine_origin", "cosine_fork", "cosine_final")}
    save_arrays(tmp_path / "g.safetensors", "sibling-geometry", every | arrays if arrays else {})
    with pytest.raises(FileFormatError, match=r"g\.safetensors is damaged"):
        SiblingGeometry.load(tmp_path / "g.safetensors")
