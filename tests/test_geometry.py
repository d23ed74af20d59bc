"""Claim: distances and angles between states are those of the vectors of all their entries."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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


def test_entries_meet_by_name_not_by_order():
    a = _state(1.0, 2.0, 3.0, 4.0, 5.0)
    assert distance(a, dict(reversed(a.items()))) == 0.0
    assert cosine(a, dict(reversed(a.items()))) == 1.0


def test_small_types_are_summed_in_float64():
    many = {"w": torch.full((100_000,), 3.0, dtype=torch.float16)}
    none = {"w": torch.zeros(100_000, dtype=torch.float16)}
    assert distance(many, none) == pytest.approx(3.0 * math.sqrt(100_000), rel=1e-12)
    assert cosine(many, {"w": -many["w"]}) == -1.0


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
