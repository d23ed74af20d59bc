"""Claim: the page has words and Python for a merge only where they make the network that was predicted."""

import dataclasses

import pytest
import torch
from torch import nn

from lmc_curvature import predict_barrier
from lmc_curvature.report.contents import Pair
from lmc_curvature.report.picking import picker_record

KNOWN = ("lmc-curvature", "merge", "a.pt", "b.pt", "--model", "resnet20", "--partition", "module")


def small(seed=0, normalizes=True):
    """A network with batch normalisation, or without, of statistics of its own."""
    torch.manual_seed(seed)
    norm = nn.BatchNorm1d(5) if normalizes else nn.Identity()
    network = nn.Sequential(nn.Linear(3, 5), norm, nn.Tanh(), nn.Linear(5, 2))
    for name, tensor in network.named_buffers():
        if "running" in name:
            tensor.copy_(0.5 + torch.rand(5))
    return network.eval()


def predicted(normalizes=True, **options):
    torch.manual_seed(0)
    loader = [(torch.randn(16, 3), torch.arange(16) % 2)]
    networks = small(1, normalizes), small(2, normalizes)
    return predict_barrier(*networks, loader, progress=False, witness=False, **options)


@pytest.mark.check(after=1)
@pytest.mark.filterwarnings("ignore:(Re-estimated|By batch) statistics")
@pytest.mark.parametrize(
    ("options", "command", "by_layers", "known", "python"),
    [
        # Of all layers the command needs no rule, and of some it needs one that names of entries tell.
        ({}, True, None, True, ""),
        ({"layers": "module"}, True, ["--partition", "module"], True, ""),
        ({"layers": "tensor"}, True, ["--partition", "tensor"], True, ""),
        ({"layers": {"first": ["^[01]"], "last": [".*"]}}, True, None, True, ""),
        ({"frozen": "0.bias"}, False, None, False, ""),
        ({"frozen": "3", "base": "b", "layers": "module"}, False, ["--partition", "module"], False, ""),
        ({"batch_norm": "recalibrate"}, False, None, False, ", loader=loader"),
        ({"batch_norm": "batch"}, False, None, False, None),
        ({"batch_norm": "batch", "normalizes": False}, True, ["--partition", "module"], True, ""),
        ({"batch_norm": "recalibrate", "normalizes": False}, True, ["--partition", "module"], True, ""),
    ],
)
def test_words_are_there_where_they_tell_all(options, command, by_layers, known, python):
    prediction = predicted(**options)
    record = picker_record(Pair(prediction=prediction), raw=False)
    assert (record["words"] is not None, record["partition"], record["python"]) == (command, by_layers, python)
    assert record["generic"]
    record = picker_record(Pair(prediction=prediction, merge=KNOWN), raw=False)
    assert (record["words"], record["partition"]) == (list(KNOWN) if known else None, [])
    assert not record["generic"]


def test_predictions_of_earlier_versions_tell_no_layers():
    prediction = dataclasses.replace(predicted(), groups=None)
    record = picker_record(Pair(prediction=prediction), raw=False)
    assert (record["words"], record["python"]) == (None, None)
    assert "earlier version" in record["missing"]
    # The command that made it knows them.
    for policy, words in (("interpolate", list(KNOWN)), ("recalibrate", None)):
        old = dataclasses.replace(prediction, batch_norm=policy)
        record = picker_record(Pair(prediction=old, merge=KNOWN), raw=False)
        assert (record["words"], record["python"]) == (words, None)
