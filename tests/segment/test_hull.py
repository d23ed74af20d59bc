"""Claim: a hull holds the means of networks, layer by layer, and is a segment for two of them."""

import numpy as np
import pytest
import torch

from lmc_curvature import Segment
from lmc_curvature.errors import UnsupportedModelError
from lmc_curvature.segment import Hull, HullPoints
from lmc_curvature.segment.hull import network_names, network_weights
from tests.support.cases import CASES

CONV = CASES["conv, interpolate"]


@pytest.fixture(scope="module")
def models():
    return [CONV.model(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def hull(models):
    return Hull(models, "abc")


def test_a_state_is_the_mean_of_each_layer_by_its_own_weights(models, hull):
    x = np.array([[0.2, 0.5, 0.3], [0.0, 0.0, 1.0], [0.6, 0.0, 0.4]])
    partition = Segment(*models[:2]).partition
    state = hull.at(x)
    assert set(state) == {entry for entries in partition.groups.values() for entry in entries}
    for row, layer in zip(x, partition.names, strict=True):
        for entry in partition.entries(layer):
            expected = sum(w * model.state_dict()[entry] for w, model in zip(row, models, strict=True))
            torch.testing.assert_close(state[entry], expected, rtol=1e-13, atol=1e-14)


def test_networks_themselves_are_there_bit_for_bit(models, hull):
    for number, model in enumerate(models):
        state = hull.at(hull.corner(number)[None])
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())


def test_of_two_networks_it_is_their_segment(models, hull):
    for i, j in ((0, 1), (0, 2), (1, 2)):
        segment = Segment(models[i], models[j])
        line = hull.line(hull.corner(i), hull.corner(j))
        for alpha in (0.0, 0.25, 0.5, 1.0):
            place = (1 - alpha) * hull.corner(i) + alpha * hull.corner(j)
            for found in (line.point(alpha), hull.at(place[None])):
                torch.testing.assert_close(found, segment.point(alpha), rtol=0, atol=0)


def test_what_is_equal_stays_equal(models):
    same = Hull([models[0]] * 3, "abc")
    state = same.at(np.array([[0.1, 0.7, 0.2]]))
    assert all(torch.equal(tensor, models[0].state_dict()[name]) for name, tensor in state.items())


def test_a_mean_of_half_precision_is_taken_in_single_precision(models):
    halves = Hull([CONV.model(seed).bfloat16() for seed in range(3)], "abc")
    for x in ([0.2, 0.5, 0.3], [0.5, 0.5, 0.0], [0.0, 0.5, 0.5]):
        assert halves.at(np.array([x]))["fc.weight"].dtype == torch.float32
    assert halves.at(np.array([[0.0, 0.0, 1.0]]))["fc.weight"].dtype == torch.bfloat16
    assert halves.to(dtype=torch.bfloat16).at(np.array([[0.2, 0.5, 0.3]]))["fc.weight"].dtype == torch.bfloat16


def test_points_are_numbered_once(hull):
    points = HullPoints(hull)
    assert points.networks == (0, 1, 2)
    number = points.add(np.array([[0.5, 0.25, 0.25]]), "a place")
    assert number == 3
    assert points.add(np.full((3, 1), 1.0) * [0.5, 0.25, 0.25 + 1e-16], "the same") == number
    assert points.add(hull.corner(2)[None], "a network") == 2
    assert len(points) == 4
    assert [points.describe(each) for each in range(4)] == ["a", "b", "c", "a place"]
    torch.testing.assert_close(points[3], hull.at(np.array([[0.5, 0.25, 0.25]])), rtol=0, atol=0)


def test_names_and_weights_have_defaults():
    assert network_names(3) == ("model_a", "model_b", "model_c")
    assert network_names(30)[-1] == "model_30"
    assert network_weights(None, "abcd").tolist() == [0.25] * 4
    # Shares that are rounded are made to sum to one.
    assert network_weights([1 / 3, 1 / 3, 1 / 3 + 1e-9], "abc").sum() == pytest.approx(1, abs=1e-15)


def test_it_says_what_it_is(hull):
    assert repr(hull).startswith("Hull of 3 networks, 3 layers")


class _Adapter(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lora_A, self.lora_B = torch.nn.Linear(3, 2, bias=False), torch.nn.Linear(2, 3, bias=False)


def test_both_factors_of_an_update_must_not_move_in_any_of_them():
    three = [_Adapter() for _ in range(3)]
    for model in three[1:]:
        model.load_state_dict(three[0].state_dict())
    torch.nn.init.ones_(three[1].lora_A.weight)
    Hull(three, "abc")
    torch.nn.init.ones_(three[2].lora_B.weight)
    with pytest.raises(UnsupportedModelError, match="are the factors of a low-rank update"):
        Hull(three, "abc")
