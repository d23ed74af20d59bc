"""Claim: a segment is the straight line between two networks of one architecture, moved layer by layer."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lmc_curvature import Objective, Segment
from lmc_curvature.errors import (
    NonFiniteError,
    OptionError,
    PartitionError,
    UnsupportedModelError,
)
from tests.support.cases import CASES, TiedNet
from tests.support.networks import joined, plain_loss, randomized, state_of, untouched

CONV = CASES["conv, interpolate"]
LAYERS = ("conv1", "conv2", "fc")


def _networks(dtype=torch.float64):
    return randomized(CONV.model().to(dtype), 1), randomized(CONV.model().to(dtype), 2)


def _assert_same(found, expected, **tolerance):
    torch.testing.assert_close(found, expected, **{"rtol": 0, "atol": 0, **tolerance})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_lies_between_half_precision_is_not_rounded_to_it(dtype):
    a, b = _networks(dtype)
    segment, exact = Segment(a, b), Segment(copy.deepcopy(a).double(), copy.deepcopy(b).double())
    tolerance = {"rtol": 1e-6, "atol": 1e-6, "check_dtype": False}
    _assert_same(segment.point(0.3), exact.point(0.3), **tolerance)
    _assert_same(segment.at({"conv1": 0.25, "fc": 1}), exact.at({"conv1": 0.25, "fc": 1}), **tolerance)
    for layer, direction in segment.directions().items():
        _assert_same(direction, exact.directions()[layer], **tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_ends_are_the_networks_bit_for_bit(dtype):
    a, b = _networks(dtype)
    with untouched(a, b):
        segment = Segment(a, b)
        _assert_same(segment.point(0), state_of(a))
        _assert_same(segment.point(1), state_of(b))
    _assert_same(segment.start, state_of(a))
    _assert_same(segment.end, state_of(b))
    assert segment.layers == LAYERS
    assert segment.partition.names == LAYERS


@pytest.mark.check
@given(st.floats(0, 1), st.sets(st.sampled_from(LAYERS)))
def test_a_set_of_layers_moves_and_the_others_are_shared(alpha, layers):
    a, b = map(state_of, _networks())
    segment = Segment(*_networks())
    moved = {entry for layer in layers for entry in segment.partition.entries(layer)}
    point = segment.point(alpha, layers)
    assert list(point) == list(segment.start)
    for name, tensor in point.items():
        if name in moved:
            _assert_same(tensor, (1 - alpha) * a[name] + alpha * b[name], rtol=1e-12, atol=1e-14)
        else:
            assert tensor is segment.start[name]
    _assert_same(segment.start, a)


def test_one_layer_may_be_named_without_a_list():
    segment = Segment(*_networks())
    _assert_same(segment.point(0.3, "fc"), segment.point(0.3, ["fc"]))


def test_a_point_is_the_network_in_between():
    a, b = _networks()
    data = CONV.batches()
    between = copy.deepcopy(a).eval()
    for tensor, end in zip([*between.parameters(), *between.buffers()], [*b.parameters(), *b.buffers()], strict=True):
        tensor.data.copy_(0.5 * tensor + 0.5 * end if tensor.is_floating_point() else tensor)
    objective = Objective(a, data)
    expected = plain_loss(between, joined(data)).item()
    assert objective.loss(Segment(a, b).point(0.5)) == pytest.approx(expected, rel=1e-12)


def test_directions_are_sparse_and_sum_to_the_difference():
    segment = Segment(*_networks())
    a, b = map(state_of, _networks())
    directions = segment.directions()
    assert tuple(directions) == LAYERS
    found = {}
    for layer, direction in directions.items():
        assert tuple(direction) == segment.partition.entries(layer)
        assert not found.keys() & direction.keys()
        found |= direction
    _assert_same(found, {name: b[name] - a[name] for name in found})
    assert found.keys() == a.keys()


def test_a_segment_is_a_snapshot():
    a, b = _networks()
    segment = Segment(a, b)
    expected = segment.point(0.25)
    randomized(a, 8), randomized(b, 9)
    _assert_same(segment.point(0.25), expected)


def test_reversed_walks_back():
    segment = Segment(*_networks())
    back = segment.reversed()
    assert back.layers == segment.layers
    _assert_same(back.point(0.25), segment.point(0.75), rtol=1e-12, atol=1e-14)
    assert back.point(0.25, "fc")["conv1.weight"] is segment.end["conv1.weight"]
    _assert_same(back.directions()["fc"]["fc.bias"], -segment.directions()["fc"]["fc.bias"])
    _assert_same(back.reversed().start, segment.start)


def test_a_segment_of_another_type_keeps_the_ends():
    segment = Segment(*_networks(torch.float32))
    double = segment.to(dtype=torch.float64)
    assert {tensor.dtype for tensor in double.point(0.5).values()} == {torch.float64}
    assert {tensor.dtype for tensor in segment.point(0.5).values()} == {torch.float32}
    _assert_same(double.start, {name: tensor.double() for name, tensor in segment.start.items()})
    _assert_same(double.end, {name: tensor.double() for name, tensor in segment.end.items()})
    assert segment.to("meta").start["fc.bias"].device.type == "meta"
    assert double.layers == segment.layers


@pytest.mark.parametrize("policy", ["batch", "recalibrate"])
def test_statistics_that_do_not_move_may_be_anything(policy):
    a, b = _networks()
    b.bn1.running_mean.fill_(torch.nan)
    segment = Segment(a, b, batch_norm=policy)
    assert segment.start.keys() == segment.point(0.5).keys() == dict(a.named_parameters()).keys()


def test_tied_weights_move_once():
    a, b = randomized(TiedNet(), 1), randomized(TiedNet(), 2)
    assert "decoder.weight" not in Segment(a, b).point(0.5)


def test_layers_may_be_any_partition():
    assert Segment(*_networks(), layers={"all": ".*"}).layers == ("all",)
    with pytest.raises(PartitionError, match="'fussed' is not a partition: did you mean 'fused'"):
        Segment(*_networks(), layers="fussed")


# Bad input


def _mlp(*modules):
    return nn.Sequential(nn.Linear(2, 2), *modules)


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize(
    ("entry", "value", "count", "total"),
    [("fc.weight", torch.nan, 1, 12), ("bn2.running_var", torch.inf, 1, 4), ("conv1.weight", -torch.inf, 1, 72)],
)
def test_values_that_are_not_finite_are_named(bad, entry, value, count, total):
    networks = _networks()
    {**dict(networks[bad].named_parameters()), **dict(networks[bad].named_buffers())}[entry].data.view(-1)[-1] = value
    message = rf"Entry '{entry}' of model_{'ab'[bad]} has {count} of {total} values that are infinite or not a number"
    with pytest.raises(NonFiniteError, match=f"{message}.*diverged"):
        Segment(*networks)


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_parameters_that_cannot_move_are_named(bad, dtype):
    networks = [_mlp(), _mlp()]
    networks[bad].table = nn.Parameter(torch.ones(2, dtype=dtype), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=f"Parameter 'table' has type {dtype}: .*real floating-point"):
        Segment(*networks)


@pytest.mark.parametrize("alpha", [-0.1, 1.0000001, float("nan"), float("inf")])
def test_positions_outside_the_segment_are_refused(alpha):
    with pytest.raises(OptionError, match=rf"alpha={alpha} lies outside the segment; expected a number in \[0, 1\]"):
        Segment(*_networks()).point(alpha)


def test_unknown_layers_get_a_suggestion():
    with pytest.raises(PartitionError, match="no layer 'conv12': did you mean 'conv"):
        Segment(*_networks()).point(0.5, ["fc", "conv12"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make",
    [
        nn.ReLU,
        lambda: nn.Sequential(nn.BatchNorm1d(3, affine=False, track_running_stats=False), nn.Softmax(1)),
        lambda: torch.ao.quantization.quantize_dynamic(_mlp(), {nn.Linear}, dtype=torch.qint8),
    ],
)
def test_networks_in_which_nothing_can_move_are_refused(make):
    with pytest.raises(UnsupportedModelError, match="Nothing can move.*no parameters. Quantised layers"):
        Segment(make(), make())


def test_wrapped_networks_are_those_within():
    a, b = _networks()
    segment = Segment(nn.DataParallel(a), b, frozen="fc")
    assert segment.layers == ("conv1", "conv2")
    _assert_same(segment.start, state_of(a))


def test_equal_networks_are_a_point():
    a, b = _networks()
    assert not Segment(a, b).is_point
    segment = Segment(a, copy.deepcopy(a))
    assert segment.is_point
    assert segment.notes == ("model_a and model_b are equal in every entry that moves",)
    assert segment.to(dtype=torch.float32).is_point


def test_an_unknown_policy_gets_a_suggestion(untyped):
    with pytest.raises(OptionError, match="batch_norm='recalibrat'.*did you mean 'recalibrate'"):
        Segment(*_networks(), batch_norm="recalibrat")
