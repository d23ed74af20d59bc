"""Claim: what keeps two files from being averaged is found in their headers, and the first batch tells the cost."""

import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lmc_curvature import predict_barrier
from lmc_curvature.errors import (
    ArchitectureMismatchError,
    CheckpointError,
    LoaderError,
    NonFiniteError,
    PartitionError,
    UnsupportedModelError,
)
from lmc_curvature.merging.checking import check_checkpoints
from lmc_curvature.merging.cost import PredictionCost, estimate_prediction
from tests.support.cases import CASES
from tests.support.networks import Watched

CONV = CASES["conv, interpolate"]


@pytest.fixture
def files(tmp_path):
    pair = [CONV.model(seed) for seed in (0, 1)]
    save_file(pair[0].state_dict(), tmp_path / "a")
    torch.save({"model": pair[1].state_dict()}, tmp_path / "b")
    return pair, tmp_path / "a", tmp_path / "b"


def test_files_of_one_network_are_counted(files):
    pair, a, b = files
    numbers = sum(entry.numel() for name, entry in pair[0].state_dict().items() if "num_batches" not in name)
    found = check_checkpoints(a, b)
    assert (found.entries, found.numbers, found.distances, found.notes) == (12, numbers, None, ())
    assert str(found) == (
        f"Names, shapes and types match (12 entries with {numbers} numbers). Whether the average is any good: "
        "`lmc-curvature predict` or `select`."
    )
    found = check_checkpoints(a, b, CONV.model(2), partition="fused")
    assert found.layers == ("conv1", "conv2", "fc")
    assert "in 3 layers" in str(found)


def test_distances_are_those_of_a_prediction(files):
    pair, a, b = files
    expected = predict_barrier(*pair, CONV.batches(), anchors=2, progress=False)
    found = check_checkpoints(a, b, CONV.model(2), partition="fused", distances=True)
    assert found.distances == pytest.approx(expected.distances.tolist(), rel=1e-12)
    assert found.distance == pytest.approx(expected.distance, rel=1e-12)
    by_names = check_checkpoints(a, b, partition="block", distances=True)
    norms = {}
    for name, entry in pair[0].state_dict().items():
        if "running" not in name and "num_batches" not in name:
            block = name.split(".")[0]
            norms[block] = norms.get(block, 0) + float(((entry - pair[1].state_dict()[name]) ** 2).sum())
    assert dict(zip(by_names.layers, by_names.distances, strict=True)) == pytest.approx(
        {block: square**0.5 for block, square in norms.items()}, rel=1e-12
    )


def test_a_tied_parameter_is_counted_once(tmp_path):
    case = CASES["tied weights"]
    for name, seed in (("a", 0), ("b", 1)):
        torch.save(case.model(seed).state_dict(), tmp_path / name)
    found = check_checkpoints(tmp_path / "a", tmp_path / "b", distances=True)
    first, second = case.model(0), case.model(1)
    square = sum(((p - q) ** 2).sum().item() for p, q in zip(first.parameters(), second.parameters(), strict=True))
    assert found.distance == pytest.approx(square**0.5, rel=1e-12)
    assert found.numbers == sum(p.numel() for p in first.parameters())


def test_what_differs_and_is_no_obstacle_is_said(files, tmp_path):
    pair, a, _ = files
    entries = {n: e.half() if n == "fc.bias" else e for n, e in pair[1].state_dict().items() if "num_batches" not in n}
    save_file(entries, tmp_path / "c")
    found = check_checkpoints(a, tmp_path / "c", CONV.model(2))
    notes = found.notes
    assert str(found).startswith("Names and shapes match (12 entries ")
    assert "2 entries in" in notes[0]
    assert "'bn1.num_batches_tracked' first: counters of batches" in notes[0]
    assert "1 entry of another type, 'fc.bias' first: float64 in" in notes[1]
    assert "same file" in check_checkpoints(a, a).notes[0]
    save_file(pair[0].state_dict(), tmp_path / "d")
    assert check_checkpoints(a, tmp_path / "d").notes == ()
    assert check_checkpoints(a, tmp_path / "d").same_types
    assert "is the same file given twice?" in check_checkpoints(a, tmp_path / "d", distances=True).notes[0]


def test_numbers_are_read_for_distances_alone(files, tmp_path):
    pair, a, _ = files
    with torch.no_grad():
        pair[1].fc.weight[0] = torch.nan
    save_file(pair[1].state_dict(), tmp_path / "c")
    check_checkpoints(a, tmp_path / "c")
    with pytest.raises(NonFiniteError, match=r"'fc\.weight' of .*c has values"):
        check_checkpoints(a, tmp_path / "c", distances=True)


def test_what_a_prediction_would_refuse_is_refused(files, tmp_path):
    _, a, b = files
    save_file(CASES["LSTM"].model(0).state_dict(), tmp_path / "other")
    with pytest.raises(ArchitectureMismatchError, match=r"bn1\.bias: only in .*a, with shape \(4,\)"):
        check_checkpoints(a, tmp_path / "other")
    with pytest.raises(CheckpointError, match="does not fit Recurrent"):
        check_checkpoints(a, b, CASES["LSTM"].model(0))
    with pytest.raises(CheckpointError, match="absent does not exist"):
        check_checkpoints(a, tmp_path / "absent")
    with pytest.raises(PartitionError, match="did you mean 'fused'"):
        check_checkpoints(a, b, CONV.model(0), partition="fusd")


def test_key_and_prefix_are_for_the_file_that_needs_them(files, tmp_path):
    pair, a, _ = files
    states = {"ema": pair[1].state_dict(), "last": pair[1].state_dict()}
    torch.save(states, tmp_path / "both")
    with pytest.warns(UserWarning, match="a was read without key, which does not fit it"):
        check_checkpoints(a, tmp_path / "both", key="ema")
    with pytest.raises(CheckpointError, match="'ema', 'last'"):
        check_checkpoints(a, tmp_path / "both")


@pytest.mark.check
def test_the_first_batch_tells_what_all_cost():
    pair = [Watched(CONV.model(seed)) for seed in (0, 1)]
    batches = CONV.batches((6, 6, 6, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = estimate_prediction(*pair, batches, anchors=2, layers="block")
    assert (found.batches, found.anchors) == (4, 2)
    assert 0 < found.further < found.first
    assert found.seconds == pytest.approx(found.first + 3 * found.further)
    assert found.memory_gib > 0
    assert max(size for size in pair[0].sizes("value")) == 6
    assert estimate_prediction(*pair, (batch for batch in batches)).seconds is None
    assert estimate_prediction(*pair, batches, max_batches=2).batches == 2
    with pytest.raises(LoaderError, match="yields no batches"):
        estimate_prediction(*pair, [])


def test_the_estimate_refuses_what_the_prediction_would():
    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 3).double()

        def forward(self, x):
            return self.linear(x + torch.randn_like(x))

    with pytest.raises(UnsupportedModelError, match="draws random numbers"):
        estimate_prediction(Random(), Random(), CASES["LayerNorm and GELU"].batches())


def test_costs_are_told_in_fitting_units():
    assert "3.1 s for 2 batches" in str(PredictionCost(2, 3, 3.0, 0.1, 1.0))
    assert "17 min for 1001 batches" in str(PredictionCost(1001, 3, 3.0, 1.0, 1.0))
    assert "2.8 h for 1001 batches" in str(PredictionCost(1001, 3, 3.0, 10.0, 1.0))
    assert str(PredictionCost(None, 3, 3.0, 0.1, 2.5)).endswith("each further one, and 2.5 GiB")
