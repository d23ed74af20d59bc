"""Claim: there is one comparison of two results and one table of checks, which the page on trust shows."""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import lmc_curvature
from lmc_curvature.agreement import CHECKS, Tolerance, all_near, near

PACKAGE = Path(lmc_curvature.__file__).parent
_ROUNDING = {"float32": 2.0**-23, "float64": 2.0**-52}


def _table():
    page = (PACKAGE.parent / "docs" / "trust.md").read_text(encoding="utf-8")
    return [tuple(row.strip("| ").split(" | ")) for row in page.splitlines() if row.startswith("| ")][2:]


def test_the_page_on_trust_shows_the_table():
    expected = [
        (name, check.catches, check.runs, str(check.tolerance or "–"), f"{check.cost:g}")
        for name, check in CHECKS.items()
    ]
    assert _table() == expected


def test_every_check_is_used_by_its_name():
    sources = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    for name, check in CHECKS.items():
        if check.tolerance is not None:
            assert len(re.findall(rf'near\(\s*"{name}"', sources)) >= 1, name


def test_nothing_changes_the_table():
    with pytest.raises(TypeError):
        CHECKS["sweep"] = None  # pyright: ignore[reportIndexIssue]
    with pytest.raises(dataclasses.FrozenInstanceError):
        CHECKS["sweep"].cost = 0.0  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", [name for name, check in CHECKS.items() if check.tolerance is not None])
def test_tolerances_follow_the_precision_from_far_above_rounding(name):
    tolerance = CHECKS[name].tolerance
    assert tolerance.at(_ROUNDING["float64"]) < 1e-2 * tolerance.at(_ROUNDING["float32"])
    for rounding in _ROUNDING.values():
        assert 100 * rounding < tolerance.at(rounding) < 0.02


def test_a_tolerance_has_a_limit():
    assert Tolerance(0.5, most=1e-3).at(1e-2) == 1e-3
    assert Tolerance(0.5).at(1e-8) == pytest.approx(1e-4)
    assert str(Tolerance(0.5)) == "ε^0.5"
    assert str(Tolerance(0.4, most=1e-3)) == "ε^0.4, at most 0.001"


def _array(values):
    return np.array(values, dtype=float)


def _tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("form", [_array, _tensor])
def test_numbers_are_near_or_not(form):
    # The tolerance of this check at this rounding is 1e-4.
    found = form([1.0, 1.0, 0.0, math.inf, math.inf, math.nan, math.nan])
    expected = form([1.00009, 1.00011, 1e-3, math.inf, -math.inf, math.nan, 1.0])
    scale = form([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    kept = near("captured values", found, expected, rounding=1e-8, scale=scale)
    assert kept.tolist() == [True, False, False, True, False, True, False]
    kept = near("captured values", found, expected, rounding=1e-8, scale=scale, floor=1e-3)
    assert kept.tolist() == [True, True, True, True, False, True, False]


def test_plain_numbers_are_near_or_not():
    assert near("sweep", 2.0, 2.0, rounding=1e-16, scale=0.0)
    assert near("sweep", math.nan, math.nan, rounding=1e-16, scale=0.0)
    assert not near("sweep", 2.0, 2.1, rounding=1e-16, scale=2.0)


def test_what_compares_no_numbers_cannot_be_asked():
    with pytest.raises(LookupError, match="'constants' compares no numbers"):
        near("constants", 1.0, 1.0, rounding=1e-16, scale=1.0)


def test_tensors_are_near_relative_to_the_largest_finite_number():
    expected = torch.tensor([1e4, -torch.inf, 1.0])
    assert all_near("captured values", expected + torch.tensor([1.0, 0.0, 1.0]), expected, rounding=0.0)
    assert not all_near("captured values", expected + torch.tensor([0.0, 0.0, 9.0]), expected, rounding=0.0)
    assert all_near("captured values", expected + torch.tensor([0.0, 0.0, 9.0]), expected, rounding=1e-4)


@pytest.mark.parametrize("other", [None, {}, torch.ones(2), torch.ones(3, dtype=torch.float64)])
def test_what_has_another_form_is_not_near(other):
    assert not all_near("captured values", torch.ones(3), other, rounding=1.0)
