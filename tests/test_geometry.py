"""Claim: distances and angles between states are those of the vectors of all their entries."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lmc_curvature.errors import ArchitectureMismatchError, NonFiniteError
from lmc_curvature.geometry import cosine, distance, sibling_cosine, solution_plane_cosine


def _state(*numbers):
    """Five numbers as a state of two entries."""
    values = torch.tensor(numbers, dtype=torch.float64)
    return {"matrix": values[:4].view(2, 2), "bias": values[4:]}


_vectors = st.lists(st.integers(-50, 50).map(float), min_size=5, max_size=5)


def _angle(u, v):
    return float(np.dot(u, v) / np.linalg.norm(u) / np.linalg.norm(v))


@given(st.tuples(_vectors, _vectors, _vectors, _vectors))
def test_geometry_is_that_of_flat_vectors(vectors):
    a, b, base, other = map(np.array, vectors)
    states = [_state(*vector) for vector in vectors]
    assert distance(*states[:2]) == pytest.approx(np.linalg.norm(a - b))
    for compute, u, v in [
        (lambda: cosine(*states[:2]), a, b),
        (lambda: sibling_cosine(*states[:2]), a, b),
        (lambda: sibling_cosine(*states[:3]), a - base, b - base),
        (lambda: solution_plane_cosine(*states), b - a, other - base),
    ]:
        if u.any() and v.any():
            assert compute() == pytest.approx(_angle(u, v), abs=1e-12)
        else:
            with pytest.raises(NonFiniteError, match="length zero is undefined: are two of the states equal"):
                compute()


def test_complex_numbers_are_vectors_of_their_parts():
    a = {"w": torch.tensor([1 + 5j, 2 + 0j]), "b": torch.tensor([1.0])}
    b = {"w": torch.tensor([1 + 0j, 2 - 3j]).conj(), "b": torch.tensor([3.0])}
    assert distance(a, b) == pytest.approx(math.sqrt(25 + 9 + 4))
    u, v = np.array([1, 5, 2, 0, 1]), np.array([1, 0, 2, 3, 3])
    assert cosine(a, b) == pytest.approx(_angle(u, v), rel=1e-12)


def test_entries_meet_by_name_not_by_order():
    a = _state(1.0, 2.0, 3.0, 4.0, 5.0)
    assert distance(a, dict(reversed(a.items()))) == 0.0
    assert cosine(a, dict(reversed(a.items()))) == 1.0


def test_small_types_are_summed_in_float64():
    many = {"w": torch.full((100_000,), 3.0, dtype=torch.float16)}
    none = {"w": torch.zeros(100_000, dtype=torch.float16)}
    assert distance(many, none) == pytest.approx(3.0 * math.sqrt(100_000), rel=1e-12)
    assert cosine(many, {"w": -many["w"]}) == -1.0


@pytest.mark.parametrize("counts", [(5000, 5000), (5000, 4000), (5000.0, 3.0), (7, None)])
def test_what_counts_or_indexes_is_no_part_of_a_vector(counts):
    plain = _state(1, 2, 3, 4, 5), _state(2, 0, 1, -4, 3)
    states = [
        {"norm.num_batches_tracked": torch.tensor(count), "ids": torch.arange(900), **own, "mask": torch.ones(3) > 0}
        for count, own in zip((1 if count is None else count for count in counts), plain, strict=True)
    ]
    if counts[1] is None:
        del states[1]["norm.num_batches_tracked"]
    for measure in (distance, cosine, sibling_cosine):
        assert measure(*states) == measure(*plain)
    final = _state(0, 1, 0, 1, 0), _state(3, 3, 2, 1, 1)
    assert solution_plane_cosine(*states, *final) == solution_plane_cosine(*plain, *final)


def test_geometry_of_networks_is_that_of_their_parameters_and_statistics():
    networks = [nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)) for _ in range(2)]
    networks[0][1].num_batches_tracked.fill_(1000)
    vectors = [
        np.concatenate([t.detach().numpy().ravel() for t in [*n.parameters(), n[1].running_mean, n[1].running_var]])
        for n in networks
    ]
    found = [network.state_dict() for network in networks]
    assert distance(*found) == pytest.approx(np.linalg.norm(vectors[0] - vectors[1]), rel=1e-6)
    assert cosine(*found) == pytest.approx(_angle(*vectors), rel=1e-6)


@pytest.mark.parametrize("measure", [distance, cosine, sibling_cosine])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"matrix": torch.ones(2, 2)}, r"'bias' .* \(1,\) in one state, absent in the other; expected states of one"),
        ({**_state(1, 1, 1, 1, 1), "extra": torch.ones(1)}, r"'extra' .* absent in one state, \(1,\) in the other"),
        (
            {"matrix": torch.ones(2, 2), "bias": torch.ones(3)},
            r"'bias' has different shapes: \(1,\) in one state, \(3,\) in the other; expected states of one",
        ),
    ],
)
def test_states_of_different_networks_are_refused(measure, other, message):
    with pytest.raises(ArchitectureMismatchError, match=message):
        measure(_state(1, 2, 3, 4, 5), other)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_angle_with_what_is_not_finite_is_refused(value):
    with pytest.raises(NonFiniteError, match="not finite is undefined.*diverged"):
        cosine(_state(1, 2, 3, 4, 5), _state(1, 2, 3, 4, value))
