"""Claim: every place is differentiated once, along no more directions than it takes."""

import numpy as np
import pytest

from lmc_curvature.barrier.many.lines import pair_lines, spoke_lines, stations_of

HALVES = np.array([0.0, 0.5, 1.0])


def _stations(weights, positions=HALVES):
    names = [f"n{number}" for number in range(len(weights))]
    lines = [*pair_lines(names, positions), *spoke_lines(names, np.array(weights))]
    return lines, stations_of(lines)


@pytest.mark.parametrize(
    ("weights", "count"),
    [
        # The mean of two is halfway, and that of all but one of them is the other.
        ([0.5, 0.5], 3),
        ([0.3, 0.7], 4),
        # Of three, that of all but one is halfway between two of them.
        ([1 / 3] * 3, 3 + 3 + 1),
        ([0.5, 0.3, 0.2], 3 + 3 + 1 + 3),
        ([0.25] * 4, 4 + 6 + 1 + 4),
    ],
)
def test_every_place_is_a_station_once(weights, count):
    lines, stations = _stations(weights)
    assert len(stations) == count
    visits = sum(len(line.positions) for line in lines)
    assert sum(len(station.combinations) for station in stations) == visits


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.5, 0.3, 0.2], [0.25] * 4, [0.1, 0.2, 0.3, 0.15, 0.25]])
def test_directions_are_independent_and_make_all_others(weights):
    lines, stations = _stations(weights)
    for station in stations:
        vectors = np.stack([lines[number].direction for number in station.basis], axis=1)
        assert np.linalg.matrix_rank(vectors) == vectors.shape[1] <= len(weights) - 1
        for number, combination in station.combinations.items():
            np.testing.assert_allclose(vectors @ combination, lines[number].direction, atol=1e-12)
            if number in station.basis:
                assert combination.tolist() == [float(each == number) for each in station.basis]
    corners = [station for station in stations if station.place.max() == 1]
    assert len(corners) == len(weights)
    assert all(len(station.basis) == len(weights) - 1 for station in corners)


def test_spokes_go_through_the_mean_to_the_mean_of_the_others():
    weights = np.array([0.5, 0.3, 0.2])
    for number, line in enumerate(spoke_lines("abc", weights)):
        np.testing.assert_allclose(line.at(line.positions[1]), weights, atol=1e-15)
        assert line.end[number] == 0
        assert line.end.sum() == pytest.approx(1)
    assert line.describe(0.0) == "c"
    assert line.describe(1.0) == "the mean of all but c"
    assert line.describe(0.8) == "alpha=0.8 between c and the mean of all but c"


def test_pairs_are_in_the_order_of_the_names():
    assert [line.ends for line in pair_lines("abc", HALVES)] == [("a", "b"), ("a", "c"), ("b", "c")]
