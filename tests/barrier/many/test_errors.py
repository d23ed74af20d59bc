"""Claim: what is wrong with many networks, their names, weights or data is named, before any long work."""

import copy

import pytest
import torch
from torch import nn

from lmc_curvature import measure_barriers, predict_barriers
from lmc_curvature.errors import (
    ArchitectureMismatchError,
    LoaderError,
    NonFiniteError,
    OptionError,
    PartitionError,
    UnsupportedModelError,
)
from tests.support.cases import CASES

CASE, CONV = CASES["LayerNorm and GELU"], CASES["conv, interpolate"]
BOTH = pytest.mark.parametrize("function", [predict_barriers, measure_barriers])


class Unvisited:
    """A loader that must not be visited."""

    def __iter__(self):
        raise AssertionError("the loader was visited")


def _models(count=3):
    return [CASE.model(seed) for seed in range(count)]


@BOTH
@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (1, {}, "models holds 1 network; expected two or more"),
        (0, {}, "models holds 0 networks; expected two or more"),
        (3, {"names": ["a", "b", "a"]}, "names has 'a' twice"),
        (3, {"names": ["a", "b"]}, "names has 2 names for 3 networks"),
        (3, {"names": ["a", "b", 3]}, "names has 3; expected a string"),
        (3, {"weights": [0.5, 0.2, 0.2]}, "weights sum to 0.9; expected 1"),
        (3, {"weights": [0.8, 0.4, -0.2]}, "weight of network 'model_c' is -0.2; expected a positive number"),
        (3, {"weights": [0.5, 0.5, 0.0]}, "weight of network 'model_c' is 0.0; expected a positive number. Leave out"),
        (3, {"weights": [0.5, 0.5, float("nan")]}, "weight of network 'model_c' is nan"),
        (3, {"weights": [0.5, 0.5]}, "weights has 2 numbers for 3 networks"),
        (3, {"weights": {"model_a": 0.5, "model_b": 0.5}}, "weights has no number for network 'model_c'"),
        (3, {"weights": {"model_d": 0.5}}, "weights has a network 'model_d', of which there is none: did you mean"),
    ],
)
def test_bad_options_are_named(function, count, options, message, untyped):
    with pytest.raises(OptionError, match=message):
        function(_models(count), Unvisited(), progress=False, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"subsets": [["model_a", "model_d"]]}, OptionError, "no network 'model_d': did you mean 'model_"),
        ({"subsets": [["model_a", "model_a"]]}, OptionError, "Network 'model_a' is named twice"),
        ({"subsets": [[]]}, OptionError, "empty set of networks has no mean"),
        ({"subsets": "model_a"}, OptionError, "subsets='model_a': expected a list of sets"),
        ({"sets": [["4"]]}, PartitionError, "no layer '4'"),
        ({"alphas": 2}, OptionError, "alphas=2: at least 3 positions"),
        ({"metrics": ("accuracy",)}, OptionError, "metrics='accuracy' is not a choice"),
    ],
)
def test_bad_options_of_a_measurement_are_named(options, error, message, untyped):
    with pytest.raises(error, match=message):
        measure_barriers(_models(), Unvisited(), progress=False, **options)


@BOTH
def test_networks_of_another_architecture_are_named(function, untyped):
    others = [*_models(2), nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()]
    with pytest.raises(ArchitectureMismatchError, match=r"Networks 'x' \(model_a\) and 'z' \(model_b\): The two"):
        function(others, Unvisited(), names=list("xyz"), progress=False)
    with pytest.raises(
        UnsupportedModelError, match=r"'x' \(model_a\) and 'z' \(model_b\): model_b is .*NoneType; expected"
    ):
        function([*_models(2), None], Unvisited(), names=list("xyz"), progress=False)


@BOTH
def test_a_network_that_computes_something_else_is_named(function):
    others = _models()
    others[2][2] = nn.ReLU()
    with pytest.raises(ArchitectureMismatchError, match=r"'x' .* and 'z' \(model_b\): model_b computes something else"):
        function(others, CASE.batches(), names=list("xyz"), progress=False)


@BOTH
def test_a_network_that_has_diverged_is_named(function):
    others = _models()
    with torch.no_grad():
        others[1][0].bias[0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"'x' \(model_a\) and 'y' \(model_b\): Entry '0.bias' of model_b"):
        function(others, Unvisited(), names=list("xyz"), progress=False)


@BOTH
def test_equal_networks_are_warned_of(function):
    others = _models(2)
    with pytest.warns(UserWarning, match="Networks 'y' and 'z' are equal in every entry that moves"):
        found = function([*others, copy.deepcopy(others[1])], CASE.batches(), names=list("xyz"), progress=False)
    assert found.barriers()[1, 2] == 0


def test_a_loader_that_can_be_visited_once_is_refused_where_two_visits_are_needed():
    models = [CONV.model(seed) for seed in range(3)]
    options = {"batch_norm": "recalibrate", "progress": False}
    with pytest.raises(LoaderError, match="visits the loader twice"):
        measure_barriers(models, iter(CONV.batches((6, 6))), metrics=("loss",), **options)
    with pytest.raises(LoaderError, match="visits the loader twice"):
        predict_barriers(models, iter(CONV.batches((6, 6))), recalibration=CONV.batches((6, 6)), **options)


def test_what_is_asked_of_the_results_is_checked():
    found = predict_barriers(_models(), CASE.batches(), progress=False)
    for result in (found, measure_barriers(_models(), CASE.batches(), progress=False)):
        with pytest.raises(OptionError, match="Network 'model_a' is named twice"):
            result.pair("model_a", "model_a")
        with pytest.raises(OptionError, match="no network 'model_x'"):
            result.pair("model_a", "model_x")
    with pytest.raises(PartitionError, match="no layer 'x'"):
        found.mean_barrier(["x"])
